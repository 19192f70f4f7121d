// Gradient of an activation: out = gradient f'(x). The slope is made once for all targets.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace relprop {

enum class Activation : int {
  kGelu = 0,      // x Phi(x)
  kGeluTanh = 1,  // x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2
  kSilu = 2,      // x sigmoid(x)
};

template <typename T>
void activation_gradient(Result<T> out,        // [targets, size]; may be `gradient` itself
                         Operand<T> gradient,  // [targets, size]
                         Operand<T> x,         // [size]
                         int64_t targets, int64_t size, Activation activation, int threads);

}  // namespace relprop
