// The loop that the add rules without sums share: two weighted summands over one denominator.
#pragma once

#include <algorithm>

#include "dtype.h"
#include "parallel.h"

namespace relprop {

// Weigh(a, b, &weight_a, &weight_b, &denominator) gives R_a = weight_a (R / denominator), R_b likewise.
template <typename T, class Weigh>
struct AddShares {
  Result<T> relevance_a, relevance_b;
  Operand<T> relevance, a;
  Operand<T> b;  // [size], for every sample
  int64_t targets, batch, size;
  Weigh weigh;

  // Indices run over [batch, size]; a block may end in the next sample.
  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    T a_block[kBlock], b_block[kBlock], r_block[kBlock], out_block[kBlock], other_block[kBlock];
    T weight_a[kBlock], weight_b[kBlock], denominator[kBlock];
    const Weigh weights = weigh;
    for (int64_t at = begin; at < end;) {
      const int64_t column = at % size;
      const int64_t count = std::min({kBlock, end - at, size - column});
      const T* a_at = a.read(at, count, a_block);
      const T* b_at = b.read(column, count, b_block);
      RELPROP_VECTORISE
      for (int64_t i = 0; i < count; ++i) weights(a_at[i], b_at[i], &weight_a[i], &weight_b[i], &denominator[i]);
      for (int64_t t = 0; t < targets; ++t) {
        const int64_t offset = t * batch * size + at;
        const T* r = relevance.read(offset, count, r_block);
        T* out_a = relevance_a.place(offset, out_block);
        T* out_b = relevance_b.place(offset, other_block);
        RELPROP_VECTORISE
        for (int64_t i = 0; i < count; ++i) {
          const T share = r[i] / denominator[i];
          out_a[i] = weight_a[i] * share;
          out_b[i] = weight_b[i] * share;
        }
        relevance_a.write(offset, count, out_a);
        relevance_b.write(offset, count, out_b);
      }
      at += count;
    }
  }
};

template <typename T, class Weigh>
void add_shares(Result<T> relevance_a, Result<T> relevance_b, Operand<T> relevance, Operand<T> a, Operand<T> b,
                int64_t targets, int64_t batch, int64_t b_batch, int64_t size, const Weigh& weigh, int threads) {
  const int64_t rows = b_batch == batch ? 1 : batch;  // one row of all samples where they do not share b
  const int64_t length = batch * size / rows;
  const AddShares<T, Weigh> kernel{relevance_a, relevance_b, relevance, a, b, targets, rows, length, weigh};
  for_ranges(kernel, batch * size, 2 * targets, threads);
}

}  // namespace relprop
