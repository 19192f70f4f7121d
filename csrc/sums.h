// Sums whose order is part of their definition: float64, in interleaved lanes, the same bits on every instruction set.
#pragma once

#include <cstdint>

#include "isa.h"

namespace relprop {

// Any instruction set divides this evenly; element i of a sum goes to lane i % kLanes.
constexpr int64_t kLanes = 16;

RELPROP_INLINE double sum_of_lanes(double* lanes) {
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// Adds term(i), i in [0, count), to the lanes. Calls that continue one sum need a count divisible by kLanes but the
// last.
template <class Term>
RELPROP_INLINE void add_to_lanes(double* lanes, int64_t count, const Term& term) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += static_cast<double>(term(i + lane));
  }
  for (int64_t lane = 0; i < count; ++i, ++lane) lanes[lane] += static_cast<double>(term(i));
}

}  // namespace relprop
