#include "dtype.h"

#include <cmath>

#include "half.h"

namespace relprop {
namespace {

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
