#include "add_gamma_cuda.h"
#include "elementwise.cuh"

namespace relprop {
namespace {

template <typename V, typename S>
struct AddGamma {
  S *relevance_a, *relevance_b;
  const S* relevance;
  const V *a, *b;
  int64_t targets, size;
  float gamma;
  Divisor stab;

  // a'' for a summand a of `total`; the signs are compared, for a product of small numbers may underflow.
  __device__ __forceinline__ float preferred(float summand, float total) const {
    const bool agrees = (summand > 0.0f && total > 0.0f) || (summand < 0.0f && total < 0.0f);
    return agrees ? (1.0f + gamma) * summand : summand;
  }

  __device__ void operator()(Place place) const {
    const Four a_here = load_four(a, place), b_here = load_four(b, place);
    for (int64_t t = 0; t < targets; ++t) {
      const Four r = load_four(relevance + t * size, place);
      Four to_a, to_b;
      for (int i = 0; i < kFour; ++i) {
        const float total = a_here.v[i] + b_here.v[i];
        const float first = preferred(a_here.v[i], total), second = preferred(b_here.v[i], total);
        const float share = r.v[i] / stab(first + second);
        const float half = 0.5f * r.v[i];
        to_a.v[i] = total == 0.0f ? half : first * share;
        to_b.v[i] = total == 0.0f ? half : second * share;
      }
      store_four(relevance_a + t * size, place, to_a);
      store_four(relevance_b + t * size, place, to_b);
    }
  }
};

}  // namespace

void add_gamma_cuda(DType values, DType streams, void* relevance_a, void* relevance_b, const void* relevance,
                    const void* a, const void* b, int64_t targets, int64_t size, double gamma, Stabiliser stabiliser,
                    Stream stream) {
  with_dtypes(values, streams, [&](auto value, auto streamed) {
    using V = typename decltype(value)::Type;
    using S = typename decltype(streamed)::Type;
    const AddGamma<V, S> rule{static_cast<S*>(relevance_a),
                              static_cast<S*>(relevance_b),
                              static_cast<const S*>(relevance),
                              static_cast<const V*>(a),
                              static_cast<const V*>(b),
                              targets,
                              size,
                              static_cast<float>(gamma),
                              stabiliser};
    run_elementwise("add_gamma", rule, size, aligned({relevance_a, relevance_b, relevance, a, b}), stream);
  });
}

}  // namespace relprop
