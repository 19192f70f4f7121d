// Products of two tiles in shared memory, summed in registers: C[128, 128] += A[128, depth] B[depth, 128].
//
// Multiplier<product, A, B, lies> is one way to multiply: with tensor cores, or in float32 arithmetic. Each thread has
// kSums sums of C; row(i) and column(i) say which. Operands pass through a `part` on the way from shared memory to the
// arithmetic, so that |w| or w+ never exist in memory.
#pragma once

#include "mma.cuh"
#include "tiles.cuh"

namespace relprop {

constexpr int kSums = kTile * kTile / kGemmThreads;

struct Sums {
  float at[kSums / 4][4];

  __device__ __forceinline__ float& operator[](int i) { return at[i / 4][i % 4]; }
};

enum class Part : int { kWhole, kMagnitude, kPositive, kNegative };

// Also of infinities and NaN: x = x+ + x-.
template <Part part>
__device__ __forceinline__ float part_of(float x) {
  if constexpr (part == Part::kMagnitude) return fabsf(x);
  if constexpr (part == Part::kPositive) return __int_as_float(__float_as_int(x) & ~(__float_as_int(x) >> 31));
  if constexpr (part == Part::kNegative) return __int_as_float(__float_as_int(x) & (__float_as_int(x) >> 31));
  return x;
}

// All bits of each 16-bit half set where its sign is.
__device__ __forceinline__ uint32_t sign_masks(uint32_t pair) { return (pair >> 15 & 0x00010001u) * 0xffffu; }

// The part of both halves of a register, or of the one tf32 number in it.
template <Part part, Product product>
__device__ __forceinline__ uint32_t part_of_bits(uint32_t bits) {
  if constexpr (part == Part::kWhole) {
    return bits;
  } else if constexpr (product == Product::kTFloat32) {
    return __float_as_uint(part_of<part>(__uint_as_float(bits)));
  } else {
    if constexpr (part == Part::kMagnitude) return bits & 0x7fff7fffu;
    return part == Part::kPositive ? bits & ~sign_masks(bits) : bits & sign_masks(bits);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensor cores. The 8 warps lie 2 x 4 over C, each with 4 x 4 tiles of 16 x 8.

template <Product product, typename A, typename B, Lies b_lies>
class Multiplier {
  static constexpr bool kHalves = product != Product::kTFloat32;
  static constexpr int kMmaDepth = MmaTraits<product>::kDepth;

 public:
  static constexpr int kDepth = kHalves ? 32 : 16;
  static constexpr int kPaddingA = sizeof(A) == 2 ? 8 : (kHalves ? 8 : 4);
  static constexpr int kPaddingB = sizeof(B) == 2 || !kHalves ? (b_lies == Lies::kAcross || sizeof(B) == 2 ? 8 : 4)
                                                              : (b_lies == Lies::kAcross ? 4 : 8);
  using TileA = Tile<A, Lies::kAlong, kDepth, kPaddingA>;
  using TileB = Tile<B, b_lies, kDepth, kPaddingB>;

  struct FragmentsA {
    uint32_t at[4][4];
  };
  struct FragmentsB {
    uint32_t at[4][2];
  };

  static __device__ __forceinline__ int row(int i) {
    return warp() / 4 * 64 + i / 16 * 16 + lane() / 4 + i % 4 / 2 * 8;
  }
  static __device__ __forceinline__ int column(int i) {
    return warp() % 4 * 32 + i / 4 % 4 * 8 + lane() % 4 * 2 + i % 2;
  }

  // Calls add(left, right) for the fragments of every step of the tiles' depth.
  template <int unrolled, class Add>
  static __device__ __forceinline__ void multiply(const A* a, const B* b, const Add& add) {
#pragma unroll unrolled
    for (int k = 0; k < kDepth; k += kMmaDepth) {
      const FragmentsA left = load_a(a, k);
      const FragmentsB right = load_b(b, k);
      add(left, right);
    }
  }

  template <Part part_a, Part part_b>
  static __device__ __forceinline__ void accumulate(Sums& sums, const FragmentsA& a, const FragmentsB& b) {
    uint32_t right[4][2];
#pragma unroll
    for (int i = 0; i < 8; ++i) right[i / 2][i % 2] = part_of_bits<part_b, product>(b.at[i / 2][i % 2]);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      uint32_t left[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) left[i] = part_of_bits<part_a, product>(a.at[m][i]);
#pragma unroll
      for (int n = 0; n < 4; ++n) mma<product>(sums.at[m * 4 + n], left, right[n]);
    }
  }

 private:
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / 32; }

  // One register from two numbers that follow each other in the depth, or from one for tf32.
  template <typename T>
  static __device__ __forceinline__ uint32_t gather(const T* at, int step) {
    if constexpr (kHalves) {
      return pack<typename MmaTraits<product>::Element>(to_float(at[0]), to_float(at[step]));
    } else {
      return to_tf32(to_float(at[0]));
    }
  }

  static __device__ __forceinline__ FragmentsA load_a(const A* tile, int k) {
    FragmentsA fragments;
    const int top = warp() / 4 * 64;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      if constexpr (kHalves && sizeof(A) == 2) {
        const int at = (top + m * 16 + lane() % 16) * TileA::kStride + k + lane() / 16 * 8;
        load_matrices<false>(fragments.at[m], tile + at);
      } else {
        constexpr int kPerRegister = kHalves ? 2 : 1;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = top + m * 16 + lane() / 4 + i % 2 * 8;
          const int c = k + (lane() % 4 + i / 2 * 4) * kPerRegister;
          fragments.at[m][i] = gather(tile + r * TileA::kStride + c, 1);
        }
      }
    }
    return fragments;
  }

  static __device__ __forceinline__ FragmentsB load_b(const B* tile, int k) {
    FragmentsB fragments;
    const int left = warp() % 4 * 32;
    if constexpr (kHalves && sizeof(B) == 2) {
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        uint32_t registers[4];
        if constexpr (b_lies == Lies::kAlong) {
          const int column = left + n * 8 + lane() / 16 * 8 + lane() % 8;
          load_matrices<false>(registers, tile + column * TileB::kStride + k + lane() / 8 % 2 * 8);
        } else {
          const int column = left + n * 8 + lane() / 16 * 8;
          load_matrices<true>(registers, tile + (k + lane() % 16) * TileB::kStride + column);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) fragments.at[n + i / 2][i % 2] = registers[i];
      }
    } else {
      constexpr int kPerRegister = kHalves ? 2 : 1;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int depth = k + (lane() % 4 + i * 4) * kPerRegister;
          const int column = left + n * 8 + lane() / 4;
          fragments.at[n][i] = b_lies == Lies::kAlong ? gather(tile + column * TileB::kStride + depth, 1)
                                                      : gather(tile + depth * TileB::kStride + column, TileB::kStride);
        }
      }
    }
    return fragments;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// float32 arithmetic. The 256 threads lie 16 x 16 over C, each with 8 x 8 numbers.

