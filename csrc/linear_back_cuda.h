// The way back through a linear layer y = x w^T for all rules and the gradient: every stream of every target multiplies
// by the same w, and several go through one launch.
#pragma once

#include "cuda_types.h"

namespace relprop {

enum class Selection : int {
  kNone = 0,    // out = p1 w: a gradient
  kInput = 1,   // out = factor1 x (p1 w)
  kHalves = 2,  // out = factor1 x (p1 w) + factor2 |x| (p2 |w|); one reading of w does for both where p1 is p2
};

struct LinearBack {
  void* out;       // [targets, rows, k], streams; none of the inputs
  const void* p1;  // [targets, rows, n], streams
  const void* p2;  // [targets, rows, n], streams, for kHalves; may be p1
  int64_t targets;
  Selection selection;
  float factor1, factor2;
};

constexpr int kMaxBacks = 8;

// Products as `product` says; kFloat16 wants float16 streams, and float16 values with float32 streams are multiplied as
// tf32, which holds them exactly.
void linear_back_cuda(DType values, DType streams, Product product,
                      const LinearBack* backs,  // [count]
                      int count,                // 1 to kMaxBacks
                      const void* x,            // [rows, k], values; may be null where nothing is selected
                      const void* w,            // [n, k], values
                      int64_t rows, int64_t n, int64_t k, Stream stream);

}  // namespace relprop
