// Softmax by its first-order Taylor expansion at the logits x: R_in = x (R - p sum(R)), p = softmax(x), sums over a
// row. Logits that are not finite (masked) count as 0. Source: Achtibat et al., ICML 2024, proposition 3.1.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace relprop {

template <typename T>
void softmax_taylor(Result<T> out,             // [targets, rows, n]; may be `relevance` itself
                    Operand<T> relevance,      // [targets, rows, n]
                    Operand<T> logits,         // [rows, n]
                    Operand<T> probabilities,  // [rows, n]
                    int64_t targets, int64_t rows, int64_t n, int threads);

}  // namespace relprop
