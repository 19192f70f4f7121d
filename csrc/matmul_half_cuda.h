// Half rule of the two products of attention, O = A v and A = softmax(q k^T): the elementwise parts.
//
// With s = R_O / stab(O) and dots = q k^T (unscaled), each operand of a product takes half of its relevance:
//     R_A = A (s v^T) / 2       s' = R_A / stab(dots)       R_q = q (s' k) / 2       R_k = k (s'^T q) / 2
// Source: Chefer et al., CVPR 2021, section 3; AttnLRP (Achtibat et al., ICML 2024), proposition 3.3.
#pragma once

#include "cuda_types.h"
#include "stabiliser.h"

namespace relprop {

void matmul_half_share_cuda(DType values, DType streams,
                            void* s,                // [targets, size], streams; may be `relevance` itself
                            const void* relevance,  // [targets, size], streams
                            const void* z,          // [size], values
                            int64_t targets, int64_t size, Stabiliser stabiliser, Stream stream);

void matmul_half_attention_shares_cuda(DType values, DType streams,
                                       void* s_prime,          // [targets, size], streams; may be `sv` itself
                                       void* relevance,        // [targets, size], streams, R_A, or null; not `s_prime`
                                       const void* attention,  // [size], values; size = batch * heads * queries * keys
                                       const void* sv,         // [targets, size], streams, s v^T
                                       const void* dots,       // [size], values, q k^T
                                       int64_t targets, int64_t size, Stabiliser stabiliser, Stream stream);

}  // namespace relprop
