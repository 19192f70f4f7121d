// What the CUDA module says about itself and the machine.
#pragma once

#include <cstdint>
#include <string>

namespace relprop {

// nvcc and the GPU architectures compiled for, or what emulates them.
std::string cuda_compiler();

// Where tensors must lie: "cuda", or "cpu" for the emulation.
std::string cuda_device_type();

// Why no kernel can be launched here (no driver, no GPU); empty where one can.
std::string cuda_reason();

// The order of fibres in the emulation; throws std::logic_error elsewhere.
void set_cuda_order(int order);

// How many kernels the emulation has launched; throws std::logic_error elsewhere.
int64_t cuda_launches();

// The shared memory that a block has in the emulation; throws std::logic_error elsewhere.
void set_cuda_most_shared(int64_t bytes);

}  // namespace relprop
