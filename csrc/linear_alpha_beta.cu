#include "linear_alpha_beta_cuda.h"
#include "linear_share_out.cuh"

namespace relprop {
namespace {

// With y the sums are |x||w|; without, z+ and z-.
template <typename V, bool with_y, bool with_beta>
struct AlphaBeta {
  StreamArray<V> p1, p2, relevance;
  const V *y, *bias;
  int64_t targets;
  float alpha, beta, tolerance;
  Divisor stab;

  __device__ __forceinline__ void denominators(float& first, float& second, int64_t column, int64_t at) const {
    float plus = first, minus = second, noise = 0.0f;
    if constexpr (with_y) {
      const float product = to_float(y[at]) - (bias == nullptr ? 0.0f : to_float(bias[column]));
      plus = 0.5f * (first + product);
      minus = 0.5f * (product - first);
      noise = tolerance * first;
    }
    first = plus <= noise ? kNoShare<float> : stab(plus);
    second = -minus <= noise ? kNoShare<float> : stab(minus);
  }

  __device__ __forceinline__ void share(int64_t to, float first, float second, int64_t) const {
    const float r = relevance.load(to);
    const float supporting = alpha * (r / first);
    if constexpr (with_beta) {
      const float opposing = beta * (r / second);
      p1.store(to, supporting - opposing);
      p2.store(to, supporting + opposing);
    } else {
      p1.store(to, supporting);
    }
  }
};

}  // namespace

void linear_alpha_beta_share_out_cuda(DType values, DType streams, Product product, void* p1, void* p2,
                                      const void* relevance, const void* x, const void* w, const void* y,
                                      const void* bias, int64_t targets, int64_t rows, int64_t n, int64_t k,
                                      double alpha, double beta, double tolerance, Stabiliser stabiliser,
                                      Stream stream) {
  with_share_out_types(values, product, [&](auto how, auto value) {
    using V = typename decltype(value)::Type;
    constexpr bool kWithY = how() == Product::kFloat32;
    const auto run = [&](auto with_beta) {
      constexpr bool kBeta = decltype(with_beta)::value;
      constexpr Sought kSought = kWithY ? Sought::kMagnitudes : (kBeta ? Sought::kBoth : Sought::kSupporting);
      const bool is_float = streams == DType::kFloat32;
      const AlphaBeta<V, kWithY, kBeta> rule{{p1, is_float},
                                             {p2, is_float},
                                             {const_cast<void*>(relevance), is_float},
                                             static_cast<const V*>(y),
                                             static_cast<const V*>(bias),
                                             targets,
                                             static_cast<float>(alpha),
                                             static_cast<float>(beta),
                                             static_cast<float>(tolerance),
                                             stabiliser};
      run_share_out<how(), kSought>("linear_alpha_beta_share_out", static_cast<const V*>(x), static_cast<const V*>(w),
                                    rows, n, k, rule, stream);
    };
    beta == 0.0 ? run(std::false_type()) : run(std::true_type());
  });
}

}  // namespace relprop
