// The stabiliser: how a share R / z keeps away from a zero denominator. Defined here once for every CPU and
// CUDA kernel.
#pragma once

#include <limits>
#include <type_traits>

#include "isa.h"

#if defined(__CUDACC__)
#define RELPROP_ON_DEVICE __host__ __device__
#else
#define RELPROP_ON_DEVICE
#endif

namespace relprop {

enum class StabiliserKind : int {
  kSigned = 0,     // z + epsilon * sign(z), sign(0) = +1; with epsilon 0 the share is 0 where z is 0
  kReference = 1,  // z + epsilon, epsilon where that is 0; the share is 0 where z is 0
};

struct Stabiliser {
  StabiliserKind kind;
  double epsilon;
};

// The denominator that means "share 0". Unlike a select of 0 it lets a NaN or infinite relevance through, as NaN.
template <typename T>
constexpr T kNoShare = std::numeric_limits<T>::infinity();

// stab(z): the share of relevance R is R / stabilised(z).
template <StabiliserKind kind, typename T>
RELPROP_ON_DEVICE RELPROP_INLINE T stabilised(T z, T epsilon) {
  if constexpr (kind == StabiliserKind::kSigned) {
    const T denominator = z + (z >= T(0) ? epsilon : -epsilon);
    return denominator == T(0) ? kNoShare<T> : denominator;
  } else {
    const T sum = z + epsilon;
    const T denominator = sum == T(0) ? epsilon : sum;
    return z == T(0) ? kNoShare<T> : denominator;
  }
}

// Calls function(std::integral_constant<StabiliserKind, kind>()), so that loops are compiled for one kind.
template <class Function>
void with_kind(const Stabiliser& stabiliser, Function&& function) {
  switch (stabiliser.kind) {
    case StabiliserKind::kSigned:
      return function(std::integral_constant<StabiliserKind, StabiliserKind::kSigned>());
    case StabiliserKind::kReference:
      return function(std::integral_constant<StabiliserKind, StabiliserKind::kReference>());
  }
}

}  // namespace relprop
