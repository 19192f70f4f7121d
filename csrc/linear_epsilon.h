// Epsilon rule of a linear layer y = x w^T + b, around its matrix products: s = R / stab(z), R_in = x (s w).
// Source: Bach et al., PLoS ONE 2015; Achtibat et al., ICML 2024, eq. 8.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "stabiliser.h"

namespace relprop {

// s = R / stab(y + bias_factor bias): +1 adds a bias that y lacks, -1 takes out one that y has.
template <typename T>
void linear_epsilon_share_out(Result<T> s,           // [targets, rows, n]; may be `relevance` itself
                              Operand<T> relevance,  // [targets, rows, n]
                              Operand<T> y,          // [rows, n]
                              Operand<T> bias,       // [n] or null
                              int64_t targets, int64_t rows, int64_t n, double bias_factor, Stabiliser stabiliser,
                              int threads);

// out = x c, with c = s w.
template <typename T>
void linear_epsilon_select(Result<T> out,  // [targets, size]; may be `c` itself
                           Operand<T> x,   // [size], size = rows * k
                           Operand<T> c,   // [targets, size]
                           int64_t targets, int64_t size, int threads);

}  // namespace relprop
