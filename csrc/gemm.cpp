#include "gemm.h"

#include <cstdlib>
#include <new>

#if RELPROP_X86
#include <immintrin.h>
#endif

#define RELPROP_TARGET_BF16 __attribute__((target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16")))

namespace relprop {
namespace {

constexpr uint32_t kAll = 0xffffffffu, kNoSign = 0x7fffffffu;

struct Buffer {
  char* data = nullptr;
  int64_t size = 0;
  ~Buffer() { std::free(data); }

  char* at_least(int64_t bytes) {
    if (bytes > size) {
      std::free(data);
      const int64_t rounded = (bytes + 63) / 64 * 64;
      data = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(rounded)));
      size = data == nullptr ? 0 : rounded;
      if (data == nullptr) throw std::bad_alloc();
    }
    return data;
  }
};

// Returns whether there is anything but zeros.
template <Operands operands, DType dtype>
RELPROP_INLINE bool pack_row(char* out, const void* row, int64_t count, uint32_t mask) {
  if constexpr (operands == Operands::kFloat32) {
    uint32_t* to = reinterpret_cast<uint32_t*>(out);
    uint32_t any = 0;
    RELPROP_VECTORISE
    for (int64_t i = 0; i < count; ++i) {
      to[i] = bits_of<uint32_t>(element<dtype>(row, i)) & mask;
      any |= to[i] & kNoSign;
    }
    return any != 0;
  } else {
    uint16_t* to = reinterpret_cast<uint16_t*>(out);
    const uint16_t mask16 = static_cast<uint16_t>(mask >> 16);
    uint16_t any = 0;
    RELPROP_VECTORISE
    for (int64_t i = 0; i < count; ++i) {
      to[i] = BFloat16::narrow(element<dtype>(row, i)) & mask16;
      any |= to[i] & 0x7fffu;
    }
    if (count % 2 != 0) to[count] = 0;
    return any != 0;
  }
}

template <Operands operands, DType dtype>
struct RowPacker {
  char* packed;
  uint8_t* filled;
  const Matrix& a;
  int64_t first, rows, depth;
  uint32_t mask;

  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    constexpr int64_t kDepth = kChunkBytes / (operands == Operands::kFloat32 ? 4 : 2);
    for (int64_t row = begin; row < end; ++row) {
      const void* from = offset<dtype>(a.data, (first + row) * a.row);
      for (int64_t k = 0; k < depth; k += kDepth) {
        const int64_t at = (k / kDepth) * rows + row;
        filled[at] = pack_row<operands, dtype>(packed + at * kRowBytes, offset<dtype>(from, k),
                                               std::min(kDepth, depth - k), mask);
      }
    }
  }
};

#if RELPROP_X86
// gcc 12 takes the undefined pass-through operand of its own AVX-512 shuffles for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

