// The share-out of a linear layer's rules: the products of x [rows, k] and w [n, k] that a denominator needs, and the
// rule's own part on the sums while they are in registers. No product is written to memory.
//
// On tensor cores z+ = x+ w+ + x- w- is summed as it stands: both of its products are >= 0, so nothing cancels,
// whatever the factors were rounded to. In float32 arithmetic one product of magnitudes does, with x w = y - b from the
// forward pass: z+- = (x w +- |x||w|) / 2.
#pragma once

#include "elementwise.cuh"
#include "multiply.cuh"

namespace relprop {

enum class Sought : int {
  kPlain,       // first = x w
  kMagnitudes,  // first = |x||w|
  kSupporting,  // first = x+ w+ + x- w-
  kBoth,        // and second = x+ w- + x- w+
};

// A stream in float32 or in the dtype of the layer's tensors.
template <typename V>
struct StreamArray {
  void* data;
  bool is_float;

  __device__ __forceinline__ float load(int64_t at) const {
    return is_float ? static_cast<const float*>(data)[at] : to_float(static_cast<const V*>(data)[at]);
  }
  __device__ __forceinline__ void store(int64_t at, float value) const {
    if (is_float) {
      static_cast<float*>(data)[at] = value;
    } else {
      static_cast<V*>(data)[at] = from_float<V>(value);
    }
  }
};

template <Product product>
using HowTo = std::integral_constant<Product, product>;

// Rule::denominators(first, second, column, at) turns two sums into what it divides by, and Rule::share(to, first,
// second, at) writes one target's shares; `at` is the element's place in [rows, n], and in `to` of the target.
template <class M, Sought sought, class Rule, typename V>
__global__ void __launch_bounds__(kGemmThreads) share_out_kernel(Matrix<V> x, Matrix<V> w, Rule rule) {
  RELPROP_DYNAMIC_SHARED(shared);
  const int64_t top = static_cast<int64_t>(blockIdx.x) * kTile, left_edge = static_cast<int64_t>(blockIdx.y) * kTile;
  Sums first{}, second{};
  const auto load = [&](V* a, V* b, int64_t step) {
    load_tile<typename M::TileA>(a, x, top, step * M::kDepth);
    load_tile<typename M::TileB>(b, w, left_edge, step * M::kDepth);
  };
  const auto add = [&](int64_t, const auto& a, const auto& b) {
    if constexpr (sought == Sought::kPlain) M::template accumulate<Part::kWhole, Part::kWhole>(first, a, b);
    if constexpr (sought == Sought::kMagnitudes) {
      M::template accumulate<Part::kMagnitude, Part::kMagnitude>(first, a, b);
    }
    if constexpr (sought == Sought::kSupporting || sought == Sought::kBoth) {
      M::template accumulate<Part::kPositive, Part::kPositive>(first, a, b);
      M::template accumulate<Part::kNegative, Part::kNegative>(first, a, b);
    }
    if constexpr (sought == Sought::kBoth) {
      M::template accumulate<Part::kPositive, Part::kNegative>(second, a, b);
      M::template accumulate<Part::kNegative, Part::kPositive>(second, a, b);
    }
  };
  Pipeline<M, sought == Sought::kBoth ? 1 : 4>::run(shared, (x.columns + M::kDepth - 1) / M::kDepth, load, add);

  const int64_t n = w.rows, size = x.rows * n;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const int64_t row = top + M::row(i), column = left_edge + M::column(i);
    if (row < x.rows && column < n) rule.denominators(first[i], second[i], column, row * n + column);
  }
  for (int64_t t = 0; t < rule.targets; ++t) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int64_t row = top + M::row(i), column = left_edge + M::column(i), at = row * n + column;
      if (row < x.rows && column < n) rule.share(t * size + at, first[i], second[i], at);
    }
  }
}

template <Product product, Sought sought, typename V, class Rule>
void run_share_out(const char* name, const V* x, const V* w, int64_t rows, int64_t n, int64_t k, const Rule& rule,
                   Stream stream) {
  using M = Multiplier<product, V, V, Lies::kAlong>;
  const int64_t row_tiles = (rows + kTile - 1) / kTile, column_tiles = (n + kTile - 1) / kTile;
  if (row_tiles == 0 || column_tiles == 0 || rule.targets == 0) return;
  if (row_tiles > 2147483647 || column_tiles > 65535) {
    throw std::invalid_argument(std::string(name) + ": expected fewer than 2^38 rows and 2^23 columns");
  }
  const Matrix<V> left{x, rows, k, k, rows_are_chunked(x, k, sizeof(V))};
  const Matrix<V> right{w, n, k, k, rows_are_chunked(w, k, sizeof(V))};
  launch(name, share_out_kernel<M, sought, Rule, V>,
         dim3(static_cast<unsigned>(row_tiles), static_cast<unsigned>(column_tiles)), dim3(kGemmThreads),
         Pipeline<M>::kBytes, stream, left, right, rule);
}

// Calls function(product, TypeTag<V>()) for the products that a share-out knows of a dtype.
template <class Function>
void with_share_out_types(DType values, Product product, Function&& function) {
  const auto is = [&](DType dtype, Product how) { return values == dtype && product == how; };
  if (is(DType::kFloat32, Product::kFloat32)) return function(HowTo<Product::kFloat32>(), TypeTag<float>());
  if (is(DType::kFloat32, Product::kTFloat32)) return function(HowTo<Product::kTFloat32>(), TypeTag<float>());
  if (is(DType::kFloat32, Product::kBFloat16)) return function(HowTo<Product::kBFloat16>(), TypeTag<float>());
  if (is(DType::kBFloat16, Product::kBFloat16)) return function(HowTo<Product::kBFloat16>(), TypeTag<bfloat16>());
  if (is(DType::kFloat16, Product::kFloat16)) return function(HowTo<Product::kFloat16>(), TypeTag<float16>());
  throw std::invalid_argument("linear share-out: no kernel for this product of this dtype");
}

}  // namespace relprop
