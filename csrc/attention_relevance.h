// Relevance and gradient of attention O = softmax(scale q k^T + mask) v in tiles: no tensor of queries times keys.
//
// With A the probabilities, dots = q k^T (unscaled) and s = R_O / stab(O):
//     grad_A = dO v^T           dS = A (grad_A - sum(A grad_A))      dq = scale dS k, dk = scale dS^T q, dv = A^T dO
//     R_A = A (s v^T) / 2       s' = R_A / stab(dots)
//     R_q = q (s' k) / 2        R_k = k (s'^T q) / 2                 R_v = v (A^T s) / 2
// and the walk through a layer is row_out[j] = sum over i of row[i] E[i, j], E = mean over heads of (edge)+.
// Source: Chefer et al., CVPR 2021, section 3; AttnLRP (Achtibat et al., ICML 2024), proposition 3.3; tiles as in
// FlashAttention (Dao et al., NeurIPS 2022).
#pragma once

#include <cstdint>

#include "dtype.h"
#include "stabiliser.h"

namespace relprop {

// How relevance of A passes to q and k.
enum class QkRule : int {
  kHalf = 0,      // shares of q k^T
  kPositive = 1,  // shares of z+ = q+ k+^T + q- k-^T, 0 where that is 0: R_q = (q+ (s' k+) + q- (s' k-)) / 2
  kDetached = 2,  // none; v gets the whole of R_O
};

// What an entry of a layer's token-to-token matrix is made of; all but the last are cut at zero in each head.
enum class Edge : int {
  kNone = 0,
  kGradientRelevance = 1,
  kGradientAttention = 2,
  kRelevance = 3,
  kAttention = 4,
};

// Tensors by their strides (in elements); the last axis is contiguous. No data where one is absent.

// One that is read: of type T or of a half precision.
template <typename T>
struct Source {  // [targets, batch, heads, rows, width], without targets for the layer's own
  const void* data = nullptr;
  Widen<T> widen = nullptr;  // from a half precision
  int64_t target = 0, batch = 0, head = 0, row = 0;

  // Row i where elements are of type T.
  const T* at(int64_t b, int64_t h, int64_t i, int64_t t = 0) const {
    return static_cast<const T*>(data) + offset(b, h, i, t);
  }
  // Elements [begin, begin + count) of row i: the tensor's own memory where they are of type T, else `buffer`, filled.
  const T* read(int64_t b, int64_t h, int64_t i, int64_t begin, int64_t count, T* buffer, int64_t t = 0) const {
    if (widen == nullptr) return at(b, h, i, t) + begin;
    widen(buffer, data, offset(b, h, i, t) + begin, count);
    return buffer;
  }
  explicit operator bool() const { return data != nullptr; }

 private:
  int64_t offset(int64_t b, int64_t h, int64_t i, int64_t t) const {
    return t * target + b * batch + h * head + i * row;
  }
};

// Flags, one byte each.
struct Flags {  // [batch, heads, queries, keys]
  const uint8_t* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;

  const uint8_t* at(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i * row; }
  explicit operator bool() const { return data != nullptr; }
};

// One that is written.
template <typename T>
struct TargetHeads {  // [targets, batch, heads, rows, width]
  T* data = nullptr;
  int64_t target = 0, batch = 0, head = 0, row = 0;

  T* at(int64_t t, int64_t b, int64_t h, int64_t i) const { return data + t * target + b * batch + h * head + i * row; }
  explicit operator bool() const { return data != nullptr; }
};

template <typename T>
struct AttentionRelevance {
  int64_t targets, batch, heads, key_heads, queries, keys, d, dv;
  int64_t row_targets;  // of row and row_out: `targets`, or any number for Edge::kAttention

  Source<T> q, k, v, output;  // output: needed for relevance, and where exact_output is set
  Source<T> bias;             // added to the logits; axes of stride 0 broadcast
  Flags seen;                 // which keys a query sees; axes of stride 0 broadcast
  double scale;
  bool causal;        // query i sees keys up to i
  bool exact_output;  // output is of type T and not rounded to less, so that sum(A grad_A) is dO output

  Source<T> gradient, relevance;                         // dO, R_O
  TargetHeads<T> gradient_q, gradient_k, gradient_v;     // dq, dk, dv
  TargetHeads<T> relevance_q, relevance_k, relevance_v;  // R_q, R_k, R_v
  const T* row;                                          // [row_targets, batch, queries]
  int64_t row_target, row_batch;                         // strides of row
  T* row_out;                                            // [row_targets, batch, keys], contiguous

  QkRule qk;
  Edge edge;
  Stabiliser qk_stabiliser, av_stabiliser;
};

// Accumulates in T, in an order that the sizes alone decide: the same bits for any number of threads.
template <typename T>
void attention_relevance(const AttentionRelevance<T>& arguments, int threads);

}  // namespace relprop
