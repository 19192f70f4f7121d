#include "linear_epsilon_cuda.h"
#include "linear_share_out.cuh"

namespace relprop {
namespace {

template <typename V>
struct Epsilon {
  StreamArray<V> s, relevance;
  const V* bias;  // null where it takes no share
  int64_t targets;
  Divisor stab;

  __device__ __forceinline__ void denominators(float& first, float&, int64_t column, int64_t) const {
    first = stab(bias == nullptr ? first : first + to_float(bias[column]));
  }

  __device__ __forceinline__ void share(int64_t to, float first, float, int64_t) const {
    s.store(to, relevance.load(to) / first);
  }
};

// From the stored output: no product at all.
struct EpsilonOfOutput {
  float* s;
  const float *relevance, *y;
  const float* bias;  // null where it takes a share (z = y) or there is none
  int64_t targets, size, n;
  Divisor stab;

  __device__ void operator()(Place place) const {
    Four z = load_four(y, place);
    for (int i = 0; i < kFour; ++i) {
      if (bias != nullptr && i < place.count) z.v[i] -= bias[(place.at + i) % n];
      z.v[i] = stab(z.v[i]);
    }
    for (int64_t t = 0; t < targets; ++t) {
      Four r = load_four(relevance + t * size, place);
      for (int i = 0; i < kFour; ++i) r.v[i] /= z.v[i];
      store_four(s + t * size, place, r);
    }
  }
};

}  // namespace

void linear_epsilon_share_out_cuda(DType values, DType streams, Product product, void* s, const void* relevance,
                                   const void* x, const void* w, const void* y, const void* bias, bool bias_takes_share,
                                   int64_t targets, int64_t rows, int64_t n, int64_t k, Stabiliser stabiliser,
                                   Stream stream) {
  with_share_out_types(values, product, [&](auto how, auto value) {
    using V = typename decltype(value)::Type;
    if constexpr (how() == Product::kFloat32) {
      const EpsilonOfOutput rule{static_cast<float*>(s),
                                 static_cast<const float*>(relevance),
                                 static_cast<const float*>(y),
                                 bias_takes_share ? nullptr : static_cast<const float*>(bias),
                                 targets,
                                 rows * n,
                                 n,
                                 stabiliser};
      run_elementwise("linear_epsilon_share_out", rule, rows * n, aligned({s, relevance, y}), stream);
    } else {
      const bool is_float = streams == DType::kFloat32;
      const Epsilon<V> rule{{s, is_float},
                            {const_cast<void*>(relevance), is_float},
                            bias_takes_share ? static_cast<const V*>(bias) : nullptr,
                            targets,
                            stabiliser};
      run_share_out<how(), Sought::kPlain>("linear_epsilon_share_out", static_cast<const V*>(x),
                                           static_cast<const V*>(w), rows, n, k, rule, stream);
    }
  });
}

}  // namespace relprop
