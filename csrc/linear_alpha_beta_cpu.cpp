#include <algorithm>

#include "linear_alpha_beta.h"
#include "parallel.h"

namespace relprop {
namespace {

template <typename T, StabiliserKind kind, bool with_beta>
struct ShareOut {
  T *p1, *p2;
  const T *relevance, *y, *bias, *absz;
  int64_t targets, size, n;
  T alpha, beta, tolerance, epsilon;

  // Denominators of `count` elements from `begin` on; with a bias they lie in one row and `row_bias` is its part.
  template <bool with_bias>
  RELPROP_INLINE void denominators(T* plus, T* minus, int64_t begin, int64_t count, const T* row_bias) const {
    const T* y_at = y + begin;
    const T* absz_at = absz + begin;
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
    T plus[kBlock];
    T minus[with_beta ? kBlock : 1];
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t count = std::min(kBlock, end - at);
      if (bias == nullptr) {
        denominators<false>(plus, minus, at, count, nullptr);
      } else {
        for (int64_t i = 0; i < count;) {
          const int64_t column = (at + i) % n;
          const int64_t run = std::min(count - i, n - column);
          denominators<true>(plus + i, minus + (with_beta ? i : 0), at + i, run, bias + column);
          i += run;
        }
      }
      for (int64_t t = 0; t < targets; ++t) {
        const T* r = relevance + t * size + at;
        T* out1 = p1 + t * size + at;
        if constexpr (with_beta) {
          T* out2 = p2 + t * size + at;
          RELPROP_VECTORISE
          for (int64_t i = 0; i < count; ++i) {
            const T share_plus = alpha * (r[i] / plus[i]);
            const T share_minus = beta * (r[i] / minus[i]);
            out1[i] = share_plus - share_minus;
            out2[i] = share_plus + share_minus;
          }
        } else {
          RELPROP_VECTORISE
          for (int64_t i = 0; i < count; ++i) out1[i] = alpha * (r[i] / plus[i]);
        }
      }
    }
  }
};

template <typename T>
struct Select {
  T* out;
  const T *x, *c1, *c2;
  int64_t targets, size;

  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t count = std::min(kBlock, end - at);
      const T* x_at = x + at;
      for (int64_t t = 0; t < targets; ++t) {
        const T* c1_at = c1 + t * size + at;
        const T* c2_at = c2 + t * size + at;
        T* out_at = out + t * size + at;
        RELPROP_VECTORISE
        for (int64_t i = 0; i < count; ++i) {
          const T magnitude = x_at[i] < T(0) ? -x_at[i] : x_at[i];
          out_at[i] = T(0.5) * (x_at[i] * c1_at[i] + magnitude * c2_at[i]);
        }
      }
    }
  }
};

}  // namespace

template <typename T>
void linear_alpha_beta_share_out(T* p1, T* p2, const T* relevance, const T* y, const T* bias, const T* absz,
                                 int64_t targets, int64_t rows, int64_t n, double alpha, double beta, double tolerance,
                                 Stabiliser stabiliser, int threads) {
  const int64_t size = rows * n;
  with_kind(stabiliser, [&](auto kind) {
    auto run = [&](auto with_beta) {
      const ShareOut<T, decltype(kind)::value, decltype(with_beta)::value> kernel{p1,
                                                                                  p2,
                                                                                  relevance,
                                                                                  y,
                                                                                  bias,
                                                                                  absz,
                                                                                  targets,
                                                                                  size,
                                                                                  n,
                                                                                  static_cast<T>(alpha),
                                                                                  static_cast<T>(beta),
                                                                                  static_cast<T>(tolerance),
                                                                                  static_cast<T>(stabiliser.epsilon)};
      for_ranges(kernel, size, targets, threads);
    };
    beta == 0.0 ? run(std::false_type()) : run(std::true_type());
  });
}

template <typename T>
void linear_alpha_beta_select(T* out, const T* x, const T* c1, const T* c2, int64_t targets, int64_t size,
                              int threads) {
  for_ranges(Select<T>{out, x, c1, c2, targets, size}, size, targets, threads);
}

#define RELPROP_INSTANTIATE(T)                                                                                   \
  template void linear_alpha_beta_share_out<T>(T*, T*, const T*, const T*, const T*, const T*, int64_t, int64_t, \
                                               int64_t, double, double, double, Stabiliser, int);                \
  template void linear_alpha_beta_select<T>(T*, const T*, const T*, const T*, int64_t, int64_t, int);
RELPROP_INSTANTIATE(float)
RELPROP_INSTANTIATE(double)
#undef RELPROP_INSTANTIATE

}  // namespace relprop
