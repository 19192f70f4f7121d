// Slope rule of an activation y = f(x): R_in = x (y / stab(x)) (R / stab(y)), the identity up to the stabilisers.
// Source: Achtibat et al., ICML 2024, eq. 9.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "stabiliser.h"

namespace relprop {

template <typename T>
void activation_slope(Result<T> out,         // [targets, size]; may be `relevance` itself
                      Operand<T> relevance,  // [targets, size]
                      Operand<T> x,          // [size]
                      Operand<T> y,          // [size]
                      int64_t targets, int64_t size, Stabiliser stabiliser, int threads);

}  // namespace relprop
