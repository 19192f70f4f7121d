#include <algorithm>
#include <cmath>
#include <cstring>

#include "activation_gradient.h"
#include "parallel.h"

namespace relprop {
namespace {

// e^x for float in arithmetic that is vectorised: 2^n times a polynomial (Cephes). Within 2 units in the last place.
RELPROP_INLINE float exponential(float x) {
  const float bounded = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float shifted = bounded * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  float polynomial = 1.9875691500e-4f;
  polynomial = polynomial * r + 1.3981999507e-3f;
  polynomial = polynomial * r + 8.3334519073e-3f;
  polynomial = polynomial * r + 4.1665795894e-2f;
  polynomial = polynomial * r + 1.6666665459e-1f;
  polynomial = polynomial * r + 5.0000001201e-1f;
  const float mantissa = polynomial * r * r + r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127) << 23;  // the low bits of `shifted` are n; the rest is shifted out
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return x == x ? mantissa * power : x;
}

RELPROP_INLINE double exponential(double x) { return std::exp(x); }

template <typename T>
RELPROP_INLINE T sigmoid(T x) {
  return T(1) / (T(1) + exponential(-x));
}

// Phi(x), the normal distribution's integral; density: phi(x).
RELPROP_INLINE float normal(float x, float density) {
  // Abramowitz and Stegun 26.2.17: within 7.5e-8.
  const float size = x < 0.0f ? -x : x;
  const float t = 1.0f / (1.0f + 0.2316419f * size);
  float polynomial = 1.330274429f;
  polynomial = polynomial * t - 1.821255978f;
  polynomial = polynomial * t + 1.781477937f;
  polynomial = polynomial * t - 0.356563782f;
  polynomial = polynomial * t + 0.319381530f;
  const float tail = density * (polynomial * t);
  return x < 0.0f ? tail : 1.0f - tail;
}

RELPROP_INLINE double normal(double x, double) { return 0.5 * std::erfc(x * -0.70710678118654752440); }

template <typename T, Activation activation>
RELPROP_INLINE T slope(T x) {
  if constexpr (activation == Activation::kGelu) {
    const T density = T(0.39894228040143267794) * exponential(T(-0.5) * (x * x));
    return normal(x, density) + x * density;
  } else if constexpr (activation == Activation::kGeluTanh) {
    // (1 + tanh(u)) / 2 = sigmoid(2u).
    const T u = T(0.79788456080286535588) * (x + T(0.044715) * (x * x * x));
    const T half = sigmoid(T(2) * u);
    const T du = T(0.79788456080286535588) * (T(1) + T(0.134145) * (x * x));
    return half + T(2) * x * (half * (T(1) - half)) * du;
  } else {
    const T half = sigmoid(x);
    return half * (T(1) + x * (T(1) - half));
  }
}

template <typename T, Activation activation>
struct Gradient {
  Result<T> out;
  Operand<T> gradient, x;
  int64_t targets, size;

  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    T slopes[kBlock], x_block[kBlock], g_block[kBlock], out_block[kBlock];
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t count = std::min(kBlock, end - at);
      const T* x_at = x.read(at, count, x_block);
      RELPROP_VECTORISE
      for (int64_t i = 0; i < count; ++i) slopes[i] = slope<T, activation>(x_at[i]);
      for (int64_t t = 0; t < targets; ++t) {
        const int64_t offset = t * size + at;
        const T* g = gradient.read(offset, count, g_block);
        T* out_at = out.place(offset, out_block);
        RELPROP_VECTORISE
        for (int64_t i = 0; i < count; ++i) out_at[i] = g[i] * slopes[i];
        out.write(offset, count, out_at);
      }
    }
  }
};

}  // namespace

template <typename T>
void activation_gradient(Result<T> out, Operand<T> gradient, Operand<T> x, int64_t targets, int64_t size,
                         Activation activation, int threads) {
  // A slope costs about as much as sixteen elements of memory traffic: small layers are worth several threads too.
  const int64_t work = targets + 16;
  switch (activation) {
    case Activation::kGelu:
      return for_ranges(Gradient<T, Activation::kGelu>{out, gradient, x, targets, size}, size, work, threads);
    case Activation::kGeluTanh:
      return for_ranges(Gradient<T, Activation::kGeluTanh>{out, gradient, x, targets, size}, size, work, threads);
    case Activation::kSilu:
      return for_ranges(Gradient<T, Activation::kSilu>{out, gradient, x, targets, size}, size, work, threads);
  }
}

#define RELPROP_INSTANTIATE(T) \
  template void activation_gradient<T>(Result<T>, Operand<T>, Operand<T>, int64_t, int64_t, Activation, int);
RELPROP_INSTANTIATE(float)
RELPROP_INSTANTIATE(double)
#undef RELPROP_INSTANTIATE

}  // namespace relprop
