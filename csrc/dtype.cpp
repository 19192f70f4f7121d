#include "dtype.h"

#include <cmath>
#include <cstring>

namespace relprop {
namespace {

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

template <typename T, class Half>
struct WidenRange {
  T* to;
  const uint16_t* from;

  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    T* to_at = to;
    const uint16_t* from_at = from;
    RELPROP_VECTORISE
    for (int64_t i = begin; i < end; ++i) to_at[i] = static_cast<T>(Half::widen(from_at[i]));
  }
};

template <class Half>
struct NarrowRange {
  uint16_t* to;
  const float* from;

  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    uint16_t* to_at = to;
    const float* from_at = from;
    RELPROP_VECTORISE
    for (int64_t i = begin; i < end; ++i) to_at[i] = Half::narrow(from_at[i]);
  }
};

template <typename T, class Half>
void widen(T* to, const void* data, int64_t at, int64_t count) {
  const WidenRange<T, Half> kernel{to, static_cast<const uint16_t*>(data) + at};
  range_function<WidenRange<T, Half>>()(&kernel, 0, count);
}

template <class Half>
void narrow(void* data, const float* from, int64_t at, int64_t count) {
  const NarrowRange<Half> kernel{static_cast<uint16_t*>(data) + at, from};
  range_function<NarrowRange<Half>>()(&kernel, 0, count);
}

}  // namespace

template <typename T>
Widen<T> widen_from(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return widen<T, BFloat16>;
    case DType::kFloat16:
      return widen<T, Float16>;
    default:
      return nullptr;
  }
}

template <>
Narrow<float> narrow_to<float>(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return narrow<BFloat16>;
    case DType::kFloat16:
      return narrow<Float16>;
    default:
      return nullptr;
  }
}

template <>
Narrow<double> narrow_to<double>(DType) {
  return nullptr;
}

template Widen<float> widen_from<float>(DType);
template Widen<double> widen_from<double>(DType);

}  // namespace relprop
