#include "add_epsilon_cuda.h"
#include "elementwise.cuh"

namespace relprop {
namespace {

template <typename V, typename S>
struct AddEpsilon {
  S *relevance_a, *relevance_b;
  const S* relevance;
  const V *a, *b;
  int64_t targets, size;
  Divisor stab;

  __device__ void operator()(Place place) const {
    const Four a_here = load_four(a, place), b_here = load_four(b, place);
    for (int64_t t = 0; t < targets; ++t) {
      const Four r = load_four(relevance + t * size, place);
      Four to_a, to_b;
      for (int i = 0; i < kFour; ++i) {
        const float share = r.v[i] / stab(a_here.v[i] + b_here.v[i]);
        to_a.v[i] = a_here.v[i] * share;
        to_b.v[i] = b_here.v[i] * share;
      }
      store_four(relevance_a + t * size, place, to_a);
      store_four(relevance_b + t * size, place, to_b);
    }
  }
};

}  // namespace

void add_epsilon_cuda(DType values, DType streams, void* relevance_a, void* relevance_b, const void* relevance,
                      const void* a, const void* b, int64_t targets, int64_t size, Stabiliser stabiliser,
                      Stream stream) {
  with_dtypes(values, streams, [&](auto value, auto streamed) {
    using V = typename decltype(value)::Type;
    using S = typename decltype(streamed)::Type;
    const AddEpsilon<V, S> rule{static_cast<S*>(relevance_a),
                                static_cast<S*>(relevance_b),
                                static_cast<const S*>(relevance),
                                static_cast<const V*>(a),
                                static_cast<const V*>(b),
                                targets,
                                size,
                                stabiliser};
    run_elementwise("add_epsilon", rule, size, aligned({relevance_a, relevance_b, relevance, a, b}), stream);
  });
}

}  // namespace relprop
