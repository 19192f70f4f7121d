// One step of the rollout's row walk: c <- c + c E, E = mean over heads of (gradient * R_A)+, without E in memory.
// Source: Chefer et al., CVPR 2021, section 3.
#pragma once

#include "cuda_types.h"

namespace relprop {

void rollout_row_cuda(DType streams,
                      float* out,             // [samples, keys]; may be `row` itself; samples = targets * batch
                      const float* row,       // [samples, keys], c
                      const float* queried,   // [samples, queries], the entries of c that have a row in E; not `out`
                      const void* gradient,   // [samples, heads, queries, keys], streams, or null (a plain sum of R_A+)
                      const void* relevance,  // [samples, heads, queries, keys], streams, R_A
                      int64_t samples, int64_t heads, int64_t queries, int64_t keys, Stream stream);

}  // namespace relprop
