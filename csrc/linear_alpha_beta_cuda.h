// Alpha-beta rule of a linear layer y = x w^T + b: shares p1 = alpha s+ - beta s-, p2 = alpha s+ + beta s-, from
// s+ = R / stab(z+), z+ = x+ w+ + x- w- >= 0 and s- = R / stab(z-), z- = x+ w- + x- w+ <= 0. The way back is
// linear_back with kHalves and both factors 1/2. Source: Chefer et al., CVPR 2021, section 3.
#pragma once

#include "cuda_types.h"
#include "stabiliser.h"

namespace relprop {

// With kFloat32 (float32 values only) z+- = ((y - b) +- |x||w|^T) / 2, and what is not above tolerance * |x||w|^T
// counts as 0 and has share 0. Any other product sums z+- from its own factors, where nothing cancels: y is not read.
void linear_alpha_beta_share_out_cuda(DType values, DType streams, Product product,
                                      void* p1,               // [targets, rows, n], streams; may be `relevance` itself
                                      void* p2,               // [targets, rows, n], streams; null where beta is 0
                                      const void* relevance,  // [targets, rows, n], streams
                                      const void* x,          // [rows, k], values
                                      const void* w,          // [n, k], values
                                      const void* y,          // [rows, n], values, for kFloat32
                                      const void* bias,       // [n], values, or null
                                      int64_t targets, int64_t rows, int64_t n, int64_t k, double alpha, double beta,
                                      double tolerance, Stabiliser stabiliser, Stream stream);

}  // namespace relprop
