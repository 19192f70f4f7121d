#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "attention_relevance.h"
#include "parallel.h"

#if RELPROP_X86
#include <immintrin.h>
#endif

#define RELPROP_UNROLL _Pragma("GCC unroll 16")

namespace relprop {
namespace {

// A tile: kRows queries by kKeys keys. Buffers hold whole lanes, the same for every instruction set.
constexpr int64_t kRows = 48;
constexpr int64_t kKeys = 192;
constexpr int64_t kLanes = 16;

// Tasks that a call is cut into, if its heads are fewer: their number must not depend on the number of threads, which
// would change the order of sums, nor grow with the sequence, as each has key-side sums of its own.
constexpr int64_t kTasks = 16;

constexpr int64_t whole_lanes(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

template <typename T>
constexpr T kHidden = -std::numeric_limits<T>::infinity();

template <typename T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  using Bits = uint32_t;
  static constexpr float lowest = -87.0f, round = 12582912.0f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr int degree = 7, bias = 127, mantissa = 23;
  static constexpr float inverse_factorial[] = {1.0f,      1.0f,       1.0f / 2,   1.0f / 6,
                                                1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040};
};

template <>
struct ExpConstants<double> {
  using Bits = uint64_t;
  static constexpr double lowest = -708.0, round = 6755399441055744.0, ln2_high = 6.93145751953125e-1,
                          ln2_low = 1.42860682030941723212e-6;
  static constexpr int degree = 13, bias = 1023, mantissa = 52;
  static constexpr double inverse_factorial[] = {
      1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
      1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
};

// What a call computes, how it is cut into tasks, and where a thread's buffers begin (in elements).
template <typename T>
struct Layout {
  bool streams, edge, positive;
  bool gradient_map, gradient_logits, relevance_map, relevance_shares;
  bool pack_k, pack_q, pack_gradient;  // to rows of whole lanes of type T
  int64_t groups, row_blocks, key_blocks, chunks, tasks;
  int64_t d_padded, dv_padded, qk_width;

  int64_t room_size = 0, sums_size = 0, row_part_size = 0, query_sums_size = 0;
  int64_t k_transposed, v_transposed, k_rows, v_rows, k_signed, k_signed_transposed;
  int64_t q_rows, q_signed, gradient_rows, shares, dots, attention, to_attention, share, positive_dots, output;
  int64_t output_row, highest, inverse_sum, gradient_sums, row_weights, query_sums, gradient_q, relevance_q, own_sums;
  int64_t gradient_k, gradient_v, relevance_k, relevance_v;

  explicit Layout(const AttentionRelevance<T>& in) {
    const bool through_qk = in.qk != QkRule::kDetached;
    edge = in.edge != Edge::kNone;
    streams = in.gradient || in.relevance;
    relevance_shares = through_qk && (in.relevance_q || in.relevance_k);
    positive = relevance_shares && in.qk == QkRule::kPositive;
    relevance_map = relevance_shares || in.edge == Edge::kGradientRelevance || in.edge == Edge::kRelevance;
    gradient_logits = in.gradient_q || in.gradient_k;
    gradient_map = gradient_logits || in.edge == Edge::kGradientRelevance || in.edge == Edge::kGradientAttention;
    groups = in.heads / in.key_heads;
    row_blocks = (in.queries + kRows - 1) / kRows;
    key_blocks = (in.keys + kKeys - 1) / kKeys;
    const int64_t heads = in.batch * in.key_heads;
    chunks = std::max<int64_t>(1, std::min((kTasks + heads - 1) / heads, groups * row_blocks / 4));
    tasks = heads * chunks;
    d_padded = whole_lanes(in.d), dv_padded = whole_lanes(in.dv);
    qk_width = positive ? 2 * d_padded : d_padded;
    pack_k = d_padded != in.d || in.k.widen != nullptr, pack_q = d_padded != in.d || in.q.widen != nullptr;
    pack_gradient = in.gradient && (dv_padded != in.dv || in.gradient.widen != nullptr);
    place_sums(in);
    place_room(in);
  }

