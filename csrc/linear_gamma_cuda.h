// Gamma rule of a linear layer y = x w^T + b, for inputs and outputs of either sign: z = x w + gamma z+ (+ b + gamma
// b+) for y > 0 and x w + gamma z- (+ b + gamma b-) for y < 0; p1 = R / stab(z), p2 = sign(y) p1, both 0 where y is 0.
// The way back is linear_back with kHalves and factors 1 + gamma / 2 and gamma / 2. Source: Montavon et al. 2019, in
// the form for either sign of Anders et al. 2021 (zennit).
#pragma once

#include "cuda_types.h"
#include "stabiliser.h"

namespace relprop {

// With kFloat32 (float32 values only) x w = y - b is read; any other product sums it anew from x and w, unrounded.
void linear_gamma_share_out_cuda(DType values, DType streams, Product product,
                                 void* p1,               // [targets, rows, n], streams; may be `relevance` itself
                                 void* p2,               // [targets, rows, n], streams
                                 const void* relevance,  // [targets, rows, n], streams
                                 const void* x,          // [rows, k], values
                                 const void* w,          // [n, k], values
                                 const void* y,          // [rows, n], values, for kFloat32
                                 const void* bias,       // [n], values, or null
                                 bool bias_takes_share, int64_t targets, int64_t rows, int64_t n, int64_t k,
                                 double gamma, Stabiliser stabiliser, Stream stream);

}  // namespace relprop
