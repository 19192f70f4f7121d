#include "linear_gamma_cuda.h"
#include "linear_share_out.cuh"

namespace relprop {
namespace {

// With y the sums are |x||w|; without, z+ and z-.
template <typename V, bool with_y>
struct Gamma {
  StreamArray<V> p1, p2, relevance;
  const V *y, *bias;
  bool bias_takes_share;
  int64_t targets;
  float gamma;
  Divisor stab;

  // Leaves the denominator in `first` and the sign of the output in `second`.
  __device__ __forceinline__ void denominators(float& first, float& second, int64_t column, int64_t at) const {
    const float offset = bias == nullptr ? 0.0f : to_float(bias[column]);
    const float product = with_y ? to_float(y[at]) - offset : first + second;
    const float output = with_y ? to_float(y[at]) : product + offset;
    const float sign = output > 0.0f ? 1.0f : (output < 0.0f ? -1.0f : 0.0f);
    const float agreeing = with_y ? 0.5f * (product + sign * first) : (sign > 0.0f ? first : second);
    float z = product + gamma * agreeing;
    if (bias_takes_share) z += offset + (offset * sign > 0.0f ? gamma * offset : 0.0f);
    first = sign == 0.0f ? kNoShare<float> : stab(z);
    second = sign;
  }

  __device__ __forceinline__ void share(int64_t to, float first, float second, int64_t) const {
    const float s = relevance.load(to) / first;
    p1.store(to, s);
    p2.store(to, second * s);
  }
};

}  // namespace

void linear_gamma_share_out_cuda(DType values, DType streams, Product product, void* p1, void* p2,
                                 const void* relevance, const void* x, const void* w, const void* y, const void* bias,
                                 bool bias_takes_share, int64_t targets, int64_t rows, int64_t n, int64_t k,
                                 double gamma, Stabiliser stabiliser, Stream stream) {
  with_share_out_types(values, product, [&](auto how, auto value) {
    using V = typename decltype(value)::Type;
    constexpr bool kWithY = how() == Product::kFloat32;
    const bool is_float = streams == DType::kFloat32;
    const Gamma<V, kWithY> rule{{p1, is_float},
                                {p2, is_float},
                                {const_cast<void*>(relevance), is_float},
                                static_cast<const V*>(y),
                                static_cast<const V*>(bias),
                                bias_takes_share && bias != nullptr,
                                targets,
                                static_cast<float>(gamma),
                                stabiliser};
    run_share_out<how(), kWithY ? Sought::kMagnitudes : Sought::kBoth>(
        "linear_gamma_share_out", static_cast<const V*>(x), static_cast<const V*>(w), rows, n, k, rule, stream);
  });
}

}  // namespace relprop
