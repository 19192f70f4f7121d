// Gradient of an activation: out = gradient * f'(x).
#pragma once

#include "cuda_types.h"

namespace relprop {

enum class Activation : int {
  kGelu = 0,      // x Phi(x)
  kGeluTanh = 1,  // x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2
  kSilu = 2,      // x sigmoid(x)
};

void activation_gradient_cuda(DType values, DType streams,
                              void* out,             // [targets, size], streams; may be `gradient` itself
                              const void* gradient,  // [targets, size], streams
                              const void* x,         // [size], values
                              int64_t targets, int64_t size, Activation activation, Stream stream);

}  // namespace relprop
