#include <memory>

#include "bindings.h"
#include "memory.h"

// Results are handed to torch as DLPack capsules (https://dmlc.github.io/dlpack): its tensors then call back when their
// memory is free, and no header of torch is needed.
namespace relprop {
namespace {

// As in dlpack.h, version 0.8.
struct DLDevice {
  int32_t type, id;
};

struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

constexpr DLDevice kCpu = {1, 0};
constexpr uint8_t kFloatCode = 2, kBfloatCode = 4;

struct Result {
  DLManagedTensor managed;
  std::vector<int64_t> shape;
  int64_t bytes;
};

void release(DLManagedTensor* managed) {
  Result* result = static_cast<Result*>(managed->context);
  give_block(managed->tensor.data, result->bytes);
  delete result;
}

// A capsule that nobody took still owns its memory.
void release_capsule(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, "dltensor") == 0) return;
  release(static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor")));
}

DLDataType checked_dtype(int dtype) {
  switch (dtype) {
    case 0:
      return {kFloatCode, 32, 1};
    case 1:
      return {kBfloatCode, 16, 1};
    case 2:
      return {kFloatCode, 16, 1};
    case 3:
      return {kFloatCode, 64, 1};
    default:
      throw std::invalid_argument("dtype: expected 0, 1, 2 or 3, got " + std::to_string(dtype));
  }
}

// A tensor [shape] of memory that holds anything, as a DLPack capsule.
py::object bind_result(std::vector<int64_t> shape, int dtype) {
  const DLDataType type = checked_dtype(dtype);
  int64_t bytes = type.bits / 8;
  for (const int64_t size : shape) bytes = checked_product({{"bytes", bytes}, {"size", size}});
  auto result = std::make_unique<Result>(Result{{}, std::move(shape), bytes});
  void* data = take_block(bytes);
  result->managed = {{data, kCpu, static_cast<int32_t>(result->shape.size()), type, result->shape.data(), nullptr, 0},
                     result.get(),
                     release};
  PyObject* capsule = PyCapsule_New(&result->managed, "dltensor", release_capsule);
  if (capsule == nullptr) {
    give_block(data, bytes);
    throw py::error_already_set();
  }
  result.release();
  return py::reinterpret_steal<py::object>(capsule);
}

const Bindings bindings([](py::module_& module) {
  module.attr("SMALLEST_BLOCK") = kSmallestBlock;
  module.def("result", &bind_result, py::arg("shape"), py::arg("dtype"));
  module.def("block_use", [] {
    const BlockUse use = block_use();
    return py::make_tuple(use.kept, use.limit);
  });
  module.def(
      "limit_blocks",
      [](int64_t limit) {
        if (limit < 0) throw std::invalid_argument("limit: expected a size >= 0, got " + std::to_string(limit));
        limit_blocks(limit);
      },
      py::arg("limit"));
});

}  // namespace
}  // namespace relprop