// to[s * kTileColumns + j] = block[j][s], for 16 steps and columns.
RELPROP_TARGET_AVX512 void transpose_16(uint32_t* to, const uint32_t (*block)[16]) {
  __m512i row[16], pair[16];
#pragma GCC unroll 16
  for (int j = 0; j < 16; ++j) row[j] = _mm512_load_si512(block[j]);
#pragma GCC unroll 8
  for (int j = 0; j < 16; j += 2) {
    pair[j] = _mm512_unpacklo_epi32(row[j], row[j + 1]);
    pair[j + 1] = _mm512_unpackhi_epi32(row[j], row[j + 1]);
  }
  // row[4 g + c]: of columns 4 g to 4 g + 3, steps c, c + 4, c + 8, c + 12.
#pragma GCC unroll 4
  for (int g = 0; g < 16; g += 4) {
    row[g] = _mm512_unpacklo_epi64(pair[g], pair[g + 2]);
    row[g + 1] = _mm512_unpackhi_epi64(pair[g], pair[g + 2]);
    row[g + 2] = _mm512_unpacklo_epi64(pair[g + 1], pair[g + 3]);
    row[g + 3] = _mm512_unpackhi_epi64(pair[g + 1], pair[g + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i low01 = _mm512_shuffle_i32x4(row[c], row[c + 4], 0x88);
    const __m512i high01 = _mm512_shuffle_i32x4(row[c], row[c + 4], 0xdd);
    const __m512i low23 = _mm512_shuffle_i32x4(row[c + 8], row[c + 12], 0x88);
    const __m512i high23 = _mm512_shuffle_i32x4(row[c + 8], row[c + 12], 0xdd);
    _mm512_storeu_si512(to + (c + 0) * kTileColumns, _mm512_shuffle_i32x4(low01, low23, 0x88));
    _mm512_storeu_si512(to + (c + 8) * kTileColumns, _mm512_shuffle_i32x4(low01, low23, 0xdd));
    _mm512_storeu_si512(to + (c + 4) * kTileColumns, _mm512_shuffle_i32x4(high01, high23, 0x88));
    _mm512_storeu_si512(to + (c + 12) * kTileColumns, _mm512_shuffle_i32x4(high01, high23, 0xdd));
  }
}

#pragma GCC diagnostic pop
#endif

template <Operands operands, DType dtype>
struct ColumnPacker {
  char* packed;
  const Matrix& b;
  int64_t column, n, depth;

  RELPROP_INLINE void operator()(int64_t, int64_t) const {
    const int64_t columns = std::min<int64_t>(kTileColumns, n - column);
    b.column == 1 ? along_rows(columns) : along_columns(columns);
  }

  // Elements of one step lie together in memory.
  RELPROP_INLINE void along_rows(int64_t columns) const {
    constexpr int kPerStep = operands == Operands::kFloat32 ? 1 : 2;
    for (int64_t k = 0; k < depth; k += kPerStep) {
      char* to = packed + (k / kPerStep) * kTileColumns * 4;
      const void* row = offset<dtype>(b.data, k * b.row + column);
      if (columns < kTileColumns) std::memset(to, 0, kTileColumns * 4);
      if constexpr (kPerStep == 1) {
        pack_row<operands, dtype>(to, row, columns, kAll);
      } else {
        uint32_t* pairs = reinterpret_cast<uint32_t*>(to);
        const bool last = k + 1 == depth;
        const void* next = last ? row : offset<dtype>(row, b.row);
        const uint32_t next_mask = last ? 0u : 0xffff0000u;
        RELPROP_VECTORISE
        for (int64_t i = 0; i < columns; ++i) {
          const uint32_t low = BFloat16::narrow(element<dtype>(row, i));
          const uint32_t high = static_cast<uint32_t>(BFloat16::narrow(element<dtype>(next, i))) << 16;
          pairs[i] = low | (high & next_mask);
        }
      }
    }
  }

  // Steps of one column lie together: a block of 16 steps of every column is packed as rows, then transposed.
  RELPROP_INLINE void along_columns(int64_t columns) const {
    constexpr int kPerStep = operands == Operands::kFloat32 ? 1 : 2;
    constexpr int64_t kSteps = 16;
    alignas(64) uint32_t block[kTileColumns][kSteps];
    if (columns < kTileColumns) std::memset(block, 0, sizeof block);
    const int64_t steps = (depth + kPerStep - 1) / kPerStep;
    for (int64_t step = 0; step < steps; step += kSteps) {
      const int64_t k = step * kPerStep;
      const int64_t count = std::min(kSteps * kPerStep, depth - k);
      for (int64_t j = 0; j < columns; ++j) {
        const void* from = offset<dtype>(b.data, k + (column + j) * b.column);
        pack_row<operands, dtype>(reinterpret_cast<char*>(block[j]), from, count, kAll);
      }
      uint32_t* to = reinterpret_cast<uint32_t*>(packed) + step * kTileColumns;
      transpose_block(to, block, std::min(kSteps, steps - step));
    }
  }

  static void transpose_block(uint32_t* to, const uint32_t (*block)[16], int64_t steps) {
#if RELPROP_X86
    if (steps == 16 && active_isa() == Isa::kAvx512) {
      transpose_16(to, block);
      transpose_16(to + 16, block + 16);
      return;
    }
#endif
    for (int64_t s = 0; s < steps; ++s) {
      for (int j = 0; j < kTileColumns; ++j) to[s * kTileColumns + j] = block[j][s];
    }
  }
};

template <template <Operands, DType> class Packer, class... Arguments>
void pack(int64_t begin, int64_t end, Operands operands, DType dtype, const Arguments&... arguments) {
  auto with = [&](auto o, auto s) {
    const Packer<decltype(o)::value, decltype(s)::value> packer{arguments...};
    range_function<Packer<decltype(o)::value, decltype(s)::value>>()(&packer, begin, end);
  };
  with_stored(dtype, [&](auto s) {
    operands == Operands::kFloat32 ? with(std::integral_constant<Operands, Operands::kFloat32>(), s)
                                   : with(std::integral_constant<Operands, Operands::kBFloat16>(), s);
  });
}

// ---- micro-kernels ----

template <Operands operands, Kind kind, int rows>
void micro_portable(float* tile, float* tile_abs, const char* a, const char* b, int64_t steps) {
  constexpr int kParts = operands == Operands::kFloat32 ? 1 : 2;
  auto part = [](uint32_t bits, int p) {
    if constexpr (kParts == 1) return bits_of<float>(bits);
    return bits_of<float>(p == 0 ? bits << 16 : bits & 0xffff0000u);
  };
  for (int64_t s = 0; s < steps; ++s) {
    const uint32_t* columns = reinterpret_cast<const uint32_t*>(b) + s * kTileColumns;
    for (int i = 0; i < rows; ++i) {
      uint32_t bits;
      std::memcpy(&bits, a + i * kRowBytes + s * 4, 4);
      for (int p = 0; p < kParts; ++p) {
        const float left = part(bits, p);
        const float left_abs = kind == Kind::kDualAbs ? bits_of<float>(bits_of<uint32_t>(left) & kNoSign) : left;
        for (int j = 0; j < kTileColumns; ++j) {
          const float signed_right = part(columns[j], p);
          const float right_abs = bits_of<float>(bits_of<uint32_t>(signed_right) & kNoSign);
          tile[i * kTileColumns + j] += left * (kind == Kind::kAbs ? right_abs : signed_right);
          if (is_dual(kind)) tile_abs[i * kTileColumns + j] += left_abs * right_abs;
        }
      }
    }
  }
}

#if RELPROP_X86

template <Kind kind, int rows>
RELPROP_TARGET_AVX512 void micro_float32(float* tile, float* tile_abs, const char* a, const char* b, int64_t steps) {
  constexpr bool kDual = is_dual(kind);
  const __m512 no_sign = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff));
  __m512 sum[rows][2], sum_abs[kDual ? rows : 1][2];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    if constexpr (kDual) sum_abs[i][0] = sum_abs[i][1] = _mm512_setzero_ps();
  }
  const float* right = reinterpret_cast<const float*>(b);
  for (int64_t s = 0; s < steps; ++s, right += kTileColumns, a += 4) {
    __m512 b0 = _mm512_load_ps(right), b1 = _mm512_load_ps(right + 16), b0_abs, b1_abs;
    if constexpr (kind == Kind::kAbs) b0 = _mm512_and_ps(b0, no_sign), b1 = _mm512_and_ps(b1, no_sign);
    if constexpr (kDual) b0_abs = _mm512_and_ps(b0, no_sign), b1_abs = _mm512_and_ps(b1, no_sign);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const __m512 left = _mm512_set1_ps(*reinterpret_cast<const float*>(a + i * kRowBytes));
      sum[i][0] = _mm512_fmadd_ps(left, b0, sum[i][0]);
      sum[i][1] = _mm512_fmadd_ps(left, b1, sum[i][1]);
      if constexpr (kDual) {
        const __m512 left_abs = kind == Kind::kDualAbs ? _mm512_and_ps(left, no_sign) : left;
        sum_abs[i][0] = _mm512_fmadd_ps(left_abs, b0_abs, sum_abs[i][0]);
        sum_abs[i][1] = _mm512_fmadd_ps(left_abs, b1_abs, sum_abs[i][1]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    for (int h = 0; h < 2; ++h) {
      float* to = tile + i * kTileColumns + 16 * h;
      _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), sum[i][h]));
      if constexpr (kDual) {
        float* to_abs = tile_abs + i * kTileColumns + 16 * h;
        _mm512_store_ps(to_abs, _mm512_add_ps(_mm512_load_ps(to_abs), sum_abs[i][h]));
      }
    }
  }
}

