// What the launchers of all CUDA kernels (csrc/X_cuda.h) take besides pointers and sizes.
//
// They are declared apart from the CPU ones (csrc/X.h): a CUDA launcher takes untyped pointers with a dtype, since
// layer inputs may be float32, bfloat16 or float16, and a stream instead of a number of threads.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace relprop {

// How the factors of a matrix product are multiplied; sums are float32 throughout.
enum class Product : int {
  kFloat32 = 0,   // as stored, in float32 arithmetic
  kTFloat32 = 1,  // rounded to 11 bits, on tensor cores
  kBFloat16 = 2,  // rounded to bfloat16, on tensor cores
  kFloat16 = 3,   // float16, on tensor cores
};

struct Stream {
  int device;
  void* handle;  // a cudaStream_t; null is the default stream
};

}  // namespace relprop
