// The one place where nvcc and the host emulation of csrc/emulation differ: kernels include this and use its names.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda_types.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

// A __shared__ variable of a type without constructors: RELPROP_SHARED(Tile, tile) with `using Tile = float[32][33]`.
#define RELPROP_SHARED(Type, name) __shared__ Type name
#define RELPROP_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#else
#include "emulation/emulation.h"

#define RELPROP_SHARED(Type, name)  \
  static const char name##_key = 0; \
  Type& name = *static_cast<Type*>(::relprop::emulation::shared_variable(&name##_key, sizeof(Type), alignof(Type)))
#define RELPROP_DYNAMIC_SHARED(name) \
  unsigned char* const name = static_cast<unsigned char*>(::relprop::emulation::dynamic_shared())
#endif

namespace relprop {

constexpr unsigned kFullWarp = 0xffffffffu;

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // what is said here is not the next launch's error
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) +
                           ")");
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

// Shared memory that one block may have on a device, in bytes.
inline size_t most_shared(int device) {
  int bytes = 0;
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return static_cast<size_t>(bytes);
}

// kernel<<<grid, block, dynamic_shared, stream>>>(args...); throws std::runtime_error where it cannot be launched.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_shared,
            Stream stream, Arguments... arguments) {
  const DeviceGuard guard(stream.device);
  if (dynamic_shared > 48 * 1024) {  // always the same limit: another thread may be about to launch with more
    cudaFuncAttributes known{};
    check_cuda(cudaFuncGetAttributes(&known, kernel), name);
    const size_t limit = std::max(most_shared(stream.device) - known.sharedSizeBytes, dynamic_shared);
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limit)),
               name);
  }
#if defined(__CUDACC__)
  kernel<<<grid, block, dynamic_shared, static_cast<cudaStream_t>(stream.handle)>>>(
      static_cast<Parameters>(arguments)...);
#else
  emulation::run_grid(name, grid, block, dynamic_shared, [&] { kernel(static_cast<Parameters>(arguments)...); });
#endif
  check_cuda(cudaGetLastError(), name);
}

// cp.async: 16 bytes from global to shared memory, of which those from `bytes` on are zeros.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
#if defined(__CUDACC__)
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(bytes) : "memory");
#else
  emulation::copy_later(shared, global, 16, bytes);
#endif
}

__device__ __forceinline__ void commit_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulation::commit_copies();
#endif
}

// Waits for this thread's copies but those of the latest `groups_left` groups; other threads' take a __syncthreads too.
template <int groups_left>
__device__ __forceinline__ void wait_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
#else
  emulation::wait_copies(groups_left);
#endif
}

}  // namespace relprop
