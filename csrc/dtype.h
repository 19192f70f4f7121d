// Element types of tensors. A kernel computes in T, float or double. Each tensor that it reads or writes is of type T
// or of a half precision, which is converted a block at a time in a buffer that stays in the first-level cache: one
// loop body serves every mix of types, and the conversions are compiled once per instruction set.
#pragma once

#include <cstdint>

#include "isa.h"

namespace relprop {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

template <typename T>
constexpr DType kDTypeOf = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

template <typename T>
using Widen = void (*)(T* to, const void* data, int64_t at, int64_t count);
template <typename T>
using Narrow = void (*)(void* data, const T* from, int64_t at, int64_t count);

// The conversion from a half precision; null for T itself.
template <typename T>
Widen<T> widen_from(DType dtype);

// The conversion to a half precision, to nearest even; null for T itself. Of float only: double would round twice.
template <typename T>
Narrow<T> narrow_to(DType dtype);
template <>
Narrow<float> narrow_to<float>(DType dtype);
template <>
Narrow<double> narrow_to<double>(DType dtype);

// A tensor that a kernel reads.
template <typename T>
struct Operand {
  const void* data;
  DType dtype;
  Widen<T> widen;

  Operand(const void* data, DType dtype) : data(data), dtype(dtype), widen(widen_from<T>(dtype)) {}

  // Elements [at, at + count): the tensor's own memory where it is of type T, else `buffer`, filled.
  RELPROP_INLINE const T* read(int64_t at, int64_t count, T* buffer) const {
    if (widen == nullptr) return static_cast<const T*>(data) + at;
    widen(buffer, data, at, count);
    return buffer;
  }
};

// A tensor that a kernel writes; null where the result is not wanted.
template <typename T>
struct Result {
  void* data;
  Narrow<T> narrow;

  Result(void* data, DType dtype) : data(data), narrow(narrow_to<T>(dtype)) {}

  // Where elements from `at` on are to be written, before `write` takes them.
  RELPROP_INLINE T* place(int64_t at, T* buffer) const {
    return narrow == nullptr && data != nullptr ? static_cast<T*>(data) + at : buffer;
  }

  RELPROP_INLINE void write(int64_t at, int64_t count, const T* placed) const {
    if (narrow != nullptr && data != nullptr) narrow(data, placed, at, count);
  }
};

}  // namespace relprop
