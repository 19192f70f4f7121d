#include <algorithm>

#include "matmul_half.h"
#include "parallel.h"

namespace relprop {
namespace {

template <typename T, StabiliserKind kind>
struct Share {
  Result<T> s;
  Operand<T> relevance, z;
  int64_t targets, size;
  T epsilon;

  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    T z_block[kBlock], r_block[kBlock], s_block[kBlock];
    const T eps = epsilon;
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t count = std::min(kBlock, end - at);
      const T* z_at = z.read(at, count, z_block);
      for (int64_t t = 0; t < targets; ++t) {
        const int64_t offset = t * size + at;
        const T* r = relevance.read(offset, count, r_block);
        T* s_at = s.place(offset, s_block);
        RELPROP_VECTORISE
        for (int64_t i = 0; i < count; ++i) s_at[i] = r[i] / stabilised<kind>(z_at[i], eps);
        s.write(offset, count, s_at);
      }
    }
  }
};

template <typename T, StabiliserKind kind>
struct AttentionShares {
  Result<T> s_prime, relevance;
  Operand<T> attention, sv, dots;
  int64_t targets, size;
  T epsilon;

  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    T denominator[kBlock], half[kBlock], a_block[kBlock], dots_block[kBlock], sv_block[kBlock], s_block[kBlock];
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t count = std::min(kBlock, end - at);
      const T* dots_at = dots.read(at, count, dots_block);
      const T* attention_at = attention.read(at, count, a_block);
      RELPROP_VECTORISE
      for (int64_t i = 0; i < count; ++i) denominator[i] = stabilised<kind>(dots_at[i], epsilon);
      for (int64_t t = 0; t < targets; ++t) {
        const int64_t offset = t * size + at;
        const T* sv_at = sv.read(offset, count, sv_block);
        T* s_prime_at = s_prime.place(offset, s_block);
        if (relevance.data != nullptr) {
          T* relevance_at = relevance.place(offset, half);
          RELPROP_VECTORISE
          for (int64_t i = 0; i < count; ++i) {
            const T part = T(0.5) * attention_at[i] * sv_at[i];
            relevance_at[i] = part;
            s_prime_at[i] = part / denominator[i];
          }
          relevance.write(offset, count, relevance_at);
        } else {
          RELPROP_VECTORISE
          for (int64_t i = 0; i < count; ++i) {
            s_prime_at[i] = T(0.5) * attention_at[i] * sv_at[i] / denominator[i];
          }
        }
        s_prime.write(offset, count, s_prime_at);
      }
    }
  }
};

template <typename T>
struct RolloutMatrix {
  Result<T> e;
  Operand<T> grad, relevance;
  int64_t heads, size;

  // Indices run over [samples, size]; a block may end in the next sample.
  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    T sum[kBlock], grad_block[kBlock], r_block[kBlock], e_block[kBlock];
    for (int64_t at = begin; at < end;) {
      const int64_t sample = at / size;
      const int64_t column = at - sample * size;
      const int64_t count = std::min({kBlock, end - at, size - column});
      for (int64_t i = 0; i < count; ++i) sum[i] = T(0);
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t offset = (sample * heads + head) * size + column;
        const T* grad_at = grad.read(offset, count, grad_block);
        const T* relevance_at = relevance.read(offset, count, r_block);
        RELPROP_VECTORISE
        for (int64_t i = 0; i < count; ++i) {
          const T product = grad_at[i] * relevance_at[i];
          sum[i] += product < T(0) ? T(0) : product;  // in this order a NaN stays
        }
      }
      T* e_at = e.place(at, e_block);
      RELPROP_VECTORISE
      for (int64_t i = 0; i < count; ++i) e_at[i] = sum[i] / static_cast<T>(heads);
      e.write(at, count, e_at);
      at += count;
    }
  }
};

}  // namespace

template <typename T>
void matmul_half_share(Result<T> s, Operand<T> relevance, Operand<T> z, int64_t targets, int64_t size,
                       Stabiliser stabiliser, int threads) {
  with_kind(stabiliser, [&](auto kind) {
    const Share<T, decltype(kind)::value> kernel{s, relevance, z, targets, size, static_cast<T>(stabiliser.epsilon)};
    for_ranges(kernel, size, targets, threads);
  });
}

template <typename T>
void matmul_half_attention_shares(Result<T> s_prime, Result<T> relevance, Operand<T> attention, Operand<T> sv,
                                  Operand<T> dots, int64_t targets, int64_t size, Stabiliser stabiliser, int threads) {
  with_kind(stabiliser, [&](auto kind) {
    const AttentionShares<T, decltype(kind)::value> kernel{
        s_prime, relevance, attention, sv, dots, targets, size, static_cast<T>(stabiliser.epsilon)};
    for_ranges(kernel, size, targets, threads);
  });
}

template <typename T>
void matmul_half_rollout_matrix(Result<T> e, Operand<T> grad, Operand<T> relevance, int64_t samples, int64_t heads,
                                int64_t size, int threads) {
  for_ranges(RolloutMatrix<T>{e, grad, relevance, heads, size}, samples * size, heads, threads);
}

#define RELPROP_INSTANTIATE(T)                                                                                     \
  template void matmul_half_share<T>(Result<T>, Operand<T>, Operand<T>, int64_t, int64_t, Stabiliser, int);        \
  template void matmul_half_attention_shares<T>(Result<T>, Result<T>, Operand<T>, Operand<T>, Operand<T>, int64_t, \
                                                int64_t, Stabiliser, int);                                         \
  template void matmul_half_rollout_matrix<T>(Result<T>, Operand<T>, Operand<T>, int64_t, int64_t, int64_t, int);
RELPROP_INSTANTIATE(float)
RELPROP_INSTANTIATE(double)
#undef RELPROP_INSTANTIATE

}  // namespace relprop
