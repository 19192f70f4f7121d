// A linear layer's matrix products in float32 streams with what surrounds them fused, y = x w^T + b. x and w are read
// in the dtype they are stored in; `operands` says what is multiplied. See linear_alpha_beta.h for the rule's formulas.
#pragma once

#include "gemm.h"
#include "stabiliser.h"

namespace relprop {

// w [n, k] packed for the products with it, (transpose: with w^T), into panels of kTileColumns columns.
void linear_pack(char* packed, const Matrix& w, int64_t n, int64_t k, bool transpose, Operands operands, int threads);

// A linear layer: x [rows, k], w [n, k]. w.packed: of w^T for apply and share-out, of w for the other two.
struct Linear {
  Matrix x, w;
  int64_t rows, k, n;
  Operands operands;
};

// y = x w^T + bias.
void linear_apply(float* y,           // [rows, n]
                  const float* bias,  // [n] or null
                  const Linear& layer, int threads);

// sums = x w^T, and y = sums + bias rounded to bfloat16.
void linear_apply_rounded(uint16_t* y,        // [rows, n]
                          float* sums,        // [rows, n]
                          const float* bias,  // [n] or null
                          const Linear& layer, int threads);

// r w, the way back of the gradient.
void linear_transpose(float* out,      // [targets, rows, k]
                      const float* r,  // [targets, rows, n]
                      const Linear& layer, int64_t targets, int threads);

// alpha R / stab(z+), z+ = (|x||w|^T + x w^T) / 2, with |x||w|^T never in memory. A z+ that is not above
// tolerance * |x||w|^T counts as 0: its share is 0.
void linear_alpha_beta_share_out_product(float* shares,           // [targets, rows, n]; may be `relevance` itself
                                         const float* relevance,  // [targets, rows, n]
                                         const float* y,     // [rows, n] with the bias, or null: x w^T is formed too
                                         const float* bias,  // [n] or null, of y
                                         const Linear& layer, int64_t targets, double alpha, double tolerance,
                                         Stabiliser stabiliser, int threads);

// (x (s w) + |x| (s |w|)) / 2: both products from one pass over s and w.
void linear_alpha_beta_back_product(float* out,           // [targets, rows, k]
                                    const float* shares,  // [targets, rows, n]
                                    const Linear& layer, int64_t targets, int threads);

}  // namespace relprop
