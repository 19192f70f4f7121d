// Tiles of matrices in shared memory: how they lie there, and how they come from global memory.
//
// All tiles hold 64 bytes of the summed axis ("depth") of the wider operand. Rows are padded so that neither the copies
// nor any of the reads in multiply.cuh meet a bank twice.
#pragma once

#include "dtypes.cuh"

namespace relprop {

constexpr int kTile = 128;  // rows and columns of an output tile
constexpr int kGemmThreads = 256;
constexpr int kChunk = 16;  // bytes per cp.async

// An operand whose rows run along the depth ([rows, depth] in memory) or across it ([depth, columns]).
enum class Lies : int { kAlong, kAcross };

template <typename T, Lies lies, int depth, int padding>
struct Tile {
  static constexpr int kRows = lies == Lies::kAlong ? kTile : depth;
  static constexpr int kColumns = lies == Lies::kAlong ? depth : kTile;
  static constexpr int kStride = kColumns + padding;
  static constexpr int kBytes = kRows * kStride * static_cast<int>(sizeof(T));
  static_assert(kStride * sizeof(T) % kChunk == 0, "every row starts at an address that cp.async can write to");

  using Type = T;
};

// A matrix in global memory; reads beyond rows and columns give 0. `chunked`: every row starts at a multiple of 16
// bytes.
template <typename T>
struct Matrix {
  const T* data;
  int64_t rows, columns, stride;
  bool chunked;
};

inline bool rows_are_chunked(const void* data, int64_t stride, size_t itemsize) {
  return reinterpret_cast<std::uintptr_t>(data) % kChunk == 0 && stride * static_cast<int64_t>(itemsize) % kChunk == 0;
}

template <typename T>
__device__ __forceinline__ T zero();
template <>
__device__ __forceinline__ float zero<float>() {
  return 0.0f;
}
template <>
__device__ __forceinline__ bfloat16 zero<bfloat16>() {
  return {0};
}
template <>
__device__ __forceinline__ float16 zero<float16>() {
  return {0};
}

// Starts to copy a tile from (row, column) on; with all threads of the block.
template <class Shape, typename T>
__device__ __forceinline__ void load_tile(T* tile, const Matrix<T>& from, int64_t row, int64_t column) {
  constexpr int kPerChunk = kChunk / static_cast<int>(sizeof(T));
  constexpr int kChunksPerRow = Shape::kColumns / kPerChunk;
  constexpr int kChunks = Shape::kRows * kChunksPerRow;
  static_assert(kChunks % kGemmThreads == 0);
#pragma unroll
  for (int i = 0; i < kChunks / kGemmThreads; ++i) {
    const int chunk = static_cast<int>(threadIdx.x) + i * kGemmThreads;
    const int tile_row = chunk / kChunksPerRow, tile_column = chunk % kChunksPerRow * kPerChunk;
    const int64_t left = row + tile_row < from.rows ? from.columns - column - tile_column : 0;
    const int count = left >= kPerChunk ? kPerChunk : (left > 0 ? static_cast<int>(left) : 0);
    const int64_t at = (row + tile_row) * from.stride + column + tile_column;
    T* to = tile + tile_row * Shape::kStride + tile_column;
    if (from.chunked) {
      copy_async(to, count > 0 ? from.data + at : from.data, count * static_cast<int>(sizeof(T)));
    } else {
#pragma unroll
      for (int j = 0; j < kPerChunk; ++j) to[j] = j < count ? from.data[at + j] : zero<T>();
    }
  }
}

}  // namespace relprop
