#include "elementwise.cuh"
#include "matmul_half_cuda.h"

namespace relprop {
namespace {

template <typename V, typename S>
struct Share {
  S* s;
  const S* relevance;
  const V* z;
  int64_t targets, size;
  Divisor stab;

  __device__ void operator()(Place place) const {
    const Four z_here = load_four(z, place);
    for (int64_t t = 0; t < targets; ++t) {
      Four r = load_four(relevance + t * size, place);
      for (int i = 0; i < kFour; ++i) r.v[i] /= stab(z_here.v[i]);
      store_four(s + t * size, place, r);
    }
  }
};

template <typename V, typename S>
struct AttentionShares {
  S *s_prime, *relevance;
  const V* attention;
  const S* sv;
  const V* dots;
  int64_t targets, size;
  Divisor stab;

  __device__ void operator()(Place place) const {
    const Four a = load_four(attention, place), z = load_four(dots, place);
    for (int64_t t = 0; t < targets; ++t) {
      Four half = load_four(sv + t * size, place);
      for (int i = 0; i < kFour; ++i) half.v[i] *= 0.5f * a.v[i];
      if (relevance != nullptr) store_four(relevance + t * size, place, half);
      for (int i = 0; i < kFour; ++i) half.v[i] /= stab(z.v[i]);
      store_four(s_prime + t * size, place, half);
    }
  }
};

}  // namespace

void matmul_half_share_cuda(DType values, DType streams, void* s, const void* relevance, const void* z, int64_t targets,
                            int64_t size, Stabiliser stabiliser, Stream stream) {
  with_dtypes(values, streams, [&](auto value, auto streamed) {
    using V = typename decltype(value)::Type;
    using S = typename decltype(streamed)::Type;
    const Share<V, S> rule{
        static_cast<S*>(s), static_cast<const S*>(relevance), static_cast<const V*>(z), targets, size, stabiliser};
    run_elementwise("matmul_half_share", rule, size, aligned({s, relevance, z}), stream);
  });
}

void matmul_half_attention_shares_cuda(DType values, DType streams, void* s_prime, void* relevance,
                                       const void* attention, const void* sv, const void* dots, int64_t targets,
                                       int64_t size, Stabiliser stabiliser, Stream stream) {
  with_dtypes(values, streams, [&](auto value, auto streamed) {
    using V = typename decltype(value)::Type;
    using S = typename decltype(streamed)::Type;
    const AttentionShares<V, S> rule{static_cast<S*>(s_prime),
                                     static_cast<S*>(relevance),
                                     static_cast<const V*>(attention),
                                     static_cast<const S*>(sv),
                                     static_cast<const V*>(dots),
                                     targets,
                                     size,
                                     stabiliser};
    run_elementwise("matmul_half_attention_shares", rule, size, aligned({s_prime, relevance, attention, sv, dots}),
                    stream);
  });
}

}  // namespace relprop
