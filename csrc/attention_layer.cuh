// One attention layer as its kernels see it: tensors by their strides, logits, and rows on the way to shared memory.
#pragma once

#include "attention_relevance.cuh"
#include "attention_relevance_cuda.h"
#include "elementwise.cuh"

namespace relprop {

// A block owns 16 rows per warp of one head and walks along the other side's rows, kOther at a time. Outputs come in
// slices of columns, so that their sums fit into registers whatever the head size.
constexpr int kThreads = 128;
constexpr int kFewThreads = 64;  // where rows are so wide that tiles for more would not fit into shared memory
constexpr size_t kMostTiles = 160 * 1024;  // that kThreads threads ask for, where a device has more

__device__ __forceinline__ int own_rows() { return static_cast<int>(blockDim.x) / 2; }

template <typename T>
struct View {
  T* data;
  int64_t target, batch, head, row;

  View(const AttentionTensor& from)
      : data(static_cast<T*>(from.data)), target(from.target), batch(from.batch), head(from.head), row(from.row) {}

  __device__ __forceinline__ T* at(int64_t t, int64_t b, int64_t h, int64_t i) const {
    return data + t * target + b * batch + h * head + i * row;
  }
};

// A stream: float32, or as the layer's tensors. Which of both is asked at every access, so that no kernel is compiled
// twice for it.
template <typename V>
struct StreamView {
  void* data;
  int64_t target, batch, head, row;
  bool single;

  StreamView(const AttentionTensor& from, DType streams)
      : data(from.data),
        target(from.target),
        batch(from.batch),
        head(from.head),
        row(from.row),
        single(streams == DType::kFloat32) {}

  __device__ __forceinline__ int64_t offset(int64_t t, int64_t b, int64_t h, int64_t i) const {
    return t * target + b * batch + h * head + i * row;
  }
  __device__ __forceinline__ float load(int64_t at) const {
    return single ? static_cast<const float*>(data)[at] : to_float(static_cast<const V*>(data)[at]);
  }
  __device__ __forceinline__ void store(int64_t at, float x) const {
    if (single) {
      static_cast<float*>(data)[at] = x;
    } else {
      static_cast<V*>(data)[at] = from_float<V>(x);
    }
  }
};

template <typename V>
struct Layer {
  int64_t targets, batch, heads, key_heads;
  int queries, keys;
  int d, dv, width;  // width: of rows in shared memory
  View<const V> q, k, v, output;
  View<const float> bias;
  View<const uint8_t> seen;
  StreamView<V> gradient, relevance, gradient_q, gradient_k, gradient_v, relevance_q, relevance_k, relevance_v;
  float scale;
  bool causal, exact_output, detached;
  bool gradient_logits, relevance_shares, gradient_map, relevance_map;
  Edge edge;
  Divisor qk_stab, av_stab;
  const float* row;
  int64_t row_target, row_batch;
  float *highest, *inverse_sum, *gradient_sums, *row_parts;  // [B, H, Nq] twice, [T, B, H, Nq], [T, B, Hk, Nk]
};

struct Head {
  int64_t t, b, h;  // h: the query head
};

__device__ __forceinline__ float hidden() { return __int_as_float(static_cast<int>(0xff800000u)); }

template <typename V>
__device__ __forceinline__ float logit(const Layer<V>& in, const Head& at, int query, int key, float dots) {
  if (query >= in.queries || key >= in.keys || (in.causal && key > query)) return hidden();
  if (in.seen.data != nullptr && in.seen.at(0, at.b, at.h, query)[key] == 0) return hidden();
  const float bias = in.bias.data != nullptr ? in.bias.at(0, at.b, at.h, query)[key] : 0.0f;
  return dots * in.scale + bias;
}

// Rows [row, row + count) of a head to shared memory; rows and columns that are not there are 0.
template <typename E, typename T>
__device__ __forceinline__ void load_rows(E* tile, int stride, const T* from, int64_t row_stride, int count,
                                          int64_t there, int width) {
  for (int i = static_cast<int>(threadIdx.x); i < count * stride; i += static_cast<int>(blockDim.x)) {
    const int r = i / stride, c = i % stride;
    tile[i] = from_float<E>(r < there && c < width ? to_float(from[r * row_stride + c]) : 0.0f);
  }
}

// A stream at the output likewise.
template <typename E, typename V>
__device__ __forceinline__ void load_stream(E* tile, int stride, const StreamView<V>& from, int64_t offset, int count,
                                            int64_t there, int width) {
  for (int i = static_cast<int>(threadIdx.x); i < count * stride; i += static_cast<int>(blockDim.x)) {
    const int r = i / stride, c = i % stride;
    tile[i] = from_float<E>(r < there && c < width ? from.load(offset + r * from.row + c) : 0.0f);
  }
}

// s = R_O / stab(O) likewise.
template <typename E, typename V>
__device__ __forceinline__ void load_shares(E* tile, int stride, const Layer<V>& in, const Head& at, int64_t row,
                                            int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count * stride; i += static_cast<int>(blockDim.x)) {
    const int r = i / stride, c = i % stride;
    float s = 0.0f;
    if (row + r < in.queries && c < in.dv) {
      s = in.relevance.load(in.relevance.offset(at.t, at.b, at.h, row + r) + c) /
          in.av_stab(to_float(in.output.at(0, at.b, at.h, row + r)[c]));
    }
    tile[i] = from_float<E>(s);
  }
}

// The sum over the four lanes that share a row of scores.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}

// Element i of column tile n: its row among the warp's 16, its column among the kOther.
__device__ __forceinline__ int score_row(int i) { return lane_row() + i / 2 * 8; }
__device__ __forceinline__ int score_column(int n, int i) { return n * 8 + lane_column() * 2 + i % 2; }
__device__ __forceinline__ int warp_row() { return static_cast<int>(threadIdx.x) / 32 * 16; }

}  // namespace relprop
