#include "elementwise.cuh"
#include "norm_gradient_cuda.h"
#include "rows.cuh"

namespace relprop {
namespace {

template <typename V, typename S>
struct NormGradient {
  S* out;
  const S* gradient;
  const V *x, *weight;
  int64_t targets, rows, n;
  float epsilon;
  Norm norm;

  template <class Team>
  __device__ __forceinline__ float mean(const Team& team, const V* at) const {
    float sum = 0.0f;
    for (int64_t i = team.rank(); i < n; i += team.size) sum += to_float(at[i]);
    return team.sum(sum) / static_cast<float>(n);
  }

  template <class Team>
  __device__ __forceinline__ float inverse_deviation(const Team& team, const V* at, float centre) const {
    float squares = 0.0f;
    for (int64_t i = team.rank(); i < n; i += team.size) {
      const float d = to_float(at[i]) - centre;
      squares += d * d;
    }
    return 1.0f / sqrtf(team.sum(squares) / static_cast<float>(n) + epsilon);
  }

  __device__ __forceinline__ float weighted(const S* g, int64_t i) const {
    return weight == nullptr ? to_float(g[i]) : to_float(g[i]) * to_float(weight[i]);
  }

  template <class Team>
  __device__ void operator()(const Team& team, int64_t row) const {
    const V* at = x + row * n;
    const float centre = norm == Norm::kLayer ? mean(team, at) : 0.0f;
    const float inverse = inverse_deviation(team, at, centre);
    for (int64_t t = 0; t < targets; ++t) {
      const S* g = gradient + (t * rows + row) * n;
      S* to = out + (t * rows + row) * n;
      float sum = 0.0f, along = 0.0f;
      for (int64_t i = team.rank(); i < n; i += team.size) {
        const float h = weighted(g, i);
        sum += h;
        along += h * (to_float(at[i]) - centre);
      }
      const float offset = norm == Norm::kLayer ? team.sum(sum) / static_cast<float>(n) : 0.0f;
      const float slope = team.sum(along) / static_cast<float>(n) * inverse * inverse;
      for (int64_t i = team.rank(); i < n; i += team.size) {
        to[i] = from_float<S>(inverse * (weighted(g, i) - offset - (to_float(at[i]) - centre) * slope));
      }
    }
  }
};

}  // namespace

void norm_gradient_cuda(DType values, DType streams, void* out, const void* gradient, const void* x, const void* weight,
                        int64_t targets, int64_t rows, int64_t n, double epsilon, Norm norm, Stream stream) {
  with_dtypes(values, streams, [&](auto value, auto streamed) {
    using V = typename decltype(value)::Type;
    using S = typename decltype(streamed)::Type;
    const NormGradient<V, S> rule{static_cast<S*>(out),
                                  static_cast<const S*>(gradient),
                                  static_cast<const V*>(x),
                                  static_cast<const V*>(weight),
                                  targets,
                                  rows,
                                  n,
                                  static_cast<float>(epsilon),
                                  norm};
    run_rows("norm_gradient", rule, rows, n, stream);
  });
}

}  // namespace relprop