template <Kind kind, int rows>
RELPROP_TARGET_BF16 void micro_bfloat16(float* tile, float* tile_abs, const char* a, const char* b, int64_t steps) {
  constexpr bool kDual = is_dual(kind);
  const __m512i no_sign = _mm512_set1_epi32(0x7fff7fff);
  __m512 sum[rows][2], sum_abs[kDual ? rows : 1][2];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    if constexpr (kDual) sum_abs[i][0] = sum_abs[i][1] = _mm512_setzero_ps();
  }
  for (int64_t s = 0; s < steps; ++s, b += kTileColumns * 4, a += 4) {
    __m512i b0 = _mm512_load_si512(b), b1 = _mm512_load_si512(b + 64), b0_abs, b1_abs;
    if constexpr (kind == Kind::kAbs) b0 = _mm512_and_si512(b0, no_sign), b1 = _mm512_and_si512(b1, no_sign);
    if constexpr (kDual) b0_abs = _mm512_and_si512(b0, no_sign), b1_abs = _mm512_and_si512(b1, no_sign);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const __m512i left = _mm512_set1_epi32(*reinterpret_cast<const int*>(a + i * kRowBytes));
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], (__m512bh)left, (__m512bh)b0);
      sum[i][1] = _mm512_dpbf16_ps(sum[i][1], (__m512bh)left, (__m512bh)b1);
      if constexpr (kDual) {
        const __m512i left_abs = kind == Kind::kDualAbs ? _mm512_and_si512(left, no_sign) : left;
        sum_abs[i][0] = _mm512_dpbf16_ps(sum_abs[i][0], (__m512bh)left_abs, (__m512bh)b0_abs);
        sum_abs[i][1] = _mm512_dpbf16_ps(sum_abs[i][1], (__m512bh)left_abs, (__m512bh)b1_abs);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    for (int h = 0; h < 2; ++h) {
      float* to = tile + i * kTileColumns + 16 * h;
      _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), sum[i][h]));
      if constexpr (kDual) {
        float* to_abs = tile_abs + i * kTileColumns + 16 * h;
        _mm512_store_ps(to_abs, _mm512_add_ps(_mm512_load_ps(to_abs), sum_abs[i][h]));
      }
    }
  }
}

