#include "add_epsilon.h"
#include "add_shares.h"

namespace relprop {
namespace {

template <typename T, StabiliserKind kind>
struct Plain {
  T epsilon;

  RELPROP_INLINE void operator()(T a, T b, T* weight_a, T* weight_b, T* denominator) const {
    *weight_a = a;
    *weight_b = b;
    *denominator = stabilised<kind>(a + b, epsilon);
  }
};

}  // namespace

template <typename T>
void add_epsilon(Result<T> relevance_a, Result<T> relevance_b, Operand<T> relevance, Operand<T> a, Operand<T> b,
                 int64_t targets, int64_t batch, int64_t b_batch, int64_t size, Stabiliser stabiliser, int threads) {
  with_kind(stabiliser, [&](auto kind) {
    const Plain<T, decltype(kind)::value> weigh{static_cast<T>(stabiliser.epsilon)};
    add_shares(relevance_a, relevance_b, relevance, a, b, targets, batch, b_batch, size, weigh, threads);
  });
}

#define RELPROP_INSTANTIATE(T)                                                                                      \
  template void add_epsilon<T>(Result<T>, Result<T>, Operand<T>, Operand<T>, Operand<T>, int64_t, int64_t, int64_t, \
                               int64_t, Stabiliser, int);
RELPROP_INSTANTIATE(float)
RELPROP_INSTANTIATE(double)
#undef RELPROP_INSTANTIATE

}  // namespace relprop
