// Rule of a layer norm or RMS norm y of rows x in which 1 / sigma is a constant: with s = R / stab(y), h = s weight,
//     R_in = x (h - mean(h)) / sigma (RMS norm: x h / sigma).
// Source: Achtibat et al., ICML 2024, proposition 3.4, in the form of its authors' efficient implementation.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "norm_rows.h"
#include "stabiliser.h"

namespace relprop {

template <typename T>
void norm_sigma_constant(Result<T> out,         // [targets, rows, n]; may be `relevance` itself
                         Operand<T> relevance,  // [targets, rows, n]
                         Operand<T> x,          // [rows, n]
                         Operand<T> y,          // [rows, n]
                         Operand<T> weight,     // [n] or null
                         int64_t targets, int64_t rows, int64_t n, Norm norm, double epsilon, Stabiliser stabiliser,
                         int threads);

}  // namespace relprop