 private:
  void place_sums(const AttentionRelevance<T>& in) {
    const int64_t rows = in.targets * in.keys;
    gradient_k = take(sums_size, in.gradient_k ? rows * d_padded : 0);
    gradient_v = take(sums_size, in.gradient_v ? rows * dv_padded : 0);
    relevance_k = take(sums_size, in.relevance_k ? rows * qk_width : 0);
    relevance_v = take(sums_size, in.relevance_v ? rows * dv_padded : 0);
    row_part_size = edge ? in.row_targets * key_blocks * kKeys : 0;
  }

  void place_room(const AttentionRelevance<T>& in) {
    const int64_t tile = kRows * kKeys, keys = key_blocks * kKeys, target_rows = in.targets * kRows;
    int64_t& size = room_size;
    k_transposed = take(size, keys * in.d);
    v_transposed = take(size, streams ? keys * in.dv : 0);
    k_rows = take(size, pack_k ? in.keys * d_padded : 0);
    const bool output_anew = gradient_logits && !in.exact_output;
    v_rows = take(size, in.v.widen != nullptr || (output_anew && dv_padded != in.dv) ? kKeys * dv_padded : 0);
    k_signed = take(size, positive ? in.keys * qk_width : 0);
    k_signed_transposed = take(size, positive ? keys * qk_width : 0);
    q_rows = take(size, pack_q ? kRows * d_padded : 0);
    q_signed = take(size, positive ? kRows * qk_width : 0);
    gradient_rows = take(size, pack_gradient ? target_rows * dv_padded : 0);
    shares = take(size, in.relevance ? target_rows * dv_padded : 0);
    dots = take(size, kRows * keys);
    attention = take(size, tile);
    to_attention = take(size, gradient_map ? tile : 0);
    share = take(size, relevance_map ? tile : 0);
    positive_dots = take(size, positive ? tile : 0);
    output = take(size, output_anew ? kRows * dv_padded : 0);
    output_row = take(size, in.relevance && in.output.widen != nullptr ? dv_padded : 0);
    highest = take(size, kRows);
    inverse_sum = take(size, kRows);
    gradient_sums = take(size, gradient_logits ? target_rows : 0);
    row_weights = take(size, edge ? in.row_targets * kRows : 0);
    query_sums = size;
    gradient_q = take(size, in.gradient_q ? target_rows * d_padded : 0);
    relevance_q = take(size, in.relevance_q ? target_rows * qk_width : 0);
    query_sums_size = size - query_sums;
    own_sums = take(size, chunks == 1 ? sums_size : 0);
  }

  static int64_t take(int64_t& size, int64_t more) {
    const int64_t at = size;
    size += whole_lanes(more);
    return at;
  }
};

template <typename T>
struct Job {
  const AttentionRelevance<T>& in;
  const Layout<T>& at;
  std::vector<std::atomic<bool>>& busy;  // one per room
  T *rooms, *sums, *row_parts;
};

// A room that no other thread uses. There are as many as threads, so one is always free.
struct Slot {
  std::vector<std::atomic<bool>>& busy;
  size_t index = 0;

