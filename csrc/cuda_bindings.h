// What the binding files of relprop._cuda (csrc/*cuda_bindings.cpp) share, over what all binding files do.
#pragma once

#include <tuple>

#include "bindings.h"
#include "cuda_types.h"

namespace relprop {

// What every call begins with: dtypes of layer tensors and of streams, device, cudaStream_t.
using Context = std::tuple<int, int, int, Pointer>;
using StabiliserArgument = std::pair<int, double>;

inline DType dtype_of(int code) {
  if (code < 0 || code > 2) {
    throw std::invalid_argument("dtype: expected 0 (float32), 1 (bfloat16) or 2 (float16), got " +
                                std::to_string(code));
  }
  return static_cast<DType>(code);
}

inline DType values_of(const Context& context) { return dtype_of(std::get<0>(context)); }
inline DType streams_of(const Context& context) { return dtype_of(std::get<1>(context)); }
inline Stream stream_of(const Context& context) { return {std::get<2>(context), as<void>(std::get<3>(context))}; }

inline Stabiliser stabiliser_of(const StabiliserArgument& argument) {
  return checked_stabiliser(argument.first, argument.second);
}

// The enumerator of that code.
template <typename Enum>
Enum choice(const char* name, int code, int count) {
  if (code < 0 || code >= count) {
    throw std::invalid_argument(std::string(name) + ": expected 0 to " + std::to_string(count - 1) + ", got " +
                                std::to_string(code));
  }
  return static_cast<Enum>(code);
}

}  // namespace relprop
