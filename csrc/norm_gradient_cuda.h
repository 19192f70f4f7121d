// Gradient of layer norm and RMS norm, their statistics computed anew.
//
// With h = gradient * weight, inv = 1 / sqrt(mean(d^2) + epsilon) and d = x - mean(x) (layer norm) or x (RMS norm):
//     layer norm: out = inv (h - mean(h) - d inv^2 mean(h d))       RMS norm: out = inv (h - d inv^2 mean(h d))
#pragma once

#include "cuda_types.h"

namespace relprop {

enum class Norm : int { kLayer = 0, kRms = 1 };

void norm_gradient_cuda(DType values, DType streams,
                        void* out,             // [targets, rows, n], streams; may be `gradient` itself
                        const void* gradient,  // [targets, rows, n], streams
                        const void* x,         // [rows, n], values
                        const void* weight,    // [n], values, or null
                        int64_t targets, int64_t rows, int64_t n, double epsilon, Norm norm, Stream stream);

}  // namespace relprop
