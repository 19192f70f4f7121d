#include <algorithm>

#include "fanout_epsilon.h"
#include "parallel.h"

namespace relprop {
namespace {

template <typename T, StabiliserKind kind>
struct Fanout {
  Result<T> out;
  const Operand<T>* relevances;
  Operand<T> x;
  int64_t count, targets, size;
  T epsilon;

  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    T denominator[kBlock], sum[kBlock], x_block[kBlock], r_block[kBlock], out_block[kBlock];
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t length = std::min(kBlock, end - at);
      const T* x_at = x.read(at, length, x_block);
      RELPROP_VECTORISE
      for (int64_t i = 0; i < length; ++i) denominator[i] = stabilised<kind>(x_at[i], epsilon);
      for (int64_t t = 0; t < targets; ++t) {
        const int64_t offset = t * size + at;
        const T* first = relevances[0].read(offset, length, r_block);
        RELPROP_VECTORISE
        for (int64_t i = 0; i < length; ++i) sum[i] = first[i] / denominator[i];
        for (int64_t branch = 1; branch < count; ++branch) {
          const T* r = relevances[branch].read(offset, length, r_block);
          RELPROP_VECTORISE
          for (int64_t i = 0; i < length; ++i) sum[i] += r[i] / denominator[i];
        }
        T* out_at = out.place(offset, out_block);
        RELPROP_VECTORISE
        for (int64_t i = 0; i < length; ++i) out_at[i] = x_at[i] * sum[i];
        out.write(offset, length, out_at);
      }
    }
  }
};

}  // namespace

template <typename T>
void fanout_epsilon(Result<T> out, const Operand<T>* relevances, Operand<T> x, int64_t count, int64_t targets,
                    int64_t size, Stabiliser stabiliser, int threads) {
  with_kind(stabiliser, [&](auto kind) {
    const Fanout<T, decltype(kind)::value> kernel{
        out, relevances, x, count, targets, size, static_cast<T>(stabiliser.epsilon)};
    for_ranges(kernel, size, targets * count, threads);
  });
}

template void fanout_epsilon<float>(Result<float>, const Operand<float>*, Operand<float>, int64_t, int64_t, int64_t,
                                    Stabiliser, int);
template void fanout_epsilon<double>(Result<double>, const Operand<double>*, Operand<double>, int64_t, int64_t, int64_t,
                                     Stabiliser, int);

}  // namespace relprop
