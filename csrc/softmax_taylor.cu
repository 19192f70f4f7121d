#include "elementwise.cuh"
#include "rows.cuh"
#include "softmax_taylor_cuda.h"

namespace relprop {
namespace {

template <typename V, typename S>
struct SoftmaxTaylor {
  S* out;
  const S* relevance;
  const V *logits, *probabilities;
  int64_t targets, rows, n;

  template <class Team>
  __device__ void operator()(const Team& team, int64_t row) const {
    const V *x = logits + row * n, *p = probabilities + row * n;
    for (int64_t t = 0; t < targets; ++t) {
      const S* r = relevance + (t * rows + row) * n;
      S* to = out + (t * rows + row) * n;
      float sum = 0.0f;
      for (int64_t i = team.rank(); i < n; i += team.size) sum += to_float(r[i]);
      sum = team.sum(sum);
      for (int64_t i = team.rank(); i < n; i += team.size) {
        const float logit = to_float(x[i]);
        const float finite = fabsf(logit) <= 3.402823466e38f ? logit : 0.0f;
        to[i] = from_float<S>(finite * (to_float(r[i]) - to_float(p[i]) * sum));
      }
    }
  }
};

}  // namespace

void softmax_taylor_cuda(DType values, DType streams, void* out, const void* relevance, const void* logits,
                         const void* probabilities, int64_t targets, int64_t rows, int64_t n, Stream stream) {
  with_dtypes(values, streams, [&](auto value, auto streamed) {
    using V = typename decltype(value)::Type;
    using S = typename decltype(streamed)::Type;
    const SoftmaxTaylor<V, S> rule{static_cast<S*>(out),
                                   static_cast<const S*>(relevance),
                                   static_cast<const V*>(logits),
                                   static_cast<const V*>(probabilities),
                                   targets,
                                   rows,
                                   n};
    run_rows("softmax_taylor", rule, rows, n, stream);
  });
}

}  // namespace relprop
