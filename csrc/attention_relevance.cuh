// Tiles of attention in a warp's registers: scores of 16 own rows against kOther rows, and sums of scores times rows.
//
// A warp's scores never pass through shared memory: the accumulators of one product are the left operand of the next.
// For 16-bit products the layouts agree; for tf32, whose left operand wants column t and t + 4 where accumulators hold
// 2t and 2t + 1, the summed axis is permuted, on both sides alike.
#pragma once

#include "multiply.cuh"

namespace relprop {

constexpr int kOther = 32;  // rows of the side that a block walks along

using Scores = float[kOther / 8][4];

// How tiles lie in shared memory and are multiplied. kFloat32 makes three tf32 products of the halves of each factor.
template <Product product>
struct Tiled {
  using Element = float;
  static constexpr int kStep = 8, kPadding = 4;
  static constexpr Product kBits = Product::kTFloat32;
};

template <>
struct Tiled<Product::kBFloat16> {
  using Element = bfloat16;
  static constexpr int kStep = 16, kPadding = 8;
  static constexpr Product kBits = Product::kBFloat16;
};

// c += a b, with the bits of a float in each register where elements are floats.
template <Product product>
__device__ __forceinline__ void add_product(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (product == Product::kBFloat16) {
    mma<product>(c, a, b);
  } else {
    uint32_t high_a[4], high_b[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) high_a[i] = to_tf32(__uint_as_float(a[i]));
#pragma unroll
    for (int i = 0; i < 2; ++i) high_b[i] = to_tf32(__uint_as_float(b[i]));
    if constexpr (product == Product::kFloat32) {
      uint32_t low_a[4], low_b[2];
#pragma unroll
      for (int i = 0; i < 4; ++i) low_a[i] = to_tf32(__uint_as_float(a[i]) - __uint_as_float(high_a[i]));
#pragma unroll
      for (int i = 0; i < 2; ++i) low_b[i] = to_tf32(__uint_as_float(b[i]) - __uint_as_float(high_b[i]));
      mma<Product::kTFloat32>(c, low_a, high_b);
      mma<Product::kTFloat32>(c, high_a, low_b);
    }
    mma<Product::kTFloat32>(c, high_a, high_b);
  }
}

template <Part part, Product product, int registers>
__device__ __forceinline__ void take_part(uint32_t (&to)[registers], const uint32_t (&from)[registers]) {
#pragma unroll
  for (int i = 0; i < registers; ++i) to[i] = part_of_bits<part, Tiled<product>::kBits>(from[i]);
}

template <Part part, Product product>
__device__ __forceinline__ void add_parts(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  uint32_t left[4], right[2];
  take_part<part, product>(left, a);
  take_part<part, product>(right, b);
  add_product<product>(c, left, right);
}

__device__ __forceinline__ int lane_row() { return static_cast<int>(threadIdx.x) % 32 / 4; }
__device__ __forceinline__ int lane_column() { return static_cast<int>(threadIdx.x) % 4; }

// One register from a row: two neighbouring 16-bit elements, or one float.
__device__ __forceinline__ uint32_t register_at(const bfloat16* row, int column) {
  struct alignas(4) Pair {
    bfloat16 v[2];
  };
  const Pair pair = *reinterpret_cast<const Pair*>(row + 2 * column);
  return static_cast<uint32_t>(pair.v[0].bits) | static_cast<uint32_t>(pair.v[1].bits) << 16;
}
__device__ __forceinline__ uint32_t register_at(const float* row, int column) { return __float_as_uint(row[column]); }

// scores = own other^T over `depth`; with `positive` own+ other+^T + own- other-^T. own: the warp's 16 rows.
template <Product product, bool positive>
__device__ __forceinline__ void score(Scores& scores, const typename Tiled<product>::Element* own,
                                      const typename Tiled<product>::Element* other, int stride, int depth) {
#pragma unroll
  for (int n = 0; n < kOther / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
  }
  for (int k = 0; k < depth; k += Tiled<product>::kStep) {
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = register_at(own + (lane_row() + i % 2 * 8) * stride + k, lane_column() + i / 2 * 4);
    }
#pragma unroll
    for (int n = 0; n < kOther / 8; ++n) {
      uint32_t b[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) b[i] = register_at(other + (n * 8 + lane_row()) * stride + k, lane_column() + i * 4);
      if constexpr (positive) {
        add_parts<Part::kPositive, product>(scores[n], a, b);
        add_parts<Part::kNegative, product>(scores[n], a, b);
      } else {
        add_product<product>(scores[n], a, b);
      }
    }
  }
}

// sums[16, width] += scores rows, over columns [0, columns) of `rows`, of which only a part counts.
template <Product product, Part part, int tiles>
__device__ __forceinline__ void add_rows(float (&sums)[tiles][4], const Scores& scores,
                                         const typename Tiled<product>::Element* rows, int stride, int columns) {
  constexpr bool kHalves = product == Product::kBFloat16;
#pragma unroll
  for (int k = 0; k < kOther; k += Tiled<product>::kStep) {
    uint32_t a[4];
    const int n0 = k / 8;
    if constexpr (kHalves) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = pack<bfloat16>(scores[n0 + i / 2][i % 2 * 2], scores[n0 + i / 2][i % 2 * 2 + 1]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = __float_as_uint(scores[n0][i % 2 * 2 + i / 2]);
    }
#pragma unroll
    for (int n = 0; n < tiles; n += 2) {
      if (n * 8 >= columns) continue;
      uint32_t found[4];
      if constexpr (kHalves) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        load_matrices<true>(found, rows + (k + lane % 16) * stride + n * 8 + lane / 16 * 8);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          found[i] = __float_as_uint(rows[(k + 2 * lane_column() + i % 2) * stride + (n + i / 2) * 8 + lane_row()]);
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const uint32_t b[2] = {found[2 * m], found[2 * m + 1]};
        uint32_t right[2];
        take_part<part, product>(right, b);
        add_product<product>(sums[n + m], a, right);
      }
    }
  }
}

}  // namespace relprop
