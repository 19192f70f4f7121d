#include <cmath>
#include <type_traits>

#include "linear_products.h"

namespace relprop {
namespace {

Matrix stream(const float* data, int64_t columns) { return {data, DType::kFloat32, columns, 1}; }

Matrix transposed(const Matrix& matrix) {
  return {matrix.data, matrix.dtype, matrix.column, matrix.row, matrix.packed};
}

// Out: float, or uint16_t for bfloat16 beside the sums that it is rounded from.
template <class Out>
struct Store : EveryTile {
  Out* out;
  float* sums;
  const float* bias;
  int64_t n;

  RELPROP_INLINE void operator()(const float* tile, const float*, int64_t row, int64_t rows, int64_t column,
                                 int64_t columns) const {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = (row + i) * n + column;
      const float* from = tile + i * kTileColumns;
      Out* to = out + at;
      RELPROP_VECTORISE
      for (int64_t j = 0; j < columns; ++j) {
        const float value = bias == nullptr ? from[j] : from[j] + bias[column + j];
        if constexpr (std::is_same_v<Out, float>) {
          to[j] = value;
        } else {
          sums[at + j] = from[j];
          to[j] = BFloat16::narrow(value);
        }
      }
    }
  }
};

template <StabiliserKind kind, bool stored>
struct Share {
  float* shares;
  const float *relevance, *y, *bias;
  int64_t targets, rows, n;
  float alpha, tolerance, epsilon;

  // Where no relevance arrives there is nothing to share out: no z+ is formed.
  RELPROP_INLINE bool wants(int64_t row, int64_t count, int64_t column, int64_t columns) const {
    for (int64_t t = 0; t < targets; ++t) {
      for (int64_t i = 0; i < count; ++i) {
        const float* from = relevance + (t * rows + row + i) * n + column;
        uint32_t any = 0;
        RELPROP_VECTORISE
        for (int64_t j = 0; j < columns; ++j) any |= bits_of<uint32_t>(from[j]) & 0x7fffffffu;
        if (any != 0) return true;
      }
    }
    return false;
  }

  // tile: |x||w|^T where the product is stored, else x w^T with |x||w|^T in tile_abs.
  RELPROP_INLINE void operator()(const float* tile, const float* tile_abs, int64_t row, int64_t count, int64_t column,
                                 int64_t columns) const {
    float denominators[kTileColumns];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (row + i) * n + column;
      const float* absolute = (stored ? tile : tile_abs) + i * kTileColumns;
      const float* product = stored ? y + at : tile + i * kTileColumns;
      const float eps = epsilon, tol = tolerance;
      RELPROP_VECTORISE
      for (int64_t j = 0; j < columns; ++j) {
        const float plain = stored && bias != nullptr ? product[j] - bias[column + j] : product[j];
        const float z = 0.5f * (absolute[j] + plain);
        denominators[j] = z <= tol * absolute[j] ? kNoShare<float> : stabilised<kind>(z, eps);
      }
      for (int64_t t = 0; t < targets; ++t) {
        const float* from = relevance + t * rows * n + at;
        float* to = shares + t * rows * n + at;
        RELPROP_VECTORISE
        for (int64_t j = 0; j < columns; ++j) to[j] = alpha * (from[j] / denominators[j]);
      }
    }
  }
};

template <DType dtype>
struct Select : EveryTile {
  float* out;
  Matrix x;
  int64_t rows, k;

  RELPROP_INLINE void operator()(const float* tile, const float* tile_abs, int64_t row, int64_t count, int64_t column,
                                 int64_t columns) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t x_at = (row + i) % rows * x.row + column;
      float* to = out + (row + i) * k + column;
      const float* c1 = tile + i * kTileColumns;
      const float* c2 = tile_abs + i * kTileColumns;
      RELPROP_VECTORISE
      for (int64_t j = 0; j < columns; ++j) {
        const float value = element<dtype>(x.data, x_at + j);
        to[j] = 0.5f * (value * c1[j] + (value < 0.0f ? -value : value) * c2[j]);
      }
    }
  }
};

}  // namespace

void linear_pack(char* packed, const Matrix& w, int64_t n, int64_t k, bool transpose, Operands operands, int threads) {
  transpose ? pack_matrix(packed, transposed(w), n, k, operands, threads)
            : pack_matrix(packed, w, k, n, operands, threads);
}

void linear_apply(float* y, const float* bias, const Linear& layer, int threads) {
  gemm({layer.rows, layer.n, layer.k}, layer.x, transposed(layer.w), layer.operands, Kind::kSingle, threads,
       Store<float>{{}, y, nullptr, bias, layer.n});
}

void linear_apply_rounded(uint16_t* y, float* sums, const float* bias, const Linear& layer, int threads) {
  gemm({layer.rows, layer.n, layer.k}, layer.x, transposed(layer.w), layer.operands, Kind::kSingle, threads,
       Store<uint16_t>{{}, y, sums, bias, layer.n});
}

void linear_transpose(float* out, const float* r, const Linear& layer, int64_t targets, int threads) {
  gemm({targets * layer.rows, layer.k, layer.n}, stream(r, layer.n), layer.w, layer.operands, Kind::kSingle, threads,
       Store<float>{{}, out, nullptr, nullptr, layer.k});
}

void linear_alpha_beta_share_out_product(float* shares, const float* relevance, const float* y, const float* bias,
                                         const Linear& layer, int64_t targets, double alpha, double tolerance,
                                         Stabiliser stabiliser, int threads) {
  with_kind(stabiliser, [&](auto kind) {
    auto run = [&](auto stored) {
      const Share<decltype(kind)::value, decltype(stored)::value> share{shares,
                                                                        relevance,
                                                                        y,
                                                                        bias,
                                                                        targets,
                                                                        layer.rows,
                                                                        layer.n,
                                                                        static_cast<float>(alpha),
                                                                        static_cast<float>(tolerance),
                                                                        static_cast<float>(stabiliser.epsilon)};
      gemm({layer.rows, layer.n, layer.k}, layer.x, transposed(layer.w), layer.operands,
           decltype(stored)::value ? Kind::kAbs : Kind::kDualAbs, threads, share);
    };
    y != nullptr ? run(std::true_type()) : run(std::false_type());
  });
}

void linear_alpha_beta_back_product(float* out, const float* shares, const Linear& layer, int64_t targets,
                                    int threads) {
  with_stored(layer.x.dtype, [&](auto dtype) {
    const Select<decltype(dtype)::value> select{{}, out, layer.x, layer.rows, layer.k};
    gemm({targets * layer.rows, layer.k, layer.n}, stream(shares, layer.n), layer.w, layer.operands, Kind::kDual,
         threads, select);
  });
}

}  // namespace relprop
