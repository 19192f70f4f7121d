// Softmax by its first-order Taylor expansion at the input: R_in = x (R - p sum(R)), p the softmax.
// Source: Achtibat et al., ICML 2024, prop. 3.1.
#pragma once

#include "cuda_types.h"

namespace relprop {

// A logit that is not finite (masked) gets exactly 0.
void softmax_taylor_cuda(DType values, DType streams,
                         void* out,                  // [targets, rows, n], streams; may be `relevance` itself
                         const void* relevance,      // [targets, rows, n], streams
                         const void* logits,         // [rows, n], values
                         const void* probabilities,  // [rows, n], values
                         int64_t targets, int64_t rows, int64_t n, Stream stream);

}  // namespace relprop
