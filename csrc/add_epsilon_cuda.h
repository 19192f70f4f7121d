// Epsilon rule of a residual add: R_a = a R / stab(a + b), R_b likewise.
// Source: Achtibat et al., ICML 2024, eq. 8.
#pragma once

#include "cuda_types.h"
#include "stabiliser.h"

namespace relprop {

void add_epsilon_cuda(DType values, DType streams,
                      void* relevance_a,      // [targets, size], streams; may be `relevance` itself
                      void* relevance_b,      // [targets, size], streams; may be `relevance` itself, not `relevance_a`
                      const void* relevance,  // [targets, size], streams
                      const void* a,          // [size], values
                      const void* b,          // [size], values
                      int64_t targets, int64_t size, Stabiliser stabiliser, Stream stream);

}  // namespace relprop
