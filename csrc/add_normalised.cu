#include "add_normalised_cuda.h"
#include "elementwise.cuh"
#include "reduce.cuh"

namespace relprop {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kSmallestPiece = 4 * kThreads * kFour;
constexpr int64_t kMostPieces = 256;  // one per thread where they are added up
constexpr int kSums = 3;              // of a', b' and R
using Room = double[kThreads / 32];

int64_t piece_length(int64_t size) {
  const int64_t length = std::max(kSmallestPiece, (size + kMostPieces - 1) / kMostPieces);
  return (length + kFour - 1) / kFour * kFour;
}

int64_t piece_count(int64_t size) { return (size + piece_length(size) - 1) / piece_length(size); }

template <typename V, typename S>
struct Add {
  S *relevance_a, *relevance_b;
  const S* relevance;
  const V *a, *b;
  double* sums;  // [batch, targets, pieces, kSums]
  int64_t targets, batch, b_stride, size, piece, pieces;
  bool all_aligned;
  Divisor stab;

  // Calls function(place) for this thread's elements of the block's piece.
  template <class Function>
  __device__ __forceinline__ void each_place(const Function& function) const {
    const int64_t begin = blockIdx.x * piece;
    const int64_t end = begin + piece < size ? begin + piece : size;
    for (int64_t at = begin + static_cast<int64_t>(threadIdx.x) * kFour; at < end; at += kThreads * kFour) {
      const int count = end - at < kFour ? static_cast<int>(end - at) : kFour;
      function(Place{at, count, all_aligned && count == kFour});
    }
  }

  __device__ __forceinline__ double* sums_of(int64_t sample, int64_t target) const {
    return sums + (sample * targets + target) * pieces * kSums;
  }

  __device__ __forceinline__ void sum(int64_t sample, int64_t target, Room& room) const {
    const V *a_at = a + sample * size, *b_at = b + sample * b_stride;
    const S* r_at = relevance + (target * batch + sample) * size;
    double sum_a = 0.0, sum_b = 0.0, sum_r = 0.0;
    each_place([&](const Place& place) {
      const Four x = load_four(a_at, place), y = load_four(b_at, place), r = load_four(r_at, place);
      float here_a = 0.0f, here_b = 0.0f, here_r = 0.0f;
      for (int i = 0; i < kFour; ++i) {
        if (i >= place.count) break;
        const float share = r.v[i] / stab(x.v[i] + y.v[i]);
        here_a += x.v[i] * share;
        here_b += y.v[i] * share;
        here_r += r.v[i];
      }
      sum_a += here_a;
      sum_b += here_b;
      sum_r += here_r;
    });
    sum_a = block_sum<kThreads>(sum_a, room);
    sum_b = block_sum<kThreads>(sum_b, room);
    sum_r = block_sum<kThreads>(sum_r, room);
    if (threadIdx.x == 0) {
      double* to = sums_of(sample, target) + static_cast<int64_t>(blockIdx.x) * kSums;
      to[0] = sum_a;
      to[1] = sum_b;
      to[2] = sum_r;
    }
  }

  __device__ __forceinline__ float factor(double branch, double other, double relevance_sum) const {
    const double epsilon = static_cast<double>(stab.epsilon);
    const auto divisor = [&](double z) {
      return stab.kind == StabiliserKind::kSigned ? stabilised<StabiliserKind::kSigned>(z, epsilon)
                                                  : stabilised<StabiliserKind::kReference>(z, epsilon);
    };
    return static_cast<float>(fabs(branch) / divisor(fabs(branch) + fabs(other)) * relevance_sum / divisor(branch));
  }

  __device__ __forceinline__ void scale(int64_t sample, int64_t target, Room& room) const {
    double total[kSums];
    for (int i = 0; i < kSums; ++i) {
      const bool mine = static_cast<int>(threadIdx.x) < pieces;
      total[i] = block_sum<kThreads>(mine ? sums_of(sample, target)[threadIdx.x * kSums + i] : 0.0, room);
    }
    const float factor_a = factor(total[0], total[1], total[2]), factor_b = factor(total[1], total[0], total[2]);
    const V *a_at = a + sample * size, *b_at = b + sample * b_stride;
    const int64_t offset = (target * batch + sample) * size;
    each_place([&](const Place& place) {
      Four x = load_four(a_at, place), y = load_four(b_at, place);
      const Four r = load_four(relevance + offset, place);
      for (int i = 0; i < kFour; ++i) {
        const float share = r.v[i] / stab(x.v[i] + y.v[i]);
        x.v[i] *= share * factor_a;
        y.v[i] *= share * factor_b;
      }
      store_four(relevance_a + offset, place, x);
      store_four(relevance_b + offset, place, y);
    });
  }
};

template <bool scales, class Rule>
__global__ void __launch_bounds__(kThreads) add_normalised_kernel(Rule rule) {
  RELPROP_SHARED(Room, room);
  for (int64_t sample = blockIdx.y; sample < rule.batch; sample += gridDim.y) {
    for (int64_t target = 0; target < rule.targets; ++target) {
      if constexpr (scales) {
        rule.scale(sample, target, room);
      } else {
        rule.sum(sample, target, room);
      }
    }
  }
}

}  // namespace

int64_t add_normalised_workspace(int64_t targets, int64_t batch, int64_t size) {
  return targets * batch * piece_count(size) * kSums;
}

void add_normalised_cuda(DType values, DType streams, void* relevance_a, void* relevance_b, const void* relevance,
                         const void* a, const void* b, double* workspace, int64_t targets, int64_t batch,
                         int64_t b_batch, int64_t size, Stabiliser stabiliser, Stream stream) {
  if (targets == 0 || batch == 0 || size == 0) return;
  const dim3 grid(static_cast<unsigned>(piece_count(size)), static_cast<unsigned>(std::min<int64_t>(batch, 65535)));
  with_dtypes(values, streams, [&](auto value, auto streamed) {
    using V = typename decltype(value)::Type;
    using S = typename decltype(streamed)::Type;
    using Rule = Add<V, S>;
    const Rule rule{static_cast<S*>(relevance_a),
                    static_cast<S*>(relevance_b),
                    static_cast<const S*>(relevance),
                    static_cast<const V*>(a),
                    static_cast<const V*>(b),
                    workspace,
                    targets,
                    batch,
                    b_batch == 1 ? 0 : size,
                    size,
                    piece_length(size),
                    piece_count(size),
                    size % kFour == 0 && aligned({relevance_a, relevance_b, relevance, a, b}),
                    stabiliser};
    launch("add_normalised_sums", add_normalised_kernel<false, Rule>, grid, dim3(kThreads), 0, stream, rule);
    launch("add_normalised", add_normalised_kernel<true, Rule>, grid, dim3(kThreads), 0, stream, rule);
  });
}

}  // namespace relprop
