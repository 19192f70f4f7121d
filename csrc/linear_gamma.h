// Gamma rule of a linear layer for outputs of either sign, around its matrix products.
//
// With z = x w^T, absz = |x||w|^T and sign = sign(z + b), contributions of the output's sign weigh 1 + gamma:
//     Z = z + gamma/2 (z + sign absz) + [the bias's part: b + gamma (b+ or b-)]        s = R |sign| / stab(Z)
//     R_in = (1 + gamma/2) x (s w) + gamma/2 |x| ((s sign) |w|) = (x (p1 w) + |x| (p2 |w|)) / 2
// with p1 = (2 + gamma) s and p2 = gamma s sign, so that linear_alpha_beta_select ends the way back.
// Source: Montavon et al. 2019, in the form for either sign of Anders et al. 2021 (zennit).
#pragma once

#include <cstdint>

#include "dtype.h"
#include "stabiliser.h"

namespace relprop {

template <typename T>
void linear_gamma_share_out(Result<T> p1,          // [targets, rows, n]; may be `relevance` itself
                            Result<T> p2,          // [targets, rows, n]; may be `relevance` itself, not `p1`
                            Operand<T> relevance,  // [targets, rows, n]
                            Operand<T> y,          // [rows, n], with the bias where `biased`
                            Operand<T> bias,       // [n] or null
                            Operand<T> absz,       // [rows, n], without the bias
                            int64_t targets, int64_t rows, int64_t n, double gamma,
                            bool biased,      // whether y has the bias in it
                            bool bias_share,  // whether the bias takes a share
                            Stabiliser stabiliser, int threads);

}  // namespace relprop