#endif

// The kernels for 1 to `largest` rows.
template <template <int> class Micro, int largest, int rows = 1>
void fill(GemmKernels& kernels) {
  kernels.of[rows] = Micro<rows>::run;
  if constexpr (rows < largest) fill<Micro, largest, rows + 1>(kernels);
}

template <Operands operands, Kind kind>
struct Portable {
  template <int rows>
  struct Of {
    static constexpr MicroKernel run = micro_portable<operands, kind, rows>;
  };
};

#if RELPROP_X86
template <Operands operands, Kind kind>
struct Avx512 {
  template <int rows>
  struct Of {
    static constexpr MicroKernel run =
        operands == Operands::kFloat32 ? micro_float32<kind, rows> : micro_bfloat16<kind, rows>;
  };
};
#endif

template <Operands operands, Kind kind>
GemmKernels kernels_of() {
  constexpr int kRows = is_dual(kind) ? 7 : 14;
  GemmKernels kernels{};
  kernels.rows = kRows;
#if RELPROP_X86
  if (gemm_fast(operands)) {
    fill<Avx512<operands, kind>::template Of, kRows>(kernels);
    return kernels;
  }
#endif
  fill<Portable<operands, kind>::template Of, kRows>(kernels);
  return kernels;
}

}  // namespace

