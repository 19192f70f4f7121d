// Gradient of a layer norm or RMS norm over rows, from x alone: the row's statistics are taken again.
//
//     h = gradient weight     u = (x - mean) / sigma (RMS norm: x / sigma)
//     out = (h - mean(h) - u mean(h u)) / sigma (RMS norm: without mean(h))
#pragma once

#include <cstdint>

#include "dtype.h"
#include "norm_rows.h"

namespace relprop {

template <typename T>
void norm_gradient(Result<T> out,        // [targets, rows, n]; may be `gradient` itself
                   Operand<T> gradient,  // [targets, rows, n]
                   Operand<T> x,         // [rows, n]
                   Operand<T> weight,    // [n] or null
                   int64_t targets, int64_t rows, int64_t n, Norm norm, double epsilon, int threads);

}  // namespace relprop
