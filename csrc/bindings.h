// What the binding files share. Pointers come as integers, sizes as int64, and are checked by name; shapes, dtypes and
// devices are checked by relprop/native, which is what Python code calls.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dtype.h"
#include "stabiliser.h"

namespace relprop {

namespace py = pybind11;

// What a binding file adds to the module. Each file registers its own functions with one such constant, so a new one
// changes no other file.
class Bindings {
 public:
  using Bind = void (*)(py::module_& module);

  explicit Bindings(Bind bind) { all().push_back(bind); }

  static std::vector<Bind>& all() {
    static std::vector<Bind> binds;
    return binds;
  }
};

using release_gil = py::call_guard<py::gil_scoped_release>;

using Pointer = std::uintptr_t;

struct Size {
  const char* name;
  int64_t value;
};

// The product of the sizes; 0 means that there is nothing to do.
inline int64_t checked_product(std::initializer_list<Size> sizes) {
  int64_t product = 1;
  for (const Size& size : sizes) {
    if (size.value < 0) {
      throw std::invalid_argument(std::string(size.name) + ": expected a size >= 0, got " + std::to_string(size.value));
    }
  }
  for (const Size& size : sizes) {
    if (size.value == 0) return 0;
    if (__builtin_mul_overflow(product, size.value, &product)) {
      throw std::invalid_argument(std::string(size.name) + ": expected a tensor of fewer than 2^63 elements, got " +
                                  std::to_string(size.value) + " times those of the sizes before it");
    }
  }
  return product;
}

// A tensor as Python hands it over: its address and dtype code (DType); the address 0 for none.
using TensorArgument = std::pair<Pointer, int>;

struct Argument {
  const char* name;
  Pointer value;

  Argument(const char* name, Pointer value) : name(name), value(value) {}
  Argument(const char* name, const TensorArgument& tensor) : name(name), value(tensor.first) {}
};

inline void check_pointers(std::initializer_list<Argument> arguments) {
  for (const Argument& argument : arguments) {
    if (argument.value == 0) {
      throw std::invalid_argument(std::string(argument.name) + ": expected a pointer, got null");
    }
  }
}

inline void check_threads(int threads) {
  if (threads < 1) throw std::invalid_argument("threads: expected at least 1, got " + std::to_string(threads));
}

inline void check_epsilon(double epsilon) {
  if (!(epsilon >= 0.0) || std::isinf(epsilon)) {
    throw std::invalid_argument("epsilon: expected a finite number >= 0, got " + std::to_string(epsilon));
  }
}

inline Stabiliser checked_stabiliser(int kind, double epsilon) {
  if (kind != 0 && kind != 1) {
    throw std::invalid_argument("stabiliser_kind: expected 0 (signed) or 1 (reference), got " + std::to_string(kind));
  }
  check_epsilon(epsilon);
  return {static_cast<StabiliserKind>(kind), epsilon};
}

template <typename T>
T* as(Pointer pointer) {
  return reinterpret_cast<T*>(pointer);
}

// Calls function(T()) for the float type of that many bytes.
template <class Function>
void with_type(int itemsize, Function&& function) {
  switch (itemsize) {
    case 4:
      return function(float());
    case 8:
      return function(double());
    default:
      throw std::invalid_argument("itemsize: expected 4 (float32) or 8 (float64), got " + std::to_string(itemsize));
  }
}

inline DType checked_dtype(const char* name, int code) {
  if (code < 0 || code > 3) {
    throw std::invalid_argument(std::string(name) +
                                ": expected the dtype 0 (float32), 1 (bfloat16), 2 (float16) or 3 (float64), got " +
                                std::to_string(code));
  }
  return static_cast<DType>(code);
}

// Calls function(T()) with what a kernel computes in: double where the stream is float64, else float.
template <class Function>
void with_stream_type(const char* name, const TensorArgument& stream, Function&& function) {
  if (checked_dtype(name, stream.second) == DType::kFloat64) return function(double());
  return function(float());
}

template <typename T>
Operand<T> operand(const char* name, const TensorArgument& tensor) {
  const DType dtype = checked_dtype(name, tensor.second);
  const DType other = sizeof(T) == 8 ? DType::kFloat32 : DType::kFloat64;
  if (tensor.first != 0 && dtype == other) {
    throw std::invalid_argument(std::string(name) + ": expected the stream's dtype or a half precision, got " +
                                (sizeof(T) == 8 ? "float32 with float64" : "float64 with float32"));
  }
  return {reinterpret_cast<const void*>(tensor.first), dtype};
}

template <typename T>
Result<T> result(const char* name, const TensorArgument& tensor) {
  const DType dtype = operand<T>(name, tensor).dtype;
  if (tensor.first != 0 && sizeof(T) == 8 && dtype != DType::kFloat64) {
    throw std::invalid_argument(std::string(name) + ": expected float64 as the stream, got a half precision");
  }
  return {reinterpret_cast<void*>(tensor.first), dtype};
}

}  // namespace relprop
