// Alpha-beta rule of a linear layer y = x w^T + b, around its matrix products.
//
// With |x|, |w| elementwise, x+ w+ + x- w- = (x w + |x||w|) / 2 and x+ w- + x- w+ = (x w - |x||w|) / 2, so both
// denominators follow from y and absz = |x||w|^T:
//     z+ = (absz + (y - b)) / 2 >= 0        z- = ((y - b) - absz) / 2 <= 0
// With s+ = R / stab(z+), s- = R / stab(z-), p1 = alpha s+ - beta s-, p2 = alpha s+ + beta s-, the way back is
//     R_in = alpha (x+ (s+ w+) + x- (s+ w-)) - beta (x+ (s- w-) + x- (s- w+)) = (x (p1 w) + |x| (p2 |w|)) / 2
// Source: Chefer et al., CVPR 2021, section 3, for the rule.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "stabiliser.h"

namespace relprop {

// The shares p1, p2. A z+ or -z- that is not above tolerance * absz is rounding noise and counts as 0: its share is 0.
// With beta = 0, p1 = p2: only p1 is written.
template <typename T>
void linear_alpha_beta_share_out(Result<T> p1,          // [targets, rows, n]; may be `relevance` itself
                                 Result<T> p2,          // [targets, rows, n], unused with beta = 0; as p1
                                 Operand<T> relevance,  // [targets, rows, n]
                                 Operand<T> y,          // [rows, n], with the bias
                                 Operand<T> bias,       // [n] or null
                                 Operand<T> absz,       // [rows, n], without the bias
                                 int64_t targets, int64_t rows, int64_t n, double alpha, double beta, double tolerance,
                                 Stabiliser stabiliser, int threads);

// out = (x c1 + |x| c2) / 2, with c1 = p1 w and c2 = p2 |w|.
template <typename T>
void linear_alpha_beta_select(Result<T> out,  // [targets, size]; may be `c1` or `c2` itself
                              Operand<T> x,   // [size], size = rows * k
                              Operand<T> c1,  // [targets, size]
                              Operand<T> c2,  // [targets, size]
                              int64_t targets, int64_t size, int threads);

}  // namespace relprop
