#include "norm_sigma_constant.h"

namespace relprop {
namespace {

template <typename T, StabiliserKind kind>
struct Rows {
  Result<T> out;
  Operand<T> relevance, x, y, weight;
  int64_t targets, rows, n;
  Norm norm;
  double epsilon;
  T stabiliser_epsilon;

  // h = R weight / stab(y) of `count` elements of a row.
  RELPROP_INLINE void shares(T* h, int64_t offset, int64_t y_offset, int64_t at, int64_t count) const {
    T r_block[kBlock], y_block[kBlock], weight_block[kBlock];
    const T eps = stabiliser_epsilon;
    const T* r = relevance.read(offset + at, count, r_block);
    const T* y_at = y.read(y_offset + at, count, y_block);
    RELPROP_VECTORISE
    for (int64_t i = 0; i < count; ++i) h[i] = r[i] / stabilised<kind>(y_at[i], eps);
    if (weight.data == nullptr) return;
    const T* w = weight.read(at, count, weight_block);
    RELPROP_VECTORISE
    for (int64_t i = 0; i < count; ++i) h[i] *= w[i];
  }

  RELPROP_INLINE T mean_share(int64_t offset, int64_t y_offset) const {
    T h[kBlock];
    double lanes[kLanes] = {};
    for (int64_t at = 0; at < n; at += kBlock) {
      const int64_t count = std::min(kBlock, n - at);
      shares(h, offset, y_offset, at, count);
      add_to_lanes(lanes, count, [&](int64_t i) RELPROP_INLINE_LAMBDA { return h[i]; });
    }
    return static_cast<T>(sum_of_lanes(lanes) / static_cast<double>(n));
  }

  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    T h[kBlock], x_block[kBlock], out_block[kBlock];
    for (int64_t row = begin; row < end; ++row) {
      const int64_t x_offset = row * n;
      const T inverse = statistics_of_row(x, x_offset, n, norm, epsilon).inverse;
      for (int64_t t = 0; t < targets; ++t) {
        const int64_t offset = (t * rows + row) * n;
        const T mean = norm == Norm::kLayer ? mean_share(offset, x_offset) : T(0);
        for (int64_t at = 0; at < n; at += kBlock) {
          const int64_t count = std::min(kBlock, n - at);
          shares(h, offset, x_offset, at, count);
          const T* x_at = x.read(x_offset + at, count, x_block);
          T* out_at = out.place(offset + at, out_block);
          RELPROP_VECTORISE
          for (int64_t i = 0; i < count; ++i) out_at[i] = x_at[i] * (inverse * (h[i] - mean));
          out.write(offset + at, count, out_at);
        }
      }
    }
  }
};

}  // namespace

template <typename T>
void norm_sigma_constant(Result<T> out, Operand<T> relevance, Operand<T> x, Operand<T> y, Operand<T> weight,
                         int64_t targets, int64_t rows, int64_t n, Norm norm, double epsilon, Stabiliser stabiliser,
                         int threads) {
  with_kind(stabiliser, [&](auto kind) {
    const Rows<T, decltype(kind)::value> kernel{
        out, relevance, x, y, weight, targets, rows, n, norm, epsilon, static_cast<T>(stabiliser.epsilon)};
    for_ranges(kernel, rows, 4 * targets * n, threads);
  });
}

#define RELPROP_INSTANTIATE(T)                                                                                      \
  template void norm_sigma_constant<T>(Result<T>, Operand<T>, Operand<T>, Operand<T>, Operand<T>, int64_t, int64_t, \
                                       int64_t, Norm, double, Stabiliser, int);
RELPROP_INSTANTIATE(float)
RELPROP_INSTANTIATE(double)
#undef RELPROP_INSTANTIATE

}  // namespace relprop
