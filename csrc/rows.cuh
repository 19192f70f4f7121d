// What kernels over rows share: short rows are given to a warp each, long ones to a block.
#pragma once

#include <algorithm>

#include "dtypes.cuh"
#include "reduce.cuh"

namespace relprop {

constexpr int kRowThreads = 256;
constexpr int64_t kLongestRowOfWarp = 1024;

// The threads that work on one row: element `rank`, `rank + size`, ... are this thread's.
template <bool whole_block>
struct Team {
  static constexpr int size = whole_block ? kRowThreads : 32;

  __device__ __forceinline__ int rank() const {
    return whole_block ? static_cast<int>(threadIdx.x) : static_cast<int>(threadIdx.x) % 32;
  }

  __device__ __forceinline__ float sum(float x) const {
    if constexpr (whole_block) {
      using Room = float[kRowThreads / 32];
      RELPROP_SHARED(Room, room);
      return block_sum<kRowThreads>(x, room);
    } else {
      return warp_sum(x);
    }
  }
};

template <bool whole_block, class Body>
__global__ void __launch_bounds__(kRowThreads) rows_kernel(Body body, int64_t rows) {
  const Team<whole_block> team;
  const int64_t teams = kRowThreads / Team<whole_block>::size;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * teams + static_cast<int>(threadIdx.x) / team.size;
  if (row < rows) body(team, row);
}

// Runs body(team, row) for every row of `length` elements.
template <class Body>
void run_rows(const char* name, const Body& body, int64_t rows, int64_t length, Stream stream) {
  if (rows == 0 || length == 0) return;
  const bool whole_block = length > kLongestRowOfWarp;
  const int64_t per_block = whole_block ? 1 : kRowThreads / 32;
  const int64_t blocks = (rows + per_block - 1) / per_block;
  if (blocks > 2147483647) throw std::invalid_argument(std::string(name) + ": expected fewer than 2^31 rows");
  const auto kernel = whole_block ? rows_kernel<true, Body> : rows_kernel<false, Body>;
  launch(name, kernel, dim3(static_cast<unsigned>(blocks)), dim3(kRowThreads), 0, stream, body, rows);
}

}  // namespace relprop