  explicit Slot(std::vector<std::atomic<bool>>& rooms) : busy(rooms) {
    while (busy[index].exchange(true, std::memory_order_acquire)) index = (index + 1) % busy.size();
  }
  ~Slot() { busy[index].store(false, std::memory_order_release); }
  Slot(const Slot&) = delete;
  Slot& operator=(const Slot&) = delete;
};

namespace baseline {
template <typename V>
RELPROP_INLINE V fused(V a, V b, V c) {
  return a * b + c;
}
#define RELPROP_VECTOR_BYTES 16
#define RELPROP_BLOCK_ROWS 6
#define RELPROP_BLOCK_VECTORS 2
#include "attention_relevance_tiles.h"
#undef RELPROP_VECTOR_BYTES
#undef RELPROP_BLOCK_ROWS
#undef RELPROP_BLOCK_VECTORS
}  // namespace baseline

#if RELPROP_X86

RELPROP_PUSH_AVX2
namespace avx2 {
RELPROP_INLINE __m256 fused(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
RELPROP_INLINE __m256d fused(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
#define RELPROP_VECTOR_BYTES 32
#define RELPROP_BLOCK_ROWS 6
#define RELPROP_BLOCK_VECTORS 2
#include "attention_relevance_tiles.h"
#undef RELPROP_VECTOR_BYTES
#undef RELPROP_BLOCK_ROWS
#undef RELPROP_BLOCK_VECTORS
}  // namespace avx2
RELPROP_POP_TARGET

RELPROP_PUSH_AVX512
namespace avx512 {
RELPROP_INLINE __m512 fused(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
RELPROP_INLINE __m512d fused(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
#define RELPROP_VECTOR_BYTES 64
#define RELPROP_BLOCK_ROWS 6
#define RELPROP_BLOCK_VECTORS 4
#include "attention_relevance_tiles.h"
#undef RELPROP_VECTOR_BYTES
#undef RELPROP_BLOCK_ROWS
#undef RELPROP_BLOCK_VECTORS
}  // namespace avx512
RELPROP_POP_TARGET

#endif

template <typename T>
struct Functions {
  RangeFunction tasks, key_blocks;
};

template <typename T>
Functions<T> functions() {
  switch (active_isa()) {
#if RELPROP_X86
    case Isa::kAvx512:
      return {avx512::run_tasks<T>, avx512::run_key_blocks<T>};
    case Isa::kAvx2:
      return {avx2::run_tasks<T>, avx2::run_key_blocks<T>};
#endif
    default:
      return {baseline::run_tasks<T>, baseline::run_key_blocks<T>};
  }
}

// Uninitialised, whole cache lines.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(::operator new(sizeof(T) * static_cast<size_t>(size), kAlignment)) {}
  ~Buffer() { ::operator delete(data_, kAlignment); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return static_cast<T*>(data_); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  void* data_;
};

// row_out from the tasks' parts, each [row_targets, key_blocks * kKeys], added in order.
template <typename T>
void add_row_parts(const AttentionRelevance<T>& in, const Layout<T>& at, const T* parts) {
  const int64_t tasks = at.tasks / in.batch, padded = at.key_blocks * kKeys;
  for (int64_t r = 0; r < in.row_targets; ++r) {
    for (int64_t b = 0; b < in.batch; ++b) {
      T* out = in.row_out + (r * in.batch + b) * in.keys;
      std::fill_n(out, in.keys, T(0));
      for (int64_t task = b * tasks; task < (b + 1) * tasks; ++task) {
        const T* part = parts + task * at.row_part_size + r * padded;
        for (int64_t j = 0; j < in.keys; ++j) out[j] += part[j];
      }
    }
  }
}

}  // namespace

template <typename T>
void attention_relevance(const AttentionRelevance<T>& in, int threads) {
  const Layout<T> at(in);
  const int64_t at_once = std::min<int64_t>(threads, at.tasks);
  std::vector<std::atomic<bool>> busy(static_cast<size_t>(at_once));
  const Buffer<T> rooms(at_once * at.room_size);
  const Buffer<T> sums(at.chunks > 1 ? at.tasks * at.sums_size : 0);
  const Buffer<T> row_parts(at.tasks * at.row_part_size);
  const Job<T> job{in, at, busy, rooms.data(), sums.data(), row_parts.data()};
  const Functions<T> run = functions<T>();
  run_pieces(run.tasks, &job, at.tasks, 1, threads);
  if (at.chunks > 1) {
    run_pieces(run.key_blocks, &job, in.batch * in.key_heads * at.key_blocks, 1, threads);
  }
  if (at.edge) add_row_parts(in, at, row_parts.data());
}

template void attention_relevance<float>(const AttentionRelevance<float>&, int);
template void attention_relevance<double>(const AttentionRelevance<double>&, int);

}  // namespace relprop
