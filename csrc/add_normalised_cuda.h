// Normalised rule of a residual add y = a + b.
//
//     a' = a R / stab(a + b)                       b' likewise; all sums are per target and sample
//     fact_a = sum(R) |sum a'| / stab(|sum a'| + |sum b'|)
//     R_a = a' fact_a / stab(sum a')
// Source: Chefer et al., CVPR 2021, section 3, per sample rather than over the batch.
#pragma once

#include "cuda_types.h"
#include "stabiliser.h"

namespace relprop {

// How many float64 the kernels need to work with.
int64_t add_normalised_workspace(int64_t targets, int64_t batch, int64_t size);

// Each sample's sums are taken over pieces whose length depends on `size` alone and added in a fixed order: the same
// bits from run to run and in any batch around a sample.
void add_normalised_cuda(DType values, DType streams,
                         void* relevance_a,  // [targets, batch, size], streams; may be `relevance` itself
                         void* relevance_b,  // [targets, batch, size], streams; may be `relevance`, not `relevance_a`
                         const void* relevance,  // [targets, batch, size], streams
                         const void* a,          // [batch, size], values
                         const void* b,          // [b_batch, size], values
                         double* workspace,      // [add_normalised_workspace(targets, batch, size)]
                         int64_t targets, int64_t batch, int64_t b_batch,  // b_batch: batch or 1 (the same b for each)
                         int64_t size, Stabiliser stabiliser, Stream stream);

}  // namespace relprop
