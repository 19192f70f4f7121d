// Gamma rule of an add y = a + b: R_a = a'' R / stab(a'' + b''), a'' = (1 + gamma [sign a = sign(a + b)]) a, b''
// likewise; where a + b is exactly 0 each gets one half.
// Source: Berend et al. 2026 (ResLRP), eq. 3.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "stabiliser.h"

namespace relprop {

template <typename T>
void add_gamma(Result<T> relevance_a,  // [targets, batch, size] or null; may be `relevance` itself
               Result<T> relevance_b,  // [targets, batch, size] or null; may be `relevance` itself, not `relevance_a`
               Operand<T> relevance,   // [targets, batch, size]
               Operand<T> a,           // [batch, size]
               Operand<T> b,           // [b_batch, size]
               int64_t targets, int64_t batch, int64_t b_batch,  // b_batch is batch or 1 (the same b for each)
               int64_t size, double gamma, Stabiliser stabiliser, int threads);

}  // namespace relprop
