#include "add_gamma.h"
#include "add_shares.h"

namespace relprop {
namespace {

template <typename T, StabiliserKind kind>
struct Favoured {
  T epsilon, favoured;  // favoured: 1 + gamma

  RELPROP_INLINE void operator()(T a, T b, T* weight_a, T* weight_b, T* denominator) const {
    const T total = a + b;
    const T part_a = a * total > T(0) ? favoured * a : a;
    const T part_b = b * total > T(0) ? favoured * b : b;
    const bool cancelled = total == T(0);
    *weight_a = cancelled ? T(0.5) : part_a;
    *weight_b = cancelled ? T(0.5) : part_b;
    const T stable = stabilised<kind>(part_a + part_b, epsilon);
    *denominator = cancelled ? T(1) : stable;
  }
};

}  // namespace

template <typename T>
void add_gamma(Result<T> relevance_a, Result<T> relevance_b, Operand<T> relevance, Operand<T> a, Operand<T> b,
               int64_t targets, int64_t batch, int64_t b_batch, int64_t size, double gamma, Stabiliser stabiliser,
               int threads) {
  with_kind(stabiliser, [&](auto kind) {
    const Favoured<T, decltype(kind)::value> weigh{static_cast<T>(stabiliser.epsilon), static_cast<T>(1.0 + gamma)};
    add_shares(relevance_a, relevance_b, relevance, a, b, targets, batch, b_batch, size, weigh, threads);
  });
}

#define RELPROP_INSTANTIATE(T)                                                                                    \
  template void add_gamma<T>(Result<T>, Result<T>, Operand<T>, Operand<T>, Operand<T>, int64_t, int64_t, int64_t, \
                             int64_t, double, Stabiliser, int);
RELPROP_INSTANTIATE(float)
RELPROP_INSTANTIATE(double)
#undef RELPROP_INSTANTIATE

}  // namespace relprop
