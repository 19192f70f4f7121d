// Half rule of the two products of attention, O = A v and A = softmax(q k^T): the elementwise parts.
//
// With s = R_O / stab(O) and dots = q k^T (unscaled), each operand of a product takes half of its relevance:
//     R_A = A (s v^T) / 2       s' = R_A / stab(dots)       R_q = q (s' k) / 2       R_k = k (s'^T q) / 2
// and the read-out of a block is E = mean over heads of (grad_A R_A)+.
// Source: Chefer et al., CVPR 2021, section 3; AttnLRP (Achtibat et al., ICML 2024), proposition 3.3.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "stabiliser.h"

namespace relprop {

template <typename T>
void matmul_half_share(Result<T> s,           // [targets, size]; may be `relevance` itself
                       Operand<T> relevance,  // [targets, size], R_O
                       Operand<T> z,          // [size], O
                       int64_t targets, int64_t size, Stabiliser stabiliser, int threads);

template <typename T>
void matmul_half_attention_shares(Result<T> s_prime,     // [targets, size]; may be `sv` itself
                                  Result<T> relevance,   // [targets, size], R_A, or null; as s_prime, not both
                                  Operand<T> attention,  // [size], A; size = batch * heads * queries * keys
                                  Operand<T> sv,         // [targets, size], s v^T
                                  Operand<T> dots,       // [size], q k^T
                                  int64_t targets, int64_t size, Stabiliser stabiliser, int threads);

template <typename T>
void matmul_half_rollout_matrix(Result<T> e,           // [samples, size]; samples = targets * batch
                                Operand<T> grad,       // [samples, heads, size]; size = queries * keys
                                Operand<T> relevance,  // [samples, heads, size], R_A
                                int64_t samples, int64_t heads, int64_t size, int threads);

}  // namespace relprop
