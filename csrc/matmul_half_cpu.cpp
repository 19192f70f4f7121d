#include <algorithm>

#include "matmul_half.h"
#include "parallel.h"

namespace relprop {
namespace {

template <typename T, StabiliserKind kind>
struct Share {
  T* s;
  const T *relevance, *z;
  int64_t targets, size;
  T epsilon;

  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t t = 0; t < targets; ++t) {
      const T* relevance_at = relevance + t * size;
      T* s_at = s + t * size;
      RELPROP_VECTORISE
      for (int64_t i = begin; i < end; ++i) s_at[i] = relevance_at[i] / stabilised<kind>(z[i], epsilon);
    }
  }
};

template <typename T, StabiliserKind kind>
struct AttentionShares {
  T *s_prime, *relevance;
  const T *attention, *sv, *dots;
  int64_t targets, size;
  T epsilon;

  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    T denominator[kBlock];
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t count = std::min(kBlock, end - at);
      const T* dots_at = dots + at;
      const T* attention_at = attention + at;
      RELPROP_VECTORISE
      for (int64_t i = 0; i < count; ++i) denominator[i] = stabilised<kind>(dots_at[i], epsilon);
      for (int64_t t = 0; t < targets; ++t) {
        const T* sv_at = sv + t * size + at;
        T* s_prime_at = s_prime + t * size + at;
        if (relevance != nullptr) {
          T* relevance_at = relevance + t * size + at;
          RELPROP_VECTORISE
          for (int64_t i = 0; i < count; ++i) {
            const T half = T(0.5) * attention_at[i] * sv_at[i];
            relevance_at[i] = half;
            s_prime_at[i] = half / denominator[i];
          }
        } else {
          RELPROP_VECTORISE
          for (int64_t i = 0; i < count; ++i) {
            s_prime_at[i] = T(0.5) * attention_at[i] * sv_at[i] / denominator[i];
          }
        }
      }
    }
  }
};

template <typename T>
struct RolloutMatrix {
  T* e;
  const T *grad, *relevance;
  int64_t heads, size;

  // Indices run over [samples, size]; a block may end in the next sample.
  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    T sum[kBlock];
    for (int64_t at = begin; at < end;) {
      const int64_t sample = at / size;
      const int64_t column = at - sample * size;
      const int64_t count = std::min({kBlock, end - at, size - column});
      for (int64_t i = 0; i < count; ++i) sum[i] = T(0);
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t offset = (sample * heads + head) * size + column;
        const T* grad_at = grad + offset;
        const T* relevance_at = relevance + offset;
        RELPROP_VECTORISE
        for (int64_t i = 0; i < count; ++i) {
          const T product = grad_at[i] * relevance_at[i];
          sum[i] += product < T(0) ? T(0) : product;  // in this order a NaN stays
        }
      }
      T* e_at = e + at;
      RELPROP_VECTORISE
      for (int64_t i = 0; i < count; ++i) e_at[i] = sum[i] / static_cast<T>(heads);
      at += count;
    }
  }
};

}  // namespace

template <typename T>
void matmul_half_share(T* s, const T* relevance, const T* z, int64_t targets, int64_t size, Stabiliser stabiliser,
                       int threads) {
  with_kind(stabiliser, [&](auto kind) {
    const Share<T, decltype(kind)::value> kernel{s, relevance, z, targets, size, static_cast<T>(stabiliser.epsilon)};
    for_ranges(kernel, size, targets, threads);
  });
}

template <typename T>
void matmul_half_attention_shares(T* s_prime, T* relevance, const T* attention, const T* sv, const T* dots,
                                  int64_t targets, int64_t size, Stabiliser stabiliser, int threads) {
  with_kind(stabiliser, [&](auto kind) {
    const AttentionShares<T, decltype(kind)::value> kernel{
        s_prime, relevance, attention, sv, dots, targets, size, static_cast<T>(stabiliser.epsilon)};
    for_ranges(kernel, size, targets, threads);
  });
}

template <typename T>
void matmul_half_rollout_matrix(T* e, const T* grad, const T* relevance, int64_t samples, int64_t heads, int64_t size,
                                int threads) {
  for_ranges(RolloutMatrix<T>{e, grad, relevance, heads, size}, samples * size, heads, threads);
}

#define RELPROP_INSTANTIATE(T)                                                                                      \
  template void matmul_half_share<T>(T*, const T*, const T*, int64_t, int64_t, Stabiliser, int);                    \
  template void matmul_half_attention_shares<T>(T*, T*, const T*, const T*, const T*, int64_t, int64_t, Stabiliser, \
                                                int);                                                               \
  template void matmul_half_rollout_matrix<T>(T*, const T*, const T*, int64_t, int64_t, int64_t, int);
RELPROP_INSTANTIATE(float)
RELPROP_INSTANTIATE(double)
#undef RELPROP_INSTANTIATE

}  // namespace relprop
