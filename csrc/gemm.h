// Matrix products with the work around them fused: operands are read once, transformed while they are packed, and the
// result is handed to an epilogue while it is still in the first-level cache.
//
//     C = A B  or  |A||B|      A [m, depth], B [depth, n]
//     C1 = A B, C2 = f(A) |B|  both from one pass over A and B ("dual"), f as is or absolute value
//
// B, usually a weight, may be given packed beforehand: it is then not converted and rearranged at every call.
// Work on zeros is left out: a tile of rows skips the chunks in which it is zero, which changes no bit of a result (but
// hides an infinite or NaN element of B behind them), and an epilogue may decline a tile.
//
// float32 accumulation. Sums over the depth are cut into chunks of kChunk that are summed in order, so results do not
// depend on the number of threads; they do depend on the instruction set (fused multiply-adds, or bfloat16 operands).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "dtype.h"
#include "half.h"
#include "isa.h"
#include "parallel.h"

namespace relprop {

// A matrix in memory: element (i, j) is at i * row + j * column elements; one of the two strides is 1.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t row, column;           // strides, in elements
  const char* packed = nullptr;  // the same matrix as pack_matrix leaves it, for the operands of the product
};

// What the products are made of: float32, or bfloat16 operands (rounded to nearest even while packed).
enum class Operands : int { kFloat32 = 0, kBFloat16 = 1 };

// Whether this CPU has a micro-kernel for these operands that is worth calling (AVX-512, AVX512-BF16).
bool gemm_fast(Operands operands);

constexpr int kTileColumns = 32;
constexpr int kChunkBytes = 1024;                   // of one row of A in a chunk
constexpr int kRowBytes = kChunkBytes + 64;         // apart, so that rows do not meet in one cache set
constexpr int64_t kPackedBytes = int64_t{4} << 20;  // of A at a time

// tile (and tile_abs): [rows][kTileColumns], added to. a: packed rows, kRowBytes apart; b: packed columns.
// steps: 32-bit elements of a row, each one float32 or two bfloat16.
using MicroKernel = void (*)(float* tile, float* tile_abs, const char* a, const char* b, int64_t steps);

struct GemmKernels {
  int rows;            // of the largest tile
  MicroKernel of[15];  // by number of rows, 1 to `rows`
};

// Kinds of product: A B alone; |A| |B| alone; A B and A |B|; A B and |A| |B|.
enum class Kind : int { kSingle = 0, kAbs = 1, kDual = 2, kDualAbs = 3 };

constexpr bool is_dual(Kind kind) { return kind == Kind::kDual || kind == Kind::kDualAbs; }

GemmKernels gemm_kernels(Operands operands, Kind kind);

// Packs rows first + [begin, end) of a matrix, depth elements each, of a block of `rows` rows, kRowBytes apart:
// [chunk][row][...]. Depth is padded with zeros to whole steps. filled: [chunk][row], 0 where a row has zeros only.
void pack_rows(char* packed, uint8_t* filled, const Matrix& a, int64_t first, int64_t rows, int64_t begin, int64_t end,
               int64_t depth, Operands operands, bool abs);

// Packs kTileColumns columns from `column` on (zeros beyond n), a panel: [step][kTileColumns] elements of 32 bits.
void pack_columns(char* packed, const Matrix& b, int64_t column, int64_t n, int64_t depth, Operands operands);

// Steps of a depth, and bytes of a panel of it.
constexpr int64_t steps_of(int64_t depth, Operands operands) {
  return operands == Operands::kFloat32 ? depth : (depth + 1) / 2;
}
constexpr int64_t panel_bytes(int64_t depth, Operands operands) { return steps_of(depth, operands) * kTileColumns * 4; }

// All panels of b [depth, n], one after the other.
void pack_matrix(char* packed, const Matrix& b, int64_t n, int64_t depth, Operands operands, int threads);

// Asks for one part of the memory that the panel from `column` on will be read from.
void prefetch_columns(const Matrix& b, int64_t column, int64_t n, int64_t depth, Operands operands, int64_t part,
                      int64_t parts);

// Buffers that only grow and live as long as their thread: for one piece of work, and for all pieces of a call.
char* thread_buffer(int64_t bytes);
char* shared_buffer(int64_t bytes);

// Element `i` of a run of elements, as float.
template <DType dtype>
RELPROP_INLINE float element(const void* data, int64_t i) {
  if constexpr (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  if constexpr (dtype == DType::kBFloat16) return BFloat16::widen(bits);
  return Float16::widen(bits);
}

template <DType dtype>
RELPROP_INLINE const void* offset(const void* data, int64_t elements) {
  return static_cast<const char*>(data) + elements * (dtype == DType::kFloat32 ? 4 : 2);
}

// Calls function(std::integral_constant<DType, dtype>()), so that loops are compiled for one of the three.
template <class Function>
void with_stored(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kBFloat16:
      return function(std::integral_constant<DType, DType::kBFloat16>());
    case DType::kFloat16:
      return function(std::integral_constant<DType, DType::kFloat16>());
    default:
      return function(std::integral_constant<DType, DType::kFloat32>());
  }
}

struct Sizes {
  int64_t m, n, depth;
};

// An epilogue that declines no tile.
struct EveryTile {
  static constexpr bool wants(int64_t, int64_t, int64_t, int64_t) { return true; }
};

