#include <algorithm>
#include <cmath>
#include <vector>

#include "add_normalised.h"
#include "parallel.h"
#include "sums.h"

namespace relprop {
namespace {

// Length of the pieces that are summed on their own; part of the result's definition, so never a tuning knob.
constexpr int64_t kPiece = 2048;

struct Sums {
  double a, b, relevance;
};

// Both summands of a piece and their stabilised sum.
template <typename T>
struct Piece {
  int64_t count;
  const T *a, *b;
  T a_block[kPiece], b_block[kPiece], denominator[kPiece];
};

template <typename T, StabiliserKind kind>
struct Add {
  Result<T> relevance_a, relevance_b;
  Operand<T> relevance, a, b;
  int64_t targets, batch, b_stride, size, pieces;
  double epsilon;
  Sums* sums;  // [batch, pieces, targets]

  RELPROP_INLINE void read(Piece<T>& piece, int64_t sample, int64_t begin) const {
    const int64_t count = std::min(kPiece, size - begin);
    const T* a_at = a.read(sample * size + begin, count, piece.a_block);
    const T* b_at = b.read(sample * b_stride + begin, count, piece.b_block);
    const T eps = static_cast<T>(epsilon);
    T* denominator = piece.denominator;
    RELPROP_VECTORISE
    for (int64_t i = 0; i < count; ++i) denominator[i] = stabilised<kind>(a_at[i] + b_at[i], eps);
    piece.count = count;
    piece.a = a_at;
    piece.b = b_at;
  }

  RELPROP_INLINE void sum_piece(int64_t sample, int64_t index) const {
    Piece<T> piece;
    T r_block[kPiece];
    const int64_t begin = index * kPiece;
    read(piece, sample, begin);
    const int64_t count = piece.count;
    const T *a_at = piece.a, *b_at = piece.b, *denominator = piece.denominator;
    for (int64_t t = 0; t < targets; ++t) {
      const T* r = relevance.read((t * batch + sample) * size + begin, count, r_block);
      double sum_a[kLanes] = {}, sum_b[kLanes] = {}, sum_r[kLanes] = {};
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const T share = r[i + lane] / denominator[i + lane];
          sum_a[lane] += static_cast<double>(a_at[i + lane] * share);
          sum_b[lane] += static_cast<double>(b_at[i + lane] * share);
          sum_r[lane] += static_cast<double>(r[i + lane]);
        }
      }
      for (int64_t lane = 0; i < count; ++i, ++lane) {
        const T share = r[i] / denominator[i];
        sum_a[lane] += static_cast<double>(a_at[i] * share);
        sum_b[lane] += static_cast<double>(b_at[i] * share);
        sum_r[lane] += static_cast<double>(r[i]);
      }
      sums[(sample * pieces + index) * targets + t] = {sum_of_lanes(sum_a), sum_of_lanes(sum_b), sum_of_lanes(sum_r)};
    }
  }

  RELPROP_INLINE void total(int64_t sample) const {
    // The first piece's slot takes the total; every thread that scales this sample's pieces reads it there.
    for (int64_t t = 0; t < targets; ++t) {
      Sums& whole = sums[sample * pieces * targets + t];
      for (int64_t piece = 1; piece < pieces; ++piece) {
        const Sums& part = sums[(sample * pieces + piece) * targets + t];
        whole.a += part.a;
        whole.b += part.b;
        whole.relevance += part.relevance;
      }
    }
  }

  RELPROP_INLINE T factor(double branch, const Sums& sum) const {
    const double both = std::fabs(sum.a) + std::fabs(sum.b);
    const double wanted = std::fabs(branch) / stabilised<kind>(both, epsilon) * sum.relevance;
    return static_cast<T>(wanted / stabilised<kind>(branch, epsilon));
  }

  RELPROP_INLINE void scale_piece(int64_t sample, int64_t index) const {
    Piece<T> piece;
    T r_block[kPiece], out_block[kPiece], other_block[kPiece];
    const int64_t begin = index * kPiece;
    read(piece, sample, begin);
    const int64_t count = piece.count;
    const T *a_at = piece.a, *b_at = piece.b, *denominator = piece.denominator;
    for (int64_t t = 0; t < targets; ++t) {
      const int64_t offset = (t * batch + sample) * size + begin;
      const T* r = relevance.read(offset, count, r_block);
      T* out_a = relevance_a.place(offset, out_block);
      T* out_b = relevance_b.place(offset, other_block);
      const Sums& sum = sums[sample * pieces * targets + t];
      const T factor_a = factor(sum.a, sum);
      const T factor_b = factor(sum.b, sum);
      RELPROP_VECTORISE
      for (int64_t i = 0; i < count; ++i) {
        // Dividing again is cheaper than writing the shares and reading them back.
        const T share = r[i] / denominator[i];
        out_a[i] = a_at[i] * share * factor_a;
        out_b[i] = b_at[i] * share * factor_b;
      }
      relevance_a.write(offset, count, out_a);
      relevance_b.write(offset, count, out_b);
    }
  }
};

template <class Rule>
struct SumPieces {
  Rule rule;
  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) rule.sum_piece(i / rule.pieces, i % rule.pieces);
  }
};

template <class Rule>
struct ScalePieces {
  Rule rule;
  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) rule.scale_piece(i / rule.pieces, i % rule.pieces);
  }
};

template <class Rule>
struct WholeSamples {
  Rule rule;
  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t sample = begin; sample < end; ++sample) {
      for (int64_t piece = 0; piece < rule.pieces; ++piece) rule.sum_piece(sample, piece);
      rule.total(sample);
      for (int64_t piece = 0; piece < rule.pieces; ++piece) rule.scale_piece(sample, piece);
    }
  }
};

}  // namespace

template <typename T>
void add_normalised(Result<T> relevance_a, Result<T> relevance_b, Operand<T> relevance, Operand<T> a, Operand<T> b,
                    int64_t targets, int64_t batch, int64_t b_batch, int64_t size, Stabiliser stabiliser, int threads) {
  const int64_t pieces = (size + kPiece - 1) / kPiece;
  std::vector<Sums> sums(static_cast<size_t>(batch * pieces * targets));
  const int64_t b_stride = b_batch == 1 ? 0 : size;
  with_kind(stabiliser, [&](auto kind) {
    using Rule = Add<T, decltype(kind)::value>;
    const Rule rule{relevance_a, relevance_b, relevance,          a,          b, targets, batch, b_stride,
                    size,        pieces,      stabiliser.epsilon, sums.data()};
    // A sample at a time stays in cache between its two sweeps; too few samples leave threads idle.
    if (threads <= 1 || batch >= 2 * static_cast<int64_t>(threads)) {
      for_ranges(WholeSamples<Rule>{rule}, batch, targets * size, threads);
      return;
    }
    const int64_t work = targets * std::min(size, kPiece);
    for_ranges(SumPieces<Rule>{rule}, batch * pieces, work, threads);
    for (int64_t sample = 0; sample < batch; ++sample) rule.total(sample);
    for_ranges(ScalePieces<Rule>{rule}, batch * pieces, work, threads);
  });
}

template void add_normalised<float>(Result<float>, Result<float>, Operand<float>, Operand<float>, Operand<float>,
                                    int64_t, int64_t, int64_t, int64_t, Stabiliser, int);
template void add_normalised<double>(Result<double>, Result<double>, Operand<double>, Operand<double>, Operand<double>,
                                     int64_t, int64_t, int64_t, int64_t, Stabiliser, int);

}  // namespace relprop
