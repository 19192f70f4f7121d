// Normalised rule of a residual add y = a + b.
//
//     a' = a R / stab(a + b)                       b' likewise; all sums are per target and sample
//     fact_a = sum(R) |sum a'| / stab(|sum a'| + |sum b'|)
//     R_a = a' fact_a / stab(sum a')
// Source: Chefer et al., CVPR 2021, section 3, per sample rather than over the batch.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "stabiliser.h"

namespace relprop {

// Sums are taken in float64 over pieces of fixed length and added in a fixed order: the same bits for any number of
// threads, any instruction set and any batch around a sample.
template <typename T>
void add_normalised(Result<T> relevance_a,  // [targets, batch, size]; may be `relevance` itself
                    Result<T> relevance_b,  // [targets, batch, size]; may be `relevance` itself, not `relevance_a`
                    Operand<T> relevance,   // [targets, batch, size]
                    Operand<T> a,           // [batch, size]
                    Operand<T> b,           // [b_batch, size]
                    int64_t targets, int64_t batch, int64_t b_batch,  // b_batch is batch or 1 (the same b for each)
                    int64_t size, Stabiliser stabiliser, int threads);

}  // namespace relprop