namespace gemm_detail {

RELPROP_INLINE bool some_filled(const uint8_t* filled, int rows) {
  uint8_t any = 0;
  for (int i = 0; i < rows; ++i) any |= filled[i];
  return any != 0;
}

template <class Epilogue>
struct Tiles {
  const Epilogue& epilogue;
  const GemmKernels kernels;
  const Matrix& b;
  const char* packed;     // rows of A from `first` on
  const uint8_t* filled;  // of them
  Operands operands;
  bool dual;
  Sizes sizes;
  int64_t first, rows;  // of A, in this block
  int64_t row_pieces;   // the block's rows are cut into this many pieces
  int64_t ahead;        // panels from the one at work to the next that this thread may take

  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    const int64_t steps = steps_of(sizes.depth, operands);
    const int64_t chunk_steps = kChunkBytes / 4;
    const int64_t chunks = (steps + chunk_steps - 1) / chunk_steps;
    const int64_t bytes = panel_bytes(sizes.depth, operands);
    char* own = b.packed == nullptr ? thread_buffer(bytes) : nullptr;
    int64_t held = -1;
    alignas(64) float tile[15 * kTileColumns];
    alignas(64) float tile_abs[15 * kTileColumns];
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t column = piece / row_pieces * kTileColumns;
      const int64_t columns = std::min<int64_t>(kTileColumns, sizes.n - column);
      const char* panel = own != nullptr ? own : b.packed + column / kTileColumns * bytes;
      const int64_t part = piece % row_pieces;
      const int64_t row_begin = rows * part / row_pieces, row_end = rows * (part + 1) / row_pieces;
      const int64_t count = row_end - row_begin;
      const int64_t tiles = (count + kernels.rows - 1) / kernels.rows;
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t at = row_begin + count * i / tiles;
        const int height = static_cast<int>(row_begin + count * (i + 1) / tiles - at);
        std::memset(tile, 0, sizeof(float) * height * kTileColumns);
        if (dual) std::memset(tile_abs, 0, sizeof(float) * height * kTileColumns);
        if (epilogue.wants(first + at, height, column, columns)) {
          if (own != nullptr && column != held) pack_columns(own, b, column, sizes.n, sizes.depth, operands);
          held = column;
          if (part == 0) prefetch_columns(b, column + ahead * kTileColumns, sizes.n, sizes.depth, operands, i, tiles);
          for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            if (!some_filled(filled + chunk * rows + at, height)) continue;
            const int64_t from = chunk * chunk_steps;
            kernels.of[height](tile, tile_abs, packed + (chunk * rows + at) * kRowBytes,
                               panel + from * kTileColumns * 4, std::min(chunk_steps, steps - from));
          }
        }
        epilogue(tile, tile_abs, first + at, height, column, columns);
      }
    }
  }
};

struct PackRows {
  char* packed;
  uint8_t* filled;
  const Matrix& a;
  int64_t first, rows, depth;
  Operands operands;
  bool abs;

  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    pack_rows(packed, filled, a, first, rows, begin, end, depth, operands, abs);
  }
};

}  // namespace gemm_detail

// Runs the product, and epilogue(tile, tile_abs, row, rows, column, columns) on every finished tile: `rows` rows of
// kTileColumns floats, of which `columns` belong to the result. tile_abs: only of a dual kind. Where
// epilogue.wants(row, rows, column, columns) is false the tile is left at 0.
template <class Epilogue>
void gemm(const Sizes& sizes, const Matrix& a, const Matrix& b, Operands operands, Kind kind, int threads,
          const Epilogue& epilogue) {
  const GemmKernels kernels = gemm_kernels(operands, kind);
  const int64_t steps = steps_of(sizes.depth, operands);
  const int64_t chunks = std::max<int64_t>(1, (steps + kChunkBytes / 4 - 1) / (kChunkBytes / 4));
  const int64_t block = std::max<int64_t>(64, kPackedBytes / (chunks * kRowBytes));
  const int64_t packed_rows = std::min(sizes.m, block) * chunks;
  char* packed = shared_buffer(packed_rows * (kRowBytes + 1));
  uint8_t* filled = reinterpret_cast<uint8_t*>(packed + packed_rows * kRowBytes);
  const int64_t panels = (sizes.n + kTileColumns - 1) / kTileColumns;
  for (int64_t first = 0; first < sizes.m; first += block) {
    const int64_t rows = std::min(block, sizes.m - first);
    for_ranges(gemm_detail::PackRows{packed, filled, a, first, rows, sizes.depth, operands, kind == Kind::kAbs}, rows,
               sizes.depth, threads);
    // Enough pieces to even out the threads, of enough rows to be worth packing the columns once more.
    const int64_t wanted = (4 * threads + panels - 1) / panels;
    const int64_t row_pieces = std::max<int64_t>(1, std::min(wanted, rows / 64));
    const gemm_detail::Tiles<Epilogue> tiles{epilogue,      kernels, b,     packed, filled,     operands,
                                             is_dual(kind), sizes,   first, rows,   row_pieces, threads};
    run_pieces(range_function<gemm_detail::Tiles<Epilogue>>(), &tiles, panels * row_pieces, 1, threads);
  }
}

}  // namespace relprop