bool gemm_fast(Operands operands) {
#if RELPROP_X86
  if (active_isa() != Isa::kAvx512) return false;
  return operands == Operands::kFloat32 || __builtin_cpu_supports("avx512bf16");
#else
  (void)operands;
  return false;
#endif
}

GemmKernels gemm_kernels(Operands operands, Kind kind) {
  auto with = [&](auto o) {
    switch (kind) {
      case Kind::kAbs:
        return kernels_of<decltype(o)::value, Kind::kAbs>();
      case Kind::kDual:
        return kernels_of<decltype(o)::value, Kind::kDual>();
      case Kind::kDualAbs:
        return kernels_of<decltype(o)::value, Kind::kDualAbs>();
      default:
        return kernels_of<decltype(o)::value, Kind::kSingle>();
    }
  };
  return operands == Operands::kFloat32 ? with(std::integral_constant<Operands, Operands::kFloat32>())
                                        : with(std::integral_constant<Operands, Operands::kBFloat16>());
}

void pack_rows(char* packed, uint8_t* filled, const Matrix& a, int64_t first, int64_t rows, int64_t begin, int64_t end,
               int64_t depth, Operands operands, bool abs) {
  pack<RowPacker>(begin, end, operands, a.dtype, packed, filled, a, first, rows, depth, abs ? kNoSign : kAll);
}

void pack_columns(char* packed, const Matrix& b, int64_t column, int64_t n, int64_t depth, Operands operands) {
  pack<ColumnPacker>(0, 1, operands, b.dtype, packed, b, column, n, depth);
}

namespace {

struct PackPanels {
  char* packed;
  const Matrix& b;
  int64_t n, depth;
  Operands operands;

  RELPROP_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t panel = begin; panel < end; ++panel) {
      pack_columns(packed + panel * panel_bytes(depth, operands), b, panel * kTileColumns, n, depth, operands);
    }
  }
};

}  // namespace

void pack_matrix(char* packed, const Matrix& b, int64_t n, int64_t depth, Operands operands, int threads) {
  const int64_t panels = (n + kTileColumns - 1) / kTileColumns;
  for_ranges(PackPanels{packed, b, n, depth, operands}, panels, depth * kTileColumns, threads);
}

void prefetch_columns(const Matrix& b, int64_t column, int64_t n, int64_t depth, Operands operands, int64_t part,
                      int64_t parts) {
  const int64_t size = b.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t columns = std::min<int64_t>(kTileColumns, n - column);
  if (columns <= 0) return;
  const bool along_rows = b.column == 1;
  int64_t lines = along_rows ? depth : columns;
  int64_t bytes = size * (along_rows ? columns : depth);
  int64_t stride = size * (along_rows ? b.row : b.column);
  const char* from = static_cast<const char*>(b.data) + size * column * (along_rows ? 1 : b.column);
  if (b.packed != nullptr) {
    bytes = stride = 64;
    lines = panel_bytes(depth, operands) / 64;
    from = b.packed + column / kTileColumns * panel_bytes(depth, operands);
  }
  for (int64_t line = lines * part / parts; line < lines * (part + 1) / parts; ++line) {
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(from + line * stride + byte, 0, 2);
  }
}

char* thread_buffer(int64_t bytes) {
  static thread_local Buffer buffer;
  return buffer.at_least(bytes);
}

char* shared_buffer(int64_t bytes) {
  static thread_local Buffer buffer;
  return buffer.at_least(bytes);
}

}  // namespace relprop
