#include "cuda_device.h"
#include "cuda_platform.cuh"

#ifndef RELPROP_CUDA_ARCHITECTURES
#define RELPROP_CUDA_ARCHITECTURES "unknown architectures"
#endif

namespace relprop {

#if defined(__CUDACC__)
std::string cuda_compiler() {
  return "nvcc " + std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__) + " (" +
         RELPROP_CUDA_ARCHITECTURES + ")";
}

std::string cuda_device_type() { return "cuda"; }

std::string cuda_reason() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  cudaGetLastError();  // what was found out here is not the next launch's error
  if (status != cudaSuccess) return std::string("no CUDA device: ") + cudaGetErrorString(status);
  return count > 0 ? "" : "no CUDA device";
}

void set_cuda_order(int) { throw std::logic_error("set_order: expected the host emulation, got a build for GPUs"); }

int64_t cuda_launches() { throw std::logic_error("launches: expected the host emulation, got a build for GPUs"); }

void set_cuda_most_shared(int64_t) {
  throw std::logic_error("set_most_shared: expected the host emulation, got a build for GPUs");
}
#else
std::string cuda_compiler() { return "host emulation"; }

std::string cuda_device_type() { return "cpu"; }

std::string cuda_reason() { return ""; }

void set_cuda_order(int order) { emulation::set_order(static_cast<emulation::Order>(order)); }

int64_t cuda_launches() { return emulation::launches(); }

void set_cuda_most_shared(int64_t bytes) { emulation::set_most_shared(static_cast<size_t>(bytes)); }
#endif

}  // namespace relprop
