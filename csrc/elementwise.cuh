// What elementwise kernels share: four neighbouring elements per thread, read and written in one access where all
// arrays are aligned for it.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "dtypes.cuh"
#include "stabiliser.h"

namespace relprop {

// A stabiliser in the precision that kernels divide in.
struct Divisor {
  StabiliserKind kind;
  float epsilon;

  Divisor(const Stabiliser& stabiliser) : kind(stabiliser.kind), epsilon(static_cast<float>(stabiliser.epsilon)) {}

  // stab(z), infinite where the share is 0.
  __device__ __forceinline__ float operator()(float z) const {
    return kind == StabiliserKind::kSigned ? stabilised<StabiliserKind::kSigned>(z, epsilon)
                                           : stabilised<StabiliserKind::kReference>(z, epsilon);
  }
};

constexpr int kFour = 4;
constexpr int kElementwiseThreads = 256;

struct Four {
  float v[kFour];
};

template <typename T>
struct alignas(kFour * sizeof(T)) FourStored {
  T v[kFour];
};

// Where a thread's elements lie: [at, at + count), count <= 4; `whole` allows one access for all four.
struct Place {
  int64_t at;
  int count;
  bool whole;
};

template <typename T>
__device__ __forceinline__ Four load_four(const T* from, const Place& place) {
  Four four;
  if (place.whole) {
    const FourStored<T> stored = *reinterpret_cast<const FourStored<T>*>(from + place.at);
#pragma unroll
    for (int i = 0; i < kFour; ++i) four.v[i] = to_float(stored.v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kFour; ++i) four.v[i] = i < place.count ? to_float(from[place.at + i]) : 0.0f;
  }
  return four;
}

template <typename T>
__device__ __forceinline__ void store_four(T* to, const Place& place, const Four& four) {
  if (place.whole) {
    FourStored<T> stored;
#pragma unroll
    for (int i = 0; i < kFour; ++i) stored.v[i] = from_float<T>(four.v[i]);
    *reinterpret_cast<FourStored<T>*>(to + place.at) = stored;
  } else {
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      if (i < place.count) to[place.at + i] = from_float<T>(four.v[i]);
    }
  }
}

// Whether all arrays can be read 16 bytes at a time.
inline bool aligned(std::initializer_list<const void*> arrays) {
  return std::all_of(arrays.begin(), arrays.end(),
                     [](const void* array) { return reinterpret_cast<std::uintptr_t>(array) % 16 == 0; });
}

// Four blocks to a multiprocessor leave 64 registers a thread: left to itself ptxas takes 32 and spills.
template <class Body>
__global__ void __launch_bounds__(kElementwiseThreads, 4) elementwise_kernel(Body body, int64_t size, bool whole) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kElementwiseThreads * kFour;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kElementwiseThreads + threadIdx.x) * kFour;
  for (int64_t at = first; at < size; at += step) {
    const int count = size - at < kFour ? static_cast<int>(size - at) : kFour;
    body(Place{at, count, whole && count == kFour});
  }
}

// Runs body(place) over [0, size); arrays with a leading axis of targets repeat every `size` elements. `all_aligned` is
// said of every array that the body touches.
template <class Body>
void run_elementwise(const char* name, const Body& body, int64_t size, bool all_aligned, Stream stream) {
  if (size == 0) return;
  const bool whole = all_aligned && size % kFour == 0;
  constexpr int64_t kPerBlock = int64_t{kElementwiseThreads} * kFour;
  const int64_t blocks = std::min<int64_t>((size + kPerBlock - 1) / kPerBlock, 1 << 20);
  launch(name, elementwise_kernel<Body>, dim3(static_cast<unsigned>(blocks)), dim3(kElementwiseThreads), 0, stream,
         body, size, whole);
}

// Calls function(TypeTag<V>(), TypeTag<S>()) for the dtypes of layer inputs and of streams: a stream is float32 or as
// the layer.
template <class Function>
void with_dtypes(DType values, DType streams, Function&& function) {
  if (streams != values && streams != DType::kFloat32) {
    throw std::invalid_argument("streams: expected float32 or the dtype of the layer's tensors");
  }
  with_dtype(values, [&](auto value) {
    if (streams == values) {
      function(value, value);
    } else {
      function(value, TypeTag<float>());
    }
  });
}

}  // namespace relprop
