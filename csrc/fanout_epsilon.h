// Epsilon rule of a fan-out (one value read by several operations): R_in = x * sum_i(r_i / stab(x)).
// Where the stabiliser is exact this is the plain sum of the r_i; Chefer et al.'s code divides by x + 1e-9.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "stabiliser.h"

namespace relprop {

template <typename T>
void fanout_epsilon(Result<T> out,                 // [targets, size]; may be one of the relevances itself
                    const Operand<T>* relevances,  // [count] of them, each [targets, size]
                    Operand<T> x,                  // [size]
                    int64_t count, int64_t targets, int64_t size, Stabiliser stabiliser, int threads);

}  // namespace relprop
