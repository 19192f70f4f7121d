#include <algorithm>

#include "linear_gamma.h"
#include "parallel.h"

namespace relprop {
namespace {

template <typename T, StabiliserKind kind>
struct ShareOut {
  Result<T> p1, p2;
  Operand<T> relevance, y, bias, absz;
  int64_t targets, size, n;
  T gamma, biased, bias_share, epsilon;  // biased, bias_share: 0 or 1

  // Denominators and signs of `count` elements; row_bias is null or as long.
  template <bool with_bias>
  RELPROP_INLINE void denominators(T* denominator, T* sign, const T* y_at, const T* row_bias, const T* absz_at,
                                   int64_t count) const {
    const T half_gamma = T(0.5) * gamma, full_gamma = gamma, inside = biased, share = bias_share, eps = epsilon;
    RELPROP_VECTORISE
    for (int64_t i = 0; i < count; ++i) {
      const T b = with_bias ? row_bias[i] : T(0);
      const T product = y_at[i] - inside * b;
      const T sum = product + b;
      const T direction = sum > T(0) ? T(1) : (sum < T(0) ? T(-1) : T(0));
      const T agreeing = (b > T(0)) == (sum > T(0)) ? b : T(0);
      const T z = product + half_gamma * (product + direction * absz_at[i]) + share * (b + full_gamma * agreeing);
      denominator[i] = direction == T(0) ? kNoShare<T> : stabilised<kind>(z, eps);
      sign[i] = direction;
    }
  }

  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    T denominator[kBlock], sign[kBlock], y_block[kBlock], bias_block[kBlock], absz_block[kBlock];
    T r_block[kBlock], block1[kBlock], block2[kBlock];
    const T plain = T(2) + gamma, favoured = gamma;
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t count = std::min(kBlock, end - at);
      const T* y_at = y.read(at, count, y_block);
      const T* absz_at = absz.read(at, count, absz_block);
      if (bias.data == nullptr) {
        denominators<false>(denominator, sign, y_at, nullptr, absz_at, count);
      } else {
        for_row_parts(at, count, n, [&](int64_t i, int64_t column, int64_t run) RELPROP_INLINE_LAMBDA {
          denominators<true>(denominator + i, sign + i, y_at + i, bias.read(column, run, bias_block), absz_at + i, run);
        });
      }
      for (int64_t t = 0; t < targets; ++t) {
        const int64_t offset = t * size + at;
        const T* r = relevance.read(offset, count, r_block);
        T* out1 = p1.place(offset, block1);
        T* out2 = p2.place(offset, block2);
        RELPROP_VECTORISE
        for (int64_t i = 0; i < count; ++i) {
          const T s = r[i] / denominator[i];
          out1[i] = plain * s;
          out2[i] = favoured * s * sign[i];
        }
        p1.write(offset, count, out1);
        p2.write(offset, count, out2);
      }
    }
  }
};

}  // namespace

template <typename T>
void linear_gamma_share_out(Result<T> p1, Result<T> p2, Operand<T> relevance, Operand<T> y, Operand<T> bias,
                            Operand<T> absz, int64_t targets, int64_t rows, int64_t n, double gamma, bool biased,
                            bool bias_share, Stabiliser stabiliser, int threads) {
  const int64_t size = rows * n;
  const T factor = static_cast<T>(gamma), epsilon = static_cast<T>(stabiliser.epsilon);
  with_kind(stabiliser, [&](auto kind) {
    const ShareOut<T, decltype(kind)::value> kernel{p1,   p2, relevance, y,         bias,          absz,   targets,
                                                    size, n,  factor,    T(biased), T(bias_share), epsilon};
    for_ranges(kernel, size, targets, threads);
  });
}

#define RELPROP_INSTANTIATE(T)                                                                                  \
  template void linear_gamma_share_out<T>(Result<T>, Result<T>, Operand<T>, Operand<T>, Operand<T>, Operand<T>, \
                                          int64_t, int64_t, int64_t, double, bool, bool, Stabiliser, int);
RELPROP_INSTANTIATE(float)
RELPROP_INSTANTIATE(double)
#undef RELPROP_INSTANTIATE

}  // namespace relprop
