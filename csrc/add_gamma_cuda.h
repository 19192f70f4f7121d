// Gamma rule of a residual add: R_a = a'' R / stab(a'' + b''), a'' = (1 + gamma [sign a = sign(a + b)]) a, b''
// likewise; where a + b is exactly 0 each gets one half. Source: Berend et al. 2026 (ResLRP), eq. 3.
#pragma once

#include "cuda_types.h"
#include "stabiliser.h"

namespace relprop {

void add_gamma_cuda(DType values, DType streams,
                    void* relevance_a,      // [targets, size], streams; may be `relevance` itself
                    void* relevance_b,      // [targets, size], streams; may be `relevance` itself, not `relevance_a`
                    const void* relevance,  // [targets, size], streams
                    const void* a,          // [size], values
                    const void* b,          // [size], values
                    int64_t targets, int64_t size, double gamma, Stabiliser stabiliser, Stream stream);

}  // namespace relprop
