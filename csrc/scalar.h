// Numbers as they lie in memory: float32, bfloat16 and float16, read as float32.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "isa.h"

namespace relprop {

enum class Scalar : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

RELPROP_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

RELPROP_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Round to nearest even; NaN stays NaN.
RELPROP_INLINE uint16_t bfloat16_of(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

RELPROP_INLINE float float_of_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t rest = half & 0x7fffu;
  const uint32_t special = rest >= 0x7c00u ? 0x38000000u : 0u;  // infinity and NaN keep the largest exponent
  // The scaling by 2^112 is exact, also for subnormal numbers.
  const float scaled = float_of(rest << 13) * 5.192296858534828e33f;
  const uint32_t bits = special != 0u ? (rest << 13) + 0x70000000u : bits_of(scaled);
  return float_of(bits | sign);
}

// Element `i` of a run of elements, as float.
template <Scalar scalar>
RELPROP_INLINE float element(const void* data, int64_t i) {
  if constexpr (scalar == Scalar::kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  if constexpr (scalar == Scalar::kBfloat16) return float_of(static_cast<uint32_t>(bits) << 16);
  return float_of_half(bits);
}

template <Scalar scalar>
RELPROP_INLINE const void* offset(const void* data, int64_t elements) {
  return static_cast<const char*>(data) + elements * (scalar == Scalar::kFloat32 ? 4 : 2);
}

// Calls function(std::integral_constant<Scalar, scalar>()), so that loops are compiled for one of them.
template <class Function>
void with_scalar(Scalar scalar, Function&& function) {
  switch (scalar) {
    case Scalar::kFloat32:
      return function(std::integral_constant<Scalar, Scalar::kFloat32>());
    case Scalar::kBfloat16:
      return function(std::integral_constant<Scalar, Scalar::kBfloat16>());
    case Scalar::kFloat16:
      return function(std::integral_constant<Scalar, Scalar::kFloat16>());
  }
}

}  // namespace relprop
