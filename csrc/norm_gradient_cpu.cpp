#include "norm_gradient.h"

namespace relprop {
namespace {

template <typename T>
struct Rows {
  Result<T> out;
  Operand<T> gradient, x, weight;
  int64_t targets, rows, n;
  Norm norm;
  double epsilon;

  // h = gradient weight of `count` elements of a row, in `h` or where they lie.
  RELPROP_INLINE const T* weighted(int64_t offset, int64_t at, int64_t count, T* h, T* weight_block) const {
    const T* g = gradient.read(offset + at, count, h);
    if (weight.data == nullptr) return g;
    const T* w = weight.read(at, count, weight_block);
    RELPROP_VECTORISE
    for (int64_t i = 0; i < count; ++i) h[i] = g[i] * w[i];
    return h;
  }

  RELPROP_INLINE void propagate(int64_t offset, int64_t x_offset, const RowStatistics<T>& row) const {
    T x_block[kBlock], h_block[kBlock], weight_block[kBlock], out_block[kBlock];
    double sums[kLanes] = {}, products[kLanes] = {};
    const T mean = row.mean, inverse = row.inverse;
    for (int64_t at = 0; at < n; at += kBlock) {
      const int64_t count = std::min(kBlock, n - at);
      const T* x_at = x.read(x_offset + at, count, x_block);
      const T* h = weighted(offset, at, count, h_block, weight_block);
      if (norm == Norm::kLayer) {
        add_to_lanes(sums, count, [&](int64_t i) RELPROP_INLINE_LAMBDA { return h[i]; });
      }
      add_to_lanes(products, count, [&](int64_t i) RELPROP_INLINE_LAMBDA { return h[i] * (x_at[i] - mean); });
    }
    const double size = static_cast<double>(n);
    const T mean_h = static_cast<T>(sum_of_lanes(sums) / size);
    const T slope = static_cast<T>(sum_of_lanes(products) / size * inverse * inverse);
    for (int64_t at = 0; at < n; at += kBlock) {
      const int64_t count = std::min(kBlock, n - at);
      const T* x_at = x.read(x_offset + at, count, x_block);
      const T* h = weighted(offset, at, count, h_block, weight_block);
      T* out_at = out.place(offset + at, out_block);
      RELPROP_VECTORISE
      for (int64_t i = 0; i < count; ++i) out_at[i] = inverse * (h[i] - mean_h - (x_at[i] - mean) * slope);
      out.write(offset + at, count, out_at);
    }
  }

  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      const RowStatistics<T> statistics = statistics_of_row(x, row * n, n, norm, epsilon);
      for (int64_t t = 0; t < targets; ++t) propagate((t * rows + row) * n, row * n, statistics);
    }
  }
};

}  // namespace

template <typename T>
void norm_gradient(Result<T> out, Operand<T> gradient, Operand<T> x, Operand<T> weight, int64_t targets, int64_t rows,
                   int64_t n, Norm norm, double epsilon, int threads) {
  const Rows<T> kernel{out, gradient, x, weight, targets, rows, n, norm, epsilon};
  for_ranges(kernel, rows, 4 * targets * n, threads);
}

#define RELPROP_INSTANTIATE(T)                                                                                   \
  template void norm_gradient<T>(Result<T>, Operand<T>, Operand<T>, Operand<T>, int64_t, int64_t, int64_t, Norm, \
                                 double, int);
RELPROP_INSTANTIATE(float)
RELPROP_INSTANTIATE(double)
#undef RELPROP_INSTANTIATE

}  // namespace relprop