template <typename A, typename B, Lies b_lies>
class Multiplier<Product::kFloat32, A, B, b_lies> {
 public:
  static constexpr int kDepth = 16;
  static constexpr int kPaddingA = kChunk / static_cast<int>(sizeof(A));
  static constexpr int kPaddingB = kChunk / static_cast<int>(sizeof(B)) * (b_lies == Lies::kAcross ? 2 : 1);
  using TileA = Tile<A, Lies::kAlong, kDepth, kPaddingA>;
  using TileB = Tile<B, b_lies, kDepth, kPaddingB>;

  // Four steps of the depth: A's for all of the thread's rows, B's where they lie.
  struct FragmentsA {
    float at[8][4];
  };
  struct FragmentsB {
    const B* at;
  };

  static __device__ __forceinline__ int row(int i) { return static_cast<int>(threadIdx.x) / 16 + i / 8 * 16; }
  static __device__ __forceinline__ int column(int i) {
    return b_lies == Lies::kAlong ? thread_column() + i % 8 * 16 : thread_column() * 4 + i % 4 + i % 8 / 4 * 64;
  }

  template <int unrolled, class Add>
  static __device__ __forceinline__ void multiply(const A* a, const B* b, const Add& add) {
#pragma unroll unrolled
    for (int k = 0; k < kDepth; k += 4) {
      FragmentsA left;
#pragma unroll
      for (int i = 0; i < 8; ++i) load_run(left.at[i], a + row(i * 8) * TileA::kStride + k);
      add(left, FragmentsB{b + k * (b_lies == Lies::kAlong ? 1 : TileB::kStride)});
    }
  }

