#include "dtypes.cuh"
#include "rollout_row_cuda.h"

namespace relprop {
namespace {

// A block has 32 keys (neighbouring in memory, one per lane) and sums over queries and heads in 8 strands.
constexpr int kKeys = 32;
constexpr int kStrands = 8;
using Strands = float[kStrands][kKeys];

template <typename S>
__global__ void __launch_bounds__(kKeys* kStrands)
    rollout_row_kernel(float* out, const float* row, const float* queried, const S* gradient, const S* relevance,
                       int64_t samples, int64_t heads, int64_t queries, int64_t keys) {
  RELPROP_SHARED(Strands, strands);
  const int lane = static_cast<int>(threadIdx.x) % kKeys, strand = static_cast<int>(threadIdx.x) / kKeys;
  const int64_t key = static_cast<int64_t>(blockIdx.x) * kKeys + lane;
  for (int64_t sample = blockIdx.y; sample < samples; sample += gridDim.y) {
    float sum = 0.0f;
    for (int64_t query = strand; key < keys && query < queries; query += kStrands) {
      float edge = 0.0f;
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t at = ((sample * heads + head) * queries + query) * keys + key;
        const float product = to_float(relevance[at]) * (gradient == nullptr ? 1.0f : to_float(gradient[at]));
        edge += product < 0.0f ? 0.0f : product;  // in this order a NaN stays
      }
      sum += queried[sample * queries + query] * edge;
    }
    strands[strand][lane] = sum;
    __syncthreads();
    if (strand == 0 && key < keys) {
      for (int other = 1; other < kStrands; ++other) sum += strands[other][lane];
      out[sample * keys + key] = row[sample * keys + key] + sum / static_cast<float>(heads);
    }
    __syncthreads();
  }
}

}  // namespace

void rollout_row_cuda(DType streams, float* out, const float* row, const float* queried, const void* gradient,
                      const void* relevance, int64_t samples, int64_t heads, int64_t queries, int64_t keys,
                      Stream stream) {
  if (samples == 0 || keys == 0) return;
  const dim3 grid(static_cast<unsigned>((keys + kKeys - 1) / kKeys),
                  static_cast<unsigned>(samples < 65535 ? samples : 65535));
  with_dtype(streams, [&](auto streamed) {
    using S = typename decltype(streamed)::Type;
    launch("rollout_row", rollout_row_kernel<S>, grid, dim3(kKeys * kStrands), 0, stream, out, row, queried,
           static_cast<const S*>(gradient), static_cast<const S*>(relevance), samples, heads, queries, keys);
  });
}

}  // namespace relprop
