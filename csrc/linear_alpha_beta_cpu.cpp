#include <algorithm>

#include "linear_alpha_beta.h"
#include "parallel.h"

namespace relprop {
namespace {

template <typename T, StabiliserKind kind, bool with_beta>
struct ShareOut {
  Result<T> p1, p2;
  Operand<T> relevance, y, bias, absz;
  int64_t targets, size, n;
  T alpha, beta, tolerance, epsilon;

  // Both denominators of `count` elements; those with a bias lie in one row, and `row_bias` is its part.
  template <bool with_bias>
  RELPROP_INLINE void denominators(T* plus, T* minus, const T* y_at, const T* row_bias, const T* absz_at,
                                   int64_t count) const {
    const T eps = epsilon, tol = tolerance;  // copies, which no store can change: the loop is vectorised
    RELPROP_VECTORISE
    for (int64_t i = 0; i < count; ++i) {
      T product = y_at[i];
      if constexpr (with_bias) product -= row_bias[i];
      const T noise = tol * absz_at[i];
      const T z_plus = T(0.5) * (absz_at[i] + product);
      plus[i] = z_plus <= noise ? kNoShare<T> : stabilised<kind>(z_plus, eps);
      if constexpr (with_beta) {
        const T z_minus = T(0.5) * (product - absz_at[i]);
        minus[i] = -z_minus <= noise ? kNoShare<T> : stabilised<kind>(z_minus, eps);
      }
    }
  }

  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    T plus[kBlock], minus[with_beta ? kBlock : 1], y_block[kBlock], bias_block[kBlock], absz_block[kBlock];
    T r_block[kBlock], block1[kBlock], block2[with_beta ? kBlock : 1];
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t count = std::min(kBlock, end - at);
      const T* y_at = y.read(at, count, y_block);
      const T* absz_at = absz.read(at, count, absz_block);
      if (bias.data == nullptr) {
        denominators<false>(plus, minus, y_at, nullptr, absz_at, count);
      } else {
        for_row_parts(at, count, n, [&](int64_t i, int64_t column, int64_t run) RELPROP_INLINE_LAMBDA {
          denominators<true>(plus + i, minus + (with_beta ? i : 0), y_at + i, bias.read(column, run, bias_block),
                             absz_at + i, run);
        });
      }
      for (int64_t t = 0; t < targets; ++t) {
        const int64_t offset = t * size + at;
        const T* r = relevance.read(offset, count, r_block);
        T* out1 = p1.place(offset, block1);
        if constexpr (with_beta) {
          T* out2 = p2.place(offset, block2);
          RELPROP_VECTORISE
          for (int64_t i = 0; i < count; ++i) {
            const T share_plus = alpha * (r[i] / plus[i]);
            const T share_minus = beta * (r[i] / minus[i]);
            out1[i] = share_plus - share_minus;
            out2[i] = share_plus + share_minus;
          }
          p2.write(offset, count, out2);
        } else {
          RELPROP_VECTORISE
          for (int64_t i = 0; i < count; ++i) out1[i] = alpha * (r[i] / plus[i]);
        }
        p1.write(offset, count, out1);
      }
    }
  }
};

template <typename T>
struct Select {
  Result<T> out;
  Operand<T> x, c1, c2;
  int64_t targets, size;

  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    T x_block[kBlock], c1_block[kBlock], c2_block[kBlock], out_block[kBlock];
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t count = std::min(kBlock, end - at);
      const T* x_at = x.read(at, count, x_block);
      for (int64_t t = 0; t < targets; ++t) {
        const int64_t offset = t * size + at;
        const T* c1_at = c1.read(offset, count, c1_block);
        const T* c2_at = c2.read(offset, count, c2_block);
        T* out_at = out.place(offset, out_block);
        RELPROP_VECTORISE
        for (int64_t i = 0; i < count; ++i) {
          const T magnitude = x_at[i] < T(0) ? -x_at[i] : x_at[i];
          out_at[i] = T(0.5) * (x_at[i] * c1_at[i] + magnitude * c2_at[i]);
        }
        out.write(offset, count, out_at);
      }
    }
  }
};

}  // namespace

template <typename T>
void linear_alpha_beta_share_out(Result<T> p1, Result<T> p2, Operand<T> relevance, Operand<T> y, Operand<T> bias,
                                 Operand<T> absz, int64_t targets, int64_t rows, int64_t n, double alpha, double beta,
                                 double tolerance, Stabiliser stabiliser, int threads) {
  const int64_t size = rows * n;
  const T a = static_cast<T>(alpha), b = static_cast<T>(beta), tol = static_cast<T>(tolerance);
  const T epsilon = static_cast<T>(stabiliser.epsilon);
  with_kind(stabiliser, [&](auto kind) {
    auto run = [&](auto with_beta) {
      const ShareOut<T, decltype(kind)::value, decltype(with_beta)::value> kernel{
          p1, p2, relevance, y, bias, absz, targets, size, n, a, b, tol, epsilon};
      for_ranges(kernel, size, targets, threads);
    };
    beta == 0.0 ? run(std::false_type()) : run(std::true_type());
  });
}

template <typename T>
void linear_alpha_beta_select(Result<T> out, Operand<T> x, Operand<T> c1, Operand<T> c2, int64_t targets, int64_t size,
                              int threads) {
  for_ranges(Select<T>{out, x, c1, c2, targets, size}, size, targets, threads);
}

#define RELPROP_INSTANTIATE(T)                                                                                       \
  template void linear_alpha_beta_share_out<T>(Result<T>, Result<T>, Operand<T>, Operand<T>, Operand<T>, Operand<T>, \
                                               int64_t, int64_t, int64_t, double, double, double, Stabiliser, int);  \
  template void linear_alpha_beta_select<T>(Result<T>, Operand<T>, Operand<T>, Operand<T>, int64_t, int64_t, int);
RELPROP_INSTANTIATE(float)
RELPROP_INSTANTIATE(double)
#undef RELPROP_INSTANTIATE

}  // namespace relprop
