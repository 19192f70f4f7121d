#include <algorithm>

#include "activation_slope.h"
#include "parallel.h"

namespace relprop {
namespace {

template <typename T, StabiliserKind kind>
struct Slope {
  Result<T> out;
  Operand<T> relevance, x, y;
  int64_t targets, size;
  T epsilon;

  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    T factor[kBlock], denominator[kBlock], x_block[kBlock], y_block[kBlock], r_block[kBlock], out_block[kBlock];
    const T eps = epsilon;
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t count = std::min(kBlock, end - at);
      const T* x_at = x.read(at, count, x_block);
      const T* y_at = y.read(at, count, y_block);
      RELPROP_VECTORISE
      for (int64_t i = 0; i < count; ++i) {
        factor[i] = x_at[i] * (y_at[i] / stabilised<kind>(x_at[i], eps));
        denominator[i] = stabilised<kind>(y_at[i], eps);
      }
      for (int64_t t = 0; t < targets; ++t) {
        const int64_t offset = t * size + at;
        const T* r = relevance.read(offset, count, r_block);
        T* out_at = out.place(offset, out_block);
        RELPROP_VECTORISE
        for (int64_t i = 0; i < count; ++i) out_at[i] = factor[i] * (r[i] / denominator[i]);
        out.write(offset, count, out_at);
      }
    }
  }
};

}  // namespace

template <typename T>
void activation_slope(Result<T> out, Operand<T> relevance, Operand<T> x, Operand<T> y, int64_t targets, int64_t size,
                      Stabiliser stabiliser, int threads) {
  with_kind(stabiliser, [&](auto kind) {
    const Slope<T, decltype(kind)::value> kernel{
        out, relevance, x, y, targets, size, static_cast<T>(stabiliser.epsilon)};
    for_ranges(kernel, size, targets, threads);
  });
}

#define RELPROP_INSTANTIATE(T) \
  template void activation_slope<T>(Result<T>, Operand<T>, Operand<T>, Operand<T>, int64_t, int64_t, Stabiliser, int);
RELPROP_INSTANTIATE(float)
RELPROP_INSTANTIATE(double)
#undef RELPROP_INSTANTIATE

}  // namespace relprop
