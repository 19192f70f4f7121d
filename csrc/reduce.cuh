// Sums over threads, in an order that depends on nothing but the number of threads: the same bits from run to run.
#pragma once

#include "cuda_platform.cuh"

namespace relprop {

// The sum over a warp, for every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kFullWarp, x, lanes);
  return x;
}

// The sum over a block of `threads`, for every thread; `room` is shared memory for one value per warp. All threads of
// the block call it; the room may be used again at once.
template <int threads, typename T>
__device__ __forceinline__ T block_sum(T x, T (&room)[threads / 32]) {
  static_assert(threads % 32 == 0);
  x = warp_sum(x);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x % 32 == 0) room[warp] = x;
  __syncthreads();
  T total = room[0];
#pragma unroll
  for (int i = 1; i < threads / 32; ++i) total += room[i];
  __syncthreads();
  return total;
}

}  // namespace relprop
