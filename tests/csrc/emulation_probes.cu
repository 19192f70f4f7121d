// Small kernels that show what the emulation does and what it catches; right ones and wrong ones.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda_platform.cuh"
#include "dtypes.cuh"
#include "mma.cuh"

namespace py = pybind11;

namespace relprop {
namespace {

using Row = float[256];

// out[i] = in[255 - i] through shared memory.
__global__ void reverse_kernel(float* out, const float* in, bool with_barrier) {
  RELPROP_SHARED(Row, row);
  const int i = static_cast<int>(threadIdx.x);
  row[i] = in[blockIdx.x * 256 + i];
  if (with_barrier) __syncthreads();
  out[blockIdx.x * 256 + i] = row[255 - i];
}

__global__ void read_unwritten_kernel(float* out) {
  RELPROP_DYNAMIC_SHARED(memory);
  out[threadIdx.x] = reinterpret_cast<float*>(memory)[threadIdx.x];
}

__global__ void write_past_end_kernel() {
  RELPROP_SHARED(Row, row);
  float* at = row;
  at[threadIdx.x + 225] = 1.0f;
}

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x == 0) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

__global__ void copy_kernel(float* out, const float* in, bool with_wait, int offset) {
  RELPROP_SHARED(Row, row);
  const int i = static_cast<int>(threadIdx.x);
  copy_async(row + 4 * i, in + 4 * i + offset, i == 31 ? 8 : 16);
  commit_copies();
  if (with_wait) wait_copies<0>();
  __syncthreads();
  for (int j = i; j < 128; j += 32) out[j] = row[j];
}

__global__ void warp_kernel(float* out, const float* in) {
  const int lane = static_cast<int>(threadIdx.x);
  const float x = in[lane];
  out[lane] = __shfl_xor_sync(kFullWarp, x, 5);
  out[32 + lane] = __shfl_down_sync(kFullWarp, x, 3);
  out[64 + lane] = __shfl_up_sync(kFullWarp, x, 3);
  out[96 + lane] = __shfl_sync(kFullWarp, x, 7);
  out[128 + lane] = static_cast<float>(__ballot_sync(kFullWarp, lane % 5 == 0) >> (lane % 5) & 1u);
}

__global__ void count_kernel(int* out) { atomicAdd(out, static_cast<int>(threadIdx.x)); }

// C = A B with A [16, K] and B [K, 8] in row order; what a fragment holds is written out here element by element.
template <Product product>
__global__ void mma_kernel(float* c, const float* a, const float* b) {
  constexpr int kDepth = MmaTraits<product>::kDepth;
  const int group = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; ++i) {
    const int row = group + i % 2 * 8;
    if constexpr (product == Product::kTFloat32) {
      left[i] = to_tf32(a[row * kDepth + t + i / 2 * 4]);
      if (i < 2) right[i] = to_tf32(b[(t + i * 4) * 8 + group]);
    } else {
      using T = typename MmaTraits<product>::Element;
      const int k = 2 * t + i / 2 * 8;
      left[i] = pack<T>(a[row * kDepth + k], a[row * kDepth + k + 1]);
      if (i < 2) right[i] = pack<T>(b[(2 * t + i * 8) * 8 + group], b[(2 * t + i * 8 + 1) * 8 + group]);
    }
  }
  float sum[4] = {};
  mma<product>(sum, left, right);
  for (int i = 0; i < 4; ++i) c[(group + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

using Tiles = uint16_t[32][8];

// Reads four 8 x 8 tiles and writes the fragments back to where their elements came from.
template <bool transposed>
__global__ void load_matrices_kernel(uint16_t* out, const uint16_t* in) {
  RELPROP_SHARED(Tiles, tiles);
  const int lane = static_cast<int>(threadIdx.x), group = lane / 4, t = lane % 4;
  for (int i = 0; i < 8; ++i) tiles[lane][i] = in[lane * 8 + i];
  __syncwarp();
  uint32_t registers[4];
  load_matrices<transposed>(registers, tiles[lane]);
  for (int tile = 0; tile < 4; ++tile) {
    for (int half = 0; half < 2; ++half) {
      const int row = transposed ? 2 * t + half : group, column = transposed ? group : 2 * t + half;
      out[(tile * 8 + row) * 8 + column] = static_cast<uint16_t>(registers[tile] >> (16 * half));
    }
  }
}

template <typename T>
__global__ void round_kernel(float* out, const float* in, int size) {
  for (int i = static_cast<int>(threadIdx.x); i < size; i += 32) out[i] = to_float(from_float<T>(in[i]));
}

using Pointer = std::uintptr_t;

template <typename T>
T* as(Pointer pointer) {
  return reinterpret_cast<T*>(pointer);
}

constexpr Stream kStream{0, nullptr};

void probe(const std::string& name, Pointer out, Pointer in, Pointer other, int argument) {
  auto* f = as<float>(out);
  const auto *x = as<const float>(in), *y = as<const float>(other);
  const auto is = [&](const char* wanted) { return name == wanted; };
  if (is("reverse")) return launch("reverse", reverse_kernel, dim3(2), dim3(256), 0, kStream, f, x, argument != 0);
  if (is("read_unwritten")) {
    return launch("read_unwritten", read_unwritten_kernel, dim3(1), dim3(32), 128, kStream, f);
  }
  if (is("write_past_end")) return launch("write_past_end", write_past_end_kernel, dim3(1), dim3(32), 0, kStream);
  if (is("divergent_barrier")) return launch("divergent", divergent_barrier_kernel, dim3(1), dim3(32), 0, kStream);
  if (is("copy")) return launch("copy", copy_kernel, dim3(1), dim3(32), 0, kStream, f, x, argument != 0, 0);
  if (is("misaligned_copy")) return launch("copy", copy_kernel, dim3(1), dim3(32), 0, kStream, f, x, true, 1);
  if (is("warp")) return launch("warp", warp_kernel, dim3(1), dim3(32), 0, kStream, f, x);
  if (is("count")) return launch("count", count_kernel, dim3(3), dim3(64), 0, kStream, as<int>(out));
  if (is("too_many_threads")) return launch("count", count_kernel, dim3(1), dim3(2048), 0, kStream, as<int>(out));
  if (is("memory")) {
    return launch("read", read_unwritten_kernel, dim3(1), dim3(32), static_cast<size_t>(argument), kStream, f);
  }
  if (is("mma_tf32")) return launch("mma", mma_kernel<Product::kTFloat32>, dim3(1), dim3(32), 0, kStream, f, x, y);
  if (is("mma_bf16")) return launch("mma", mma_kernel<Product::kBFloat16>, dim3(1), dim3(32), 0, kStream, f, x, y);
  if (is("mma_fp16")) return launch("mma", mma_kernel<Product::kFloat16>, dim3(1), dim3(32), 0, kStream, f, x, y);
  if (is("load_matrices")) {
    const auto kernel = argument != 0 ? load_matrices_kernel<true> : load_matrices_kernel<false>;
    return launch("load_matrices", kernel, dim3(1), dim3(32), 0, kStream, as<uint16_t>(out), as<const uint16_t>(in));
  }
  if (is("round_bf16")) return launch("round", round_kernel<bfloat16>, dim3(1), dim3(32), 0, kStream, f, x, argument);
  if (is("round_fp16")) return launch("round", round_kernel<float16>, dim3(1), dim3(32), 0, kStream, f, x, argument);
  throw std::invalid_argument("unknown probe " + name);
}

}  // namespace
}  // namespace relprop

PYBIND11_MODULE(emulation_probes, module) {
  module.def("probe", &relprop::probe, py::arg("name"), py::arg("out") = 0, py::arg("in") = 0, py::arg("other") = 0,
             py::arg("argument") = 0);
  module.def("set_most_shared", &relprop::emulation::set_most_shared);
  module.def("set_order", [](int order) { relprop::emulation::set_order(relprop::emulation::Order(order)); });
}
