// The tensor-core instructions in use, each with a scalar twin for the emulation that follows the layout of fragments
// in the PTX manual (section "Matrix fragments for mma"), so that a mistake in a layout shows on the CPU too.
//
// With g = lane / 4, t = lane % 4, a thread holds of a 16 x K tile A (rows), a K x 8 tile B and a 16 x 8 tile C:
//   16-bit, K = 16, two per register:  a0 (g, 2t) a1 (g + 8, 2t) a2 (g, 2t + 8) a3 (g + 8, 2t + 8), each with its right
//                                      neighbour; b0 (2t, g) b1 (2t + 8, g), each with its lower neighbour
//   tf32, K = 8, one per register:     a0 (g, t) a1 (g + 8, t) a2 (g, t + 4) a3 (g + 8, t + 4); b0 (t, g) b1 (t + 4, g)
//   C:                                 c0 (g, 2t) c1 (g, 2t + 1) c2 (g + 8, 2t) c3 (g + 8, 2t + 1)
#pragma once

#include "dtypes.cuh"

namespace relprop {

template <Product product>
struct MmaTraits;

template <>
struct MmaTraits<Product::kTFloat32> {
  static constexpr int kDepth = 8;
};

template <>
struct MmaTraits<Product::kBFloat16> {
  static constexpr int kDepth = 16;
  using Element = bfloat16;
};

template <>
struct MmaTraits<Product::kFloat16> {
  static constexpr int kDepth = 16;
  using Element = float16;
};

#if !defined(__CUDACC__)
namespace emulation {

struct MmaFragments {
  uint32_t a[4], b[2];
};

template <Product product>
float element(uint32_t bits, int half) {
  if constexpr (product == Product::kTFloat32) {
    return __uint_as_float(bits & ~0x1fffu);
  } else {
    using T = typename MmaTraits<product>::Element;
    return to_float(T{static_cast<uint16_t>(bits >> (16 * half))});
  }
}

template <Product product>
float a_at(const std::byte* slots, int row, int k) {
  constexpr int kPerRegister = product == Product::kTFloat32 ? 1 : 2;
  const int column = k / kPerRegister;  // 0 to 7: four threads, two registers each
  const auto fragments = from_lane<MmaFragments>(slots, row % 8 * 4 + column % 4);
  return element<product>(fragments.a[row / 8 + column / 4 * 2], k % kPerRegister);
}

template <Product product>
float b_at(const std::byte* slots, int k, int column) {
  constexpr int kPerRegister = product == Product::kTFloat32 ? 1 : 2;
  const int row = k / kPerRegister;
  const auto fragments = from_lane<MmaFragments>(slots, column * 4 + row % 4);
  return element<product>(fragments.b[row / 4], k % kPerRegister);
}

template <Product product>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaFragments given;
  std::memcpy(given.a, a, sizeof(a));
  std::memcpy(given.b, b, sizeof(b));
  const std::byte* slots = exchange("mma.sync", kFullWarp, &given, sizeof(given));
  const int group = current->lane / 4, thread = current->lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + i / 2 * 8, column = thread * 2 + i % 2;
    for (int k = 0; k < MmaTraits<product>::kDepth; ++k) {
      c[i] += a_at<product>(slots, row, k) * b_at<product>(slots, k, column);
    }
  }
}

}  // namespace emulation
#endif

// C += A B for one warp.
template <Product product>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
#define RELPROP_MMA(instruction)                                                    \
  asm volatile(instruction " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (product == Product::kTFloat32) {
    RELPROP_MMA("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
  } else if constexpr (product == Product::kBFloat16) {
    RELPROP_MMA("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
  } else {
    RELPROP_MMA("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
  }
#undef RELPROP_MMA
#else
  emulation::mma<product>(c, a, b);
#endif
}

// ldmatrix.x4: four 8 x 8 tiles of 16-bit values; lane i gives the address of row i % 8 of tile i / 8 (16 bytes,
// aligned to them). Register j gets, of tile j, the pair (g, 2t), (g, 2t + 1); transposed, the pair (2t, g), (2t + 1,
// g).
template <bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], const void* shared) {
#if defined(__CUDACC__)
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  }
#else
  if (reinterpret_cast<std::uintptr_t>(shared) % 16 != 0) throw std::runtime_error("ldmatrix: misaligned row");
  const std::byte* slots = emulation::exchange("ldmatrix", kFullWarp, &shared, sizeof(shared));
  const int group = emulation::current->lane / 4, thread = emulation::current->lane % 4;
  for (int tile = 0; tile < 4; ++tile) {
    const auto at = [&](int row, int column) -> uint32_t {
      return emulation::from_lane<const uint16_t*>(slots, tile * 8 + row)[column];
    };
    registers[tile] = transposed ? at(2 * thread, group) | at(2 * thread + 1, group) << 16
                                 : at(group, 2 * thread) | at(group, 2 * thread + 1) << 16;
  }
#endif
}

}  // namespace relprop