  template <Part part_a, Part part_b>
  static __device__ __forceinline__ void accumulate(Sums& sums, const FragmentsA& a, const FragmentsB& b) {
    if constexpr (b_lies == Lies::kAlong) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float right[4];
        load_run(right, b.at + column(j) * TileB::kStride);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
          for (int k = 0; k < 4; ++k) add_product<part_a, part_b>(sums[i * 8 + j], a.at[i][k], right[k]);
        }
      }
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float right[4];
          load_run(right, b.at + k * TileB::kStride + column(half * 4));
#pragma unroll
          for (int i = 0; i < 8; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              add_product<part_a, part_b>(sums[i * 8 + half * 4 + j], a.at[i][k], right[j]);
            }
          }
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ int thread_column() { return static_cast<int>(threadIdx.x) % 16; }

  template <typename T>
  struct alignas(4 * sizeof(T)) Run {
    T v[4];
  };

  template <typename T>
  static __device__ __forceinline__ void load_run(float (&to)[4], const T* from) {
    const Run<T> run = *reinterpret_cast<const Run<T>*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = to_float(run.v[i]);
  }

  template <Part part_a, Part part_b>
  static __device__ __forceinline__ void add_product(float& sum, float a, float b) {
    sum = fmaf(part_of<part_a>(a), part_of<part_b>(b), sum);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// The loop over the depth

// `unrolled` steps of a tile's depth are compiled as one; fewer need fewer registers.
template <class M, int unrolled = 4>
struct Pipeline {
  using A = typename M::TileA::Type;
  using B = typename M::TileB::Type;
  static constexpr int kStageBytes = M::TileA::kBytes + M::TileB::kBytes;
  // What any GPU from sm_80 on has for one block, also the smaller ones (sm_86, sm_89: 99 KiB).
  static constexpr int kStages = 3 * kStageBytes <= 99 * 1024 ? 3 : 2;
  static constexpr int kBytes = kStages * kStageBytes;

  // Calls load(a, b, step) ahead of time and add(step, left, right) for the fragments of each step.
  template <class Load, class Add>
  static __device__ __forceinline__ void run(unsigned char* shared, int64_t steps, const Load& load, const Add& add) {
    for (int stage = 0; stage < kStages - 1; ++stage) {
      if (stage < steps) load(a_of(shared, stage), b_of(shared, stage), static_cast<int64_t>(stage));
      commit_copies();
    }
    for (int64_t step = 0; step < steps; ++step) {
      wait_copies<kStages - 2>();
      __syncthreads();
      const int64_t ahead = step + kStages - 1;
      const int free_stage = static_cast<int>(ahead % kStages), stage = static_cast<int>(step % kStages);
      if (ahead < steps) load(a_of(shared, free_stage), b_of(shared, free_stage), ahead);
      commit_copies();
      M::template multiply<unrolled>(a_of(shared, stage), b_of(shared, stage),
                                     [&](const auto& left, const auto& right) { add(step, left, right); });
    }
  }

 private:
  static __device__ __forceinline__ A* a_of(unsigned char* shared, int stage) {
    return reinterpret_cast<A*>(shared + stage * kStageBytes);
  }
  static __device__ __forceinline__ B* b_of(unsigned char* shared, int stage) {
    return reinterpret_cast<B*>(shared + stage * kStageBytes + M::TileA::kBytes);
  }
};

}  // namespace relprop
