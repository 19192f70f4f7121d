// Half precisions, read and written as float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace relprop {

template <typename To, typename From>
RELPROP_INLINE To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// All four conversions are integer and float arithmetic without branches, so that loops over them are vectorised on any
// instruction set. float16: after Maratyszcza's FP16 library.
struct BFloat16 {
  static RELPROP_INLINE float widen(uint16_t half) { return bits_of<float>(static_cast<uint32_t>(half) << 16); }

  static RELPROP_INLINE uint16_t narrow(float value) {
    const uint32_t bits = bits_of<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet = (bits >> 16) | 0x40u;
    return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded);
  }
};

struct Float16 {
  static RELPROP_INLINE float widen(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    const uint32_t sign = bits & 0x80000000u;
    const uint32_t twice = bits + bits;
    const float normal = bits_of<float>((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
    const float subnormal = bits_of<float>((twice >> 17) | (126u << 23)) - 0.5f;
    const uint32_t magnitude = bits_of<uint32_t>(twice < (1u << 27) ? subnormal : normal);
    return bits_of<float>(sign | magnitude);
  }

  static RELPROP_INLINE uint16_t narrow(float value) {
    const uint32_t bits = bits_of<uint32_t>(value);
    const uint32_t sign = bits & 0x80000000u;
    const uint32_t twice = bits + bits;
    const uint32_t exponent = twice & 0xFF000000u;
    const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
    // Adding a power of two that is 2^13 units in the last place above the value lets the adder round.
    const float scaled = bits_of<float>(bits & 0x7FFFFFFFu) * 0x1.0p+112f * 0x1.0p-110f;
    const uint32_t rounded = bits_of<uint32_t>(bits_of<float>((bias >> 1) + 0x07800000u) + scaled);
    const uint32_t magnitude = ((rounded >> 13) & 0x7C00u) + (rounded & 0x0FFFu);
    return static_cast<uint16_t>((sign >> 16) | (twice > 0xFF000000u ? 0x7E00u : magnitude));
  }
};

}  // namespace relprop
