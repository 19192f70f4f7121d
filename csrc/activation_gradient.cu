#include "activation_gradient_cuda.h"
#include "elementwise.cuh"

namespace relprop {
namespace {

__device__ __forceinline__ float gelu_slope(float x) {
  constexpr float kInverseSqrt2 = 0.70710678118654752f, kInverseSqrt2Pi = 0.39894228040143268f;
  const float cumulative = 0.5f * erfcf(-x * kInverseSqrt2);
  return cumulative + x * kInverseSqrt2Pi * expf(-0.5f * x * x);
}

__device__ __forceinline__ float gelu_tanh_slope(float x) {
  constexpr float kScale = 0.79788456080286536f, kCubic = 0.044715f;
  const float inner = tanhf(kScale * (x + kCubic * x * x * x));
  const float fall = 1.0f - inner * inner;
  // Where tanh is flat x * x may be infinite.
  const float along = fall == 0.0f ? 0.0f : 0.5f * x * fall * kScale * (1.0f + 3.0f * kCubic * x * x);
  return 0.5f * (1.0f + inner) + along;
}

__device__ __forceinline__ float silu_slope(float x) {
  const float sigmoid = 1.0f / (1.0f + expf(-x));
  return sigmoid * (1.0f + x * (1.0f - sigmoid));
}

template <typename V, typename S>
struct ActivationGradient {
  S* out;
  const S* gradient;
  const V* x;
  int64_t targets, size;
  Activation activation;

  __device__ __forceinline__ float slope(float at) const {
    switch (activation) {
      case Activation::kGelu:
        return gelu_slope(at);
      case Activation::kGeluTanh:
        return gelu_tanh_slope(at);
      default:
        return silu_slope(at);
    }
  }

  __device__ void operator()(Place place) const {
    Four slopes = load_four(x, place);
    for (int i = 0; i < kFour; ++i) slopes.v[i] = slope(slopes.v[i]);
    for (int64_t t = 0; t < targets; ++t) {
      Four g = load_four(gradient + t * size, place);
      for (int i = 0; i < kFour; ++i) g.v[i] *= slopes.v[i];
      store_four(out + t * size, place, g);
    }
  }
};

}  // namespace

void activation_gradient_cuda(DType values, DType streams, void* out, const void* gradient, const void* x,
                              int64_t targets, int64_t size, Activation activation, Stream stream) {
  with_dtypes(values, streams, [&](auto value, auto streamed) {
    using V = typename decltype(value)::Type;
    using S = typename decltype(streamed)::Type;
    const ActivationGradient<V, S> rule{
        static_cast<S*>(out), static_cast<const S*>(gradient), static_cast<const V*>(x), targets, size, activation};
    run_elementwise("activation_gradient", rule, size, aligned({out, gradient, x}), stream);
  });
}

}  // namespace relprop
