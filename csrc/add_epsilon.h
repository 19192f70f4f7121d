// Epsilon rule of an add y = a + b: R_a = a R / stab(a + b), R_b likewise.
// Source: Achtibat et al., ICML 2024, eq. 8.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "stabiliser.h"

namespace relprop {

template <typename T>
void add_epsilon(Result<T> relevance_a,  // [targets, batch, size] or null; may be `relevance` itself
                 Result<T> relevance_b,  // [targets, batch, size] or null; may be `relevance` itself, not `relevance_a`
                 Operand<T> relevance,   // [targets, batch, size]
                 Operand<T> a,           // [batch, size]
                 Operand<T> b,           // [b_batch, size]
                 int64_t targets, int64_t batch, int64_t b_batch,  // b_batch is batch or 1 (the same b for each)
                 int64_t size, Stabiliser stabiliser, int threads);

}  // namespace relprop
