// bfloat16 and float16 for kernels: storage, and conversion with rounding to nearest even.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "cuda_platform.cuh"

namespace relprop {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }

__device__ __forceinline__ float to_float(bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

__device__ __forceinline__ float to_float(float16 x) {
#if defined(__CUDACC__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  const unsigned sign = (x.bits & 0x8000u) << 16;
  const unsigned magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x0400u) return __uint_as_float(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24
  return sign != 0 ? -subnormal : subnormal;
#endif
}

template <typename T>
__device__ __forceinline__ T from_float(float x);

template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}

template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) {
#if defined(__CUDACC__)
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return {bits};
#else
  const unsigned bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}

template <>
__device__ __forceinline__ float16 from_float<float16>(float x) {
#if defined(__CUDACC__)
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return {bits};
#else
  if (x != x) return {0x7fff};
  const unsigned bits = __float_as_uint(x);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const unsigned magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and above: infinity
  if (magnitude < 0x38800000u) {                                                 // below 2^-14: subnormal
    const float steps = std::nearbyint(__uint_as_float(magnitude) * 16777216.0f);
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(steps))};
  }
  const unsigned rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23);
  return {static_cast<uint16_t>(sign | rounded >> 13)};
#endif
}

// Two values in one register, the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  const T low = from_float<T>(first), high = from_float<T>(second);
  return static_cast<uint32_t>(low.bits) | static_cast<uint32_t>(high.bits) << 16;
}

// Rounds to the 11 bits that a tf32 product reads (halves away from zero).
__device__ __forceinline__ uint32_t to_tf32(float x) {
#if defined(__CUDACC__)
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  const unsigned bits = __float_as_uint(x);
  return x != x ? 0x7fffffffu : (bits + 0x1000u) & ~0x1fffu;
#endif
}

template <typename T>
struct TypeTag {
  using Type = T;
};

// Calls function(TypeTag<T>()) for the type that a dtype names.
template <class Function>
void with_dtype(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(TypeTag<float>());
    case DType::kBFloat16:
      return function(TypeTag<bfloat16>());
    case DType::kFloat16:
      return function(TypeTag<float16>());
    default:
      break;
  }
  throw std::invalid_argument("dtype: expected 0 (float32), 1 (bfloat16) or 2 (float16), got " +
                              std::to_string(static_cast<int>(dtype)));
}

}  // namespace relprop
