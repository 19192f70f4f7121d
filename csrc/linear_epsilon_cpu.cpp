#include <algorithm>

#include "linear_epsilon.h"
#include "parallel.h"

namespace relprop {
namespace {

template <typename T, StabiliserKind kind>
struct ShareOut {
  Result<T> s;
  Operand<T> relevance, y, bias;
  int64_t targets, size, n;
  T factor, epsilon;

  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    T denominator[kBlock], y_block[kBlock], bias_block[kBlock], r_block[kBlock], s_block[kBlock];
    const T eps = epsilon, bias_factor = factor;
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t count = std::min(kBlock, end - at);
      const T* y_at = y.read(at, count, y_block);
      if (bias.data == nullptr) {
        RELPROP_VECTORISE
        for (int64_t i = 0; i < count; ++i) denominator[i] = stabilised<kind>(y_at[i], eps);
      } else {
        for_row_parts(at, count, n, [&](int64_t from, int64_t column, int64_t run) RELPROP_INLINE_LAMBDA {
          const T* row_bias = bias.read(column, run, bias_block);
          RELPROP_VECTORISE
          for (int64_t i = 0; i < run; ++i) {
            denominator[from + i] = stabilised<kind>(y_at[from + i] + bias_factor * row_bias[i], eps);
          }
        });
      }
      for (int64_t t = 0; t < targets; ++t) {
        const int64_t offset = t * size + at;
        const T* r = relevance.read(offset, count, r_block);
        T* s_at = s.place(offset, s_block);
        RELPROP_VECTORISE
        for (int64_t i = 0; i < count; ++i) s_at[i] = r[i] / denominator[i];
        s.write(offset, count, s_at);
      }
    }
  }
};

template <typename T>
struct Select {
  Result<T> out;
  Operand<T> x, c;
  int64_t targets, size;

  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    T x_block[kBlock], c_block[kBlock], out_block[kBlock];
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t count = std::min(kBlock, end - at);
      const T* x_at = x.read(at, count, x_block);
      for (int64_t t = 0; t < targets; ++t) {
        const int64_t offset = t * size + at;
        const T* c_at = c.read(offset, count, c_block);
        T* out_at = out.place(offset, out_block);
        RELPROP_VECTORISE
        for (int64_t i = 0; i < count; ++i) out_at[i] = x_at[i] * c_at[i];
        out.write(offset, count, out_at);
      }
    }
  }
};

}  // namespace

template <typename T>
void linear_epsilon_share_out(Result<T> s, Operand<T> relevance, Operand<T> y, Operand<T> bias, int64_t targets,
                              int64_t rows, int64_t n, double bias_factor, Stabiliser stabiliser, int threads) {
  const int64_t size = rows * n;
  with_kind(stabiliser, [&](auto kind) {
    const ShareOut<T, decltype(kind)::value> kernel{
        s, relevance, y, bias, targets, size, n, static_cast<T>(bias_factor), static_cast<T>(stabiliser.epsilon)};
    for_ranges(kernel, size, targets, threads);
  });
}

template <typename T>
void linear_epsilon_select(Result<T> out, Operand<T> x, Operand<T> c, int64_t targets, int64_t size, int threads) {
  for_ranges(Select<T>{out, x, c, targets, size}, size, targets, threads);
}

#define RELPROP_INSTANTIATE(T)                                                                                        \
  template void linear_epsilon_share_out<T>(Result<T>, Operand<T>, Operand<T>, Operand<T>, int64_t, int64_t, int64_t, \
                                            double, Stabiliser, int);                                                 \
  template void linear_epsilon_select<T>(Result<T>, Operand<T>, Operand<T>, int64_t, int64_t, int);
RELPROP_INSTANTIATE(float)
RELPROP_INSTANTIATE(double)
#undef RELPROP_INSTANTIATE

}  // namespace relprop
