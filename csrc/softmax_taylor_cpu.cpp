#include <algorithm>
#include <limits>

#include "parallel.h"
#include "softmax_taylor.h"
#include "sums.h"

namespace relprop {
namespace {

template <typename T>
struct Rows {
  Result<T> out;
  Operand<T> relevance, logits, probabilities;
  int64_t targets, rows, n;

  RELPROP_INLINE double row_sum(int64_t offset) const {
    T r_block[kBlock];
    double lanes[kLanes] = {};
    for (int64_t at = 0; at < n; at += kBlock) {
      const int64_t count = std::min(kBlock, n - at);
      const T* r = relevance.read(offset + at, count, r_block);
      add_to_lanes(lanes, count, [&](int64_t i) RELPROP_INLINE_LAMBDA { return r[i]; });
    }
    return sum_of_lanes(lanes);
  }

  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    T x_block[kBlock], p_block[kBlock], r_block[kBlock], out_block[kBlock];
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t t = 0; t < targets; ++t) {
        const int64_t offset = (t * rows + row) * n;
        const T sum = static_cast<T>(row_sum(offset));
        for (int64_t at = 0; at < n; at += kBlock) {
          const int64_t count = std::min(kBlock, n - at);
          const T* x = logits.read(row * n + at, count, x_block);
          const T* p = probabilities.read(row * n + at, count, p_block);
          const T* r = relevance.read(offset + at, count, r_block);
          T* out_at = out.place(offset + at, out_block);
          RELPROP_VECTORISE
          for (int64_t i = 0; i < count; ++i) {
            const T magnitude = x[i] < T(0) ? -x[i] : x[i];
            const T finite = magnitude <= std::numeric_limits<T>::max() ? x[i] : T(0);
            out_at[i] = finite * (r[i] - p[i] * sum);
          }
          out.write(offset + at, count, out_at);
        }
      }
    }
  }
};

}  // namespace

template <typename T>
void softmax_taylor(Result<T> out, Operand<T> relevance, Operand<T> logits, Operand<T> probabilities, int64_t targets,
                    int64_t rows, int64_t n, int threads) {
  for_ranges(Rows<T>{out, relevance, logits, probabilities, targets, rows, n}, rows, 2 * targets * n, threads);
}

#define RELPROP_INSTANTIATE(T) \
  template void softmax_taylor<T>(Result<T>, Operand<T>, Operand<T>, Operand<T>, int64_t, int64_t, int64_t, int);
RELPROP_INSTANTIATE(float)
RELPROP_INSTANTIATE(double)
#undef RELPROP_INSTANTIATE

}  // namespace relprop
