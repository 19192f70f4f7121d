// Runs CUDA kernels on the CPU, for tests: the same .cu source, compiled by g++ as plain C++17.
//
// Every CUDA thread of a block is a fibre with a stack of its own, and blocks run one after the other, so barriers,
// shuffles and tensor-core instructions are real: a fibre that reaches one stands until all that take part are there.
// What a GPU would let pass is made to show:
//   - shared memory holds NaN (all bits set) when a block starts, with guard zones around every array; a copy by
//     cp.async arrives at the wait for its group, not before; each is an error or NaN in a result where it is misused;
//   - fibres run in several orders (set_order): a missing barrier gives another result in one of them;
//   - a barrier that some threads never reach, a launch outside the hardware's limits, a misaligned copy: an exception;
//   - a call of the runtime that fails leaves its error for cudaGetLastError, as the runtime does.
// Under AddressSanitizer the guard zones are poisoned, so that an access out of bounds is reported where it happens.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>

namespace relprop::emulation {

constexpr int kWarpSize = 32;

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr Dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// The thread that runs now; one of a block's fibres.
struct Thread {
  Dim3 index;
  int lane;
  int warp;
};

extern const Thread* current;
extern Dim3 block_index, block_size, grid_size;

enum class Order : int { kForward = 0, kReverse = 1, kShuffled = 2 };

// The order in which a block's fibres get their turns.
void set_order(Order order);

// How many kernels have been launched, for tests that a kernel did run.
int64_t launches();

// Shared memory that one block may have, in bytes: at first an A100's 163 KiB; GPUs of compute capability 8.6, 8.9 and
// 12.x have 99 KiB.
void set_most_shared(size_t bytes);

// Runs body once for every thread of every block. Throws std::runtime_error with the kernel's name for what a GPU would
// refuse or where it would hang.
void run_grid(const char* kernel, Dim3 grid, Dim3 block, size_t dynamic_shared, const std::function<void()>& body);

// The memory of one __shared__ variable of the block, NaN-filled; `key` tells variables apart.
void* shared_variable(const void* key, size_t size, size_t alignment);

// The block's dynamic shared memory.
void* dynamic_shared();

void sync_block();

// Every lane of the warp gives `size` bytes and gets those of all 32, `kSlot` bytes apart; `operation` must agree.
constexpr size_t kSlot = 64;
const std::byte* exchange(const char* operation, unsigned mask, const void* given, size_t size);

// cp.async: `bytes` from source, then zeros up to `size`, at the wait for the group that commit_copies closes.
void copy_later(void* target, const void* source, int size, int bytes);
void commit_copies();
void wait_copies(int groups_left);

template <typename T>
T from_lane(const std::byte* slots, int lane) {
  T value;
  std::memcpy(&value, slots + static_cast<size_t>(lane) * kSlot, sizeof(T));
  return value;
}

template <typename T>
T shuffle(const char* operation, unsigned mask, T value, int lane) {
  static_assert(sizeof(T) <= kSlot);
  const std::byte* slots = exchange(operation, mask, &value, sizeof(T));
  return from_lane<T>(slots, lane);
}

}  // namespace relprop::emulation

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define threadIdx (::relprop::emulation::current->index)
#define blockIdx (::relprop::emulation::block_index)
#define blockDim (::relprop::emulation::block_size)
#define gridDim (::relprop::emulation::grid_size)

using dim3 = relprop::emulation::Dim3;

// The part of the runtime's interface that launches use, for one device of which only the shared memory has a limit.
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };

cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t status);
const char* cudaGetErrorString(cudaError_t status);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

// Static shared memory is known when a block has run, and counted then.
template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Parameters...)) {
  attributes->sharedSizeBytes = 0;
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

inline void __syncthreads() { relprop::emulation::sync_block(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) { relprop::emulation::exchange("__syncwarp", mask, nullptr, 0); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return relprop::emulation::shuffle("__shfl_sync", mask, value, lane & 31);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return relprop::emulation::shuffle("__shfl_xor_sync", mask, value, relprop::emulation::current->lane ^ lanes);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const int lane = relprop::emulation::current->lane;
  const int from = lane + static_cast<int>(delta);
  return relprop::emulation::shuffle("__shfl_down_sync", mask, value, from < 32 ? from : lane);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  const int lane = relprop::emulation::current->lane;
  const int from = lane - static_cast<int>(delta);
  return relprop::emulation::shuffle("__shfl_up_sync", mask, value, from >= 0 ? from : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const std::byte* slots = relprop::emulation::exchange("__ballot_sync", mask, &predicate, sizeof(predicate));
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (relprop::emulation::from_lane<int>(slots, lane) != 0) votes |= 1u << lane;
  }
  return votes;
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }

// Fibres change places at barriers only, so a plain update is atomic.
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}

template <typename T>
T atomicMax(T* address, T value) {
  const T old = *address;
  if (value > old) *address = value;
  return old;
}

template <typename T>
T atomicCAS(T* address, T compare, T value) {
  const T old = *address;
  if (old == compare) *address = value;
  return old;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }

inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(__float_as_int(x)); }
inline float __uint_as_float(unsigned bits) { return __int_as_float(static_cast<int>(bits)); }
