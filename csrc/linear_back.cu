#include "linear_back_cuda.h"
#include "multiply.cuh"

namespace relprop {
namespace {

struct Backs {
  LinearBack each[kMaxBacks];
  int64_t row_tiles[kMaxBacks];
  int count;
};

template <typename V>
__device__ __forceinline__ float selected(const LinearBack& back, float plain, float magnified, const V* x,
                                          int64_t at) {
  if (back.selection == Selection::kNone) return plain;
  const float input = to_float(x[at]);
  const float first = back.factor1 * input * plain;
  return back.selection == Selection::kInput ? first : first + back.factor2 * fabsf(input) * magnified;
}

// Blocks that follow each other read the same columns of w, for all streams and targets.
template <class M, typename V, typename S>
__global__ void __launch_bounds__(kGemmThreads)
    linear_back_kernel(Backs backs, const V* x, Matrix<V> w, int64_t rows, bool chunked) {
  RELPROP_DYNAMIC_SHARED(shared);
  int64_t row_tile = blockIdx.x;
  int which = 0;
  while (row_tile >= backs.row_tiles[which]) row_tile -= backs.row_tiles[which++];
  const LinearBack& back = backs.each[which];
  const int64_t top = row_tile * kTile, left_edge = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t all_rows = back.targets * rows, n = w.rows, k = w.columns;
  const int64_t steps = (n + M::kDepth - 1) / M::kDepth;
  const bool halves = back.selection == Selection::kHalves, two_sweeps = halves && back.p1 != back.p2;
  const Matrix<S> p1{static_cast<const S*>(back.p1), all_rows, n, n, chunked};
  const Matrix<S> p2{static_cast<const S*>(back.p2), all_rows, n, n, chunked};

  Sums plain{}, magnified{};
  const auto load = [&](S* a, V* b, int64_t step) {
    const int64_t depth = (step < steps ? step : step - steps) * M::kDepth;
    load_tile<typename M::TileA>(a, step < steps ? p1 : p2, top, depth);
    load_tile<typename M::TileB>(b, w, depth, left_edge);
  };
  const auto add = [&](int64_t step, const auto& a, const auto& b) {
    if (step < steps) M::template accumulate<Part::kWhole, Part::kWhole>(plain, a, b);
    if (halves && (!two_sweeps || step >= steps)) {
      M::template accumulate<Part::kWhole, Part::kMagnitude>(magnified, a, b);
    }
  };
  Pipeline<M>::run(shared, two_sweeps ? 2 * steps : steps, load, add);

  const auto first_row = static_cast<unsigned>(top % rows), row_count = static_cast<unsigned>(rows);
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const int64_t row = top + M::row(i), column = left_edge + M::column(i);
    if (row >= all_rows || column >= k) continue;
    const int64_t x_row = (first_row + static_cast<unsigned>(M::row(i))) % row_count;
    const float value = selected(back, plain[i], magnified[i], x, x_row * k + column);
    static_cast<S*>(back.out)[row * k + column] = from_float<S>(value);
  }
}

template <Product product, typename V, typename S>
void run_back(const LinearBack* given, int count, const V* x, const V* w, int64_t rows, int64_t n, int64_t k,
              Stream stream) {
  using M = Multiplier<product, S, V, Lies::kAcross>;
  Backs backs{};
  int64_t row_tiles = 0;
  bool chunked = true;
  for (int i = 0; i < count; ++i) {
    backs.each[i] = given[i];
    backs.row_tiles[i] = (given[i].targets * rows + kTile - 1) / kTile;
    row_tiles += backs.row_tiles[i];
    chunked = chunked && rows_are_chunked(given[i].p1, n, sizeof(S));
    if (given[i].selection == Selection::kHalves) chunked = chunked && rows_are_chunked(given[i].p2, n, sizeof(S));
  }
  const int64_t column_tiles = (k + kTile - 1) / kTile;
  if (row_tiles == 0 || column_tiles == 0) return;
  if (row_tiles > 2147483647 || column_tiles > 65535 || rows > 2147483647 - kTile) {
    throw std::invalid_argument("linear_back: expected fewer than 2^31 rows and 2^23 columns");
  }
  const Matrix<V> right{w, n, k, k, rows_are_chunked(w, k, sizeof(V))};
  launch("linear_back", linear_back_kernel<M, V, S>,
         dim3(static_cast<unsigned>(row_tiles), static_cast<unsigned>(column_tiles)), dim3(kGemmThreads),
         Pipeline<M>::kBytes, stream, backs, x, right, rows, chunked);
}

}  // namespace

void linear_back_cuda(DType values, DType streams, Product product, const LinearBack* backs, int count, const void* x,
                      const void* w, int64_t rows, int64_t n, int64_t k, Stream stream) {
  if (count < 1 || count > kMaxBacks) {
    throw std::invalid_argument("backs: expected 1 to " + std::to_string(kMaxBacks) + ", got " + std::to_string(count));
  }
  bool found = false;
#define RELPROP_BACK(value_dtype, V, stream_dtype, S, how)                                                     \
  if (values == DType::value_dtype && streams == DType::stream_dtype && product == Product::how) {             \
    found = true;                                                                                              \
    run_back<Product::how, V, S>(backs, count, static_cast<const V*>(x), static_cast<const V*>(w), rows, n, k, \
                                 stream);                                                                      \
  }
  RELPROP_BACK(kFloat32, float, kFloat32, float, kFloat32)
  RELPROP_BACK(kFloat32, float, kFloat32, float, kTFloat32)
  RELPROP_BACK(kFloat32, float, kFloat32, float, kBFloat16)
  RELPROP_BACK(kBFloat16, bfloat16, kFloat32, float, kFloat32)
  RELPROP_BACK(kBFloat16, bfloat16, kFloat32, float, kTFloat32)
  RELPROP_BACK(kBFloat16, bfloat16, kFloat32, float, kBFloat16)
  RELPROP_BACK(kBFloat16, bfloat16, kBFloat16, bfloat16, kBFloat16)
  RELPROP_BACK(kFloat16, float16, kFloat32, float, kFloat32)
  RELPROP_BACK(kFloat16, float16, kFloat32, float, kTFloat32)
  RELPROP_BACK(kFloat16, float16, kFloat16, float16, kFloat16)
#undef RELPROP_BACK
  if (!found) throw std::invalid_argument("linear_back: no kernel for this product of these dtypes");
}

}  // namespace relprop
