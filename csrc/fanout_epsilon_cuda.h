// Epsilon rule of a fan-out (one value read by several operations): R_in = x * sum_i(r_i / stab(x)); the plain sum
// where the stabiliser is exact. Source: the code of Chefer et al., CVPR 2021 (Clone).
#pragma once

#include "cuda_types.h"
#include "stabiliser.h"

namespace relprop {

constexpr int kMaxFanout = 16;

void fanout_epsilon_cuda(DType values, DType streams,
                         void* out,                      // [targets, size], streams; may be one of the relevances
                         const void* const* relevances,  // [count] pointers, each to [targets, size], streams
                         const void* x,                  // [size], values
                         int count,                      // 1 to kMaxFanout
                         int64_t targets, int64_t size, Stabiliser stabiliser, Stream stream);

}  // namespace relprop
