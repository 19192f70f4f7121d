// The statistics of a row that the norms divide by.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "dtype.h"
#include "parallel.h"
#include "sums.h"

namespace relprop {

enum class Norm : int {
  kLayer = 0,  // (x - mean) / sqrt(variance + epsilon)
  kRms = 1,    // x / sqrt(mean(x^2) + epsilon)
};

template <typename T>
struct RowStatistics {
  T mean, inverse;  // inverse: 1 / sigma
};

// Sums over a row of x - shift and its square: float64, in a fixed order.
template <typename T>
RELPROP_INLINE void sums_of_row(const Operand<T>& x, int64_t offset, int64_t n, double shift, double* sum,
                                double* squares) {
  T block[kBlock];
  double lanes[kLanes] = {}, square_lanes[kLanes] = {};
  for (int64_t at = 0; at < n; at += kBlock) {
    const int64_t count = std::min(kBlock, n - at);
    const T* values = x.read(offset + at, count, block);
    const auto term = [&](int64_t i) RELPROP_INLINE_LAMBDA { return static_cast<double>(values[i]) - shift; };
    add_to_lanes(lanes, count, term);
    add_to_lanes(square_lanes, count, [&](int64_t i) RELPROP_INLINE_LAMBDA { return term(i) * term(i); });
  }
  *sum = sum_of_lanes(lanes);
  *squares = sum_of_lanes(square_lanes);
}

template <typename T>
RELPROP_INLINE RowStatistics<T> statistics_of_row(const Operand<T>& x, int64_t offset, int64_t n, Norm norm,
                                                  double epsilon) {
  const double size = static_cast<double>(n);
  double sum, squares;
  sums_of_row(x, offset, n, 0.0, &sum, &squares);
  const double mean = norm == Norm::kLayer ? sum / size : 0.0;
  if (norm == Norm::kLayer) {
    double rest;
    // float64 squares of float32 numbers keep what cancels; those of float64 are taken about the mean.
    if (sizeof(T) == 8) sums_of_row(x, offset, n, mean, &rest, &squares);
    if (sizeof(T) == 4) squares = std::max(0.0, squares - size * mean * mean);
  }
  return {static_cast<T>(mean), static_cast<T>(1.0 / std::sqrt(squares / size + epsilon))};
}

}  // namespace relprop
