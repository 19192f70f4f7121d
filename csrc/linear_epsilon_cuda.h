// Epsilon rule of a linear layer y = x w^T + b: s = R / stab(z), z = y (the bias absorbs its share) or y - b. The way
// back is linear_back with kInput. Source: Bach et al., PLoS ONE 2015; Achtibat et al., ICML 2024, eq. 8.
#pragma once

#include "cuda_types.h"
#include "stabiliser.h"

namespace relprop {

// With kFloat32 (float32 values only) z is taken from y; any other product sums it anew from x and w, unrounded.
void linear_epsilon_share_out_cuda(DType values, DType streams, Product product,
                                   void* s,                // [targets, rows, n], streams; may be `relevance` itself
                                   const void* relevance,  // [targets, rows, n], streams
                                   const void* x,          // [rows, k], values
                                   const void* w,          // [n, k], values
                                   const void* y,          // [rows, n], values, for kFloat32
                                   const void* bias,       // [n], values, or null
                                   bool bias_takes_share, int64_t targets, int64_t rows, int64_t n, int64_t k,
                                   Stabiliser stabiliser, Stream stream);

}  // namespace relprop
