// The Python module relprop._C: pointers come as integers, sizes as int64, and are checked here by name. Shapes, dtypes
// and devices are checked by relprop/native.py, which is what Python code calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "add_normalised.h"
#include "fanout_epsilon.h"
#include "isa.h"
#include "linear_alpha_beta.h"
#include "matmul_half.h"
#include "parallel.h"
#include "stabiliser.h"

#ifndef RELPROP_VERSION
#define RELPROP_VERSION "unknown"
#endif

namespace py = pybind11;

namespace relprop {
namespace {

using Pointer = std::uintptr_t;

struct Size {
  const char* name;
  int64_t value;
};

// The product of the sizes; 0 means that there is nothing to do.
int64_t checked_product(std::initializer_list<Size> sizes) {
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

struct Argument {
  const char* name;
  Pointer value;
};

void check_pointers(std::initializer_list<Argument> arguments) {
  for (const Argument& argument : arguments) {
    if (argument.value == 0) {
      throw std::invalid_argument(std::string(argument.name) + ": expected a pointer, got null");
    }
  }
}

void check_threads(int threads) {
  if (threads < 1) throw std::invalid_argument("threads: expected at least 1, got " + std::to_string(threads));
}

Stabiliser checked_stabiliser(int kind, double epsilon) {
  if (kind != 0 && kind != 1) {
    throw std::invalid_argument("stabiliser_kind: expected 0 (signed) or 1 (reference), got " + std::to_string(kind));
  }
  if (!(epsilon >= 0.0) || std::isinf(epsilon)) {
    throw std::invalid_argument("epsilon: expected a finite number >= 0, got " + std::to_string(epsilon));
  }
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

void bind_share_out(int itemsize, Pointer p1, Pointer p2, Pointer relevance, Pointer y, Pointer bias, Pointer absz,
                    int64_t targets, int64_t rows, int64_t n, double alpha, double beta, double tolerance, int kind,
                    double epsilon, int threads) {
  const Stabiliser stabiliser = checked_stabiliser(kind, epsilon);
  check_threads(threads);
  if (checked_product({{"targets", targets}, {"rows", rows}, {"n", n}}) == 0) return;
  check_pointers({{"p1", p1}, {"relevance", relevance}, {"y", y}, {"absz", absz}});
  if (beta != 0.0) check_pointers({{"p2", p2}});
  with_type(itemsize, [&](auto zero) {
    using T = decltype(zero);
    linear_alpha_beta_share_out(as<T>(p1), as<T>(p2), as<const T>(relevance), as<const T>(y), as<const T>(bias),
                                as<const T>(absz), targets, rows, n, alpha, beta, tolerance, stabiliser, threads);
  });
}

void bind_select(int itemsize, Pointer out, Pointer x, Pointer c1, Pointer c2, int64_t targets, int64_t size,
                 int threads) {
  check_threads(threads);
  if (checked_product({{"targets", targets}, {"size", size}}) == 0) return;
  check_pointers({{"out", out}, {"x", x}, {"c1", c1}, {"c2", c2}});
  with_type(itemsize, [&](auto zero) {
    using T = decltype(zero);
    linear_alpha_beta_select(as<T>(out), as<const T>(x), as<const T>(c1), as<const T>(c2), targets, size, threads);
  });
}

void bind_add_normalised(int itemsize, Pointer relevance_a, Pointer relevance_b, Pointer relevance, Pointer a,
                         Pointer b, int64_t targets, int64_t batch, int64_t b_batch, int64_t size, int kind,
                         double epsilon, int threads) {
  const Stabiliser stabiliser = checked_stabiliser(kind, epsilon);
  check_threads(threads);
  if (b_batch != batch && b_batch != 1) {
    throw std::invalid_argument("b_batch: expected 1 or batch (" + std::to_string(batch) + "), got " +
                                std::to_string(b_batch));
  }
  if (checked_product({{"targets", targets}, {"batch", batch}, {"size", size}}) == 0) return;
  check_pointers(
      {{"relevance_a", relevance_a}, {"relevance_b", relevance_b}, {"relevance", relevance}, {"a", a}, {"b", b}});
  with_type(itemsize, [&](auto zero) {
    using T = decltype(zero);
    add_normalised(as<T>(relevance_a), as<T>(relevance_b), as<const T>(relevance), as<const T>(a), as<const T>(b),
                   targets, batch, b_batch, size, stabiliser, threads);
  });
}

void bind_fanout_epsilon(int itemsize, Pointer out, const std::vector<Pointer>& relevances, Pointer x, int64_t targets,
                         int64_t size, int kind, double epsilon, int threads) {
  const Stabiliser stabiliser = checked_stabiliser(kind, epsilon);
  check_threads(threads);
  if (relevances.empty()) throw std::invalid_argument("relevances: expected at least one pointer, got none");
  if (checked_product({{"targets", targets}, {"size", size}}) == 0) return;
  check_pointers({{"out", out}, {"x", x}});
  for (Pointer relevance : relevances) check_pointers({{"relevances", relevance}});
  with_type(itemsize, [&](auto zero) {
    using T = decltype(zero);
    std::vector<const T*> pointers;
    for (Pointer relevance : relevances) pointers.push_back(as<const T>(relevance));
    fanout_epsilon(as<T>(out), pointers.data(), as<const T>(x), static_cast<int64_t>(pointers.size()), targets, size,
                   stabiliser, threads);
  });
}

void bind_share(int itemsize, Pointer s, Pointer relevance, Pointer z, int64_t targets, int64_t size, int kind,
                double epsilon, int threads) {
  const Stabiliser stabiliser = checked_stabiliser(kind, epsilon);
  check_threads(threads);
  if (checked_product({{"targets", targets}, {"size", size}}) == 0) return;
  check_pointers({{"s", s}, {"relevance", relevance}, {"z", z}});
  with_type(itemsize, [&](auto zero) {
    using T = decltype(zero);
    matmul_half_share(as<T>(s), as<const T>(relevance), as<const T>(z), targets, size, stabiliser, threads);
  });
}

void bind_attention_shares(int itemsize, Pointer s_prime, Pointer relevance, Pointer attention, Pointer sv,
                           Pointer dots, int64_t targets, int64_t size, int kind, double epsilon, int threads) {
  const Stabiliser stabiliser = checked_stabiliser(kind, epsilon);
  check_threads(threads);
  if (checked_product({{"targets", targets}, {"size", size}}) == 0) return;
  check_pointers({{"s_prime", s_prime}, {"attention", attention}, {"sv", sv}, {"dots", dots}});
  with_type(itemsize, [&](auto zero) {
    using T = decltype(zero);
    matmul_half_attention_shares(as<T>(s_prime), as<T>(relevance), as<const T>(attention), as<const T>(sv),
                                 as<const T>(dots), targets, size, stabiliser, threads);
  });
}

void bind_rollout_matrix(int itemsize, Pointer e, Pointer grad, Pointer relevance, int64_t samples, int64_t heads,
                         int64_t size, int threads) {
  check_threads(threads);
  if (heads < 1) throw std::invalid_argument("heads: expected at least 1, got " + std::to_string(heads));
  if (checked_product({{"samples", samples}, {"size", size}, {"heads", heads}}) == 0) return;
  check_pointers({{"e", e}, {"grad", grad}, {"relevance", relevance}});
  with_type(itemsize, [&](auto zero) {
    using T = decltype(zero);
    matmul_half_rollout_matrix(as<T>(e), as<const T>(grad), as<const T>(relevance), samples, heads, size, threads);
  });
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = RELPROP_VERSION;
  info["compiler"] = compiler();
  info["isa"] = isa_name(active_isa());
  info["isas_built"] = isas_built();
  info["isas_supported"] = isas_supported();
  info["openmp"] = openmp_runtime();
  info["cuda"] = false;
  info["cuda_reason"] = "this build has no CUDA sources";
  return info;
}

}  // namespace
}  // namespace relprop

PYBIND11_MODULE(_C, module) {
  using namespace relprop;
  using release_gil = py::call_guard<py::gil_scoped_release>;
  module.doc() = "relprop's CPU kernels; call them through relprop.native.";

  module.def("linear_alpha_beta_share_out", &bind_share_out, release_gil(), py::arg("itemsize"), py::arg("p1"),
             py::arg("p2"), py::arg("relevance"), py::arg("y"), py::arg("bias"), py::arg("absz"), py::arg("targets"),
             py::arg("rows"), py::arg("n"), py::arg("alpha"), py::arg("beta"), py::arg("tolerance"),
             py::arg("stabiliser_kind"), py::arg("epsilon"), py::arg("threads"));
  module.def("linear_alpha_beta_select", &bind_select, release_gil(), py::arg("itemsize"), py::arg("out"), py::arg("x"),
             py::arg("c1"), py::arg("c2"), py::arg("targets"), py::arg("size"), py::arg("threads"));
  module.def("add_normalised", &bind_add_normalised, release_gil(), py::arg("itemsize"), py::arg("relevance_a"),
             py::arg("relevance_b"), py::arg("relevance"), py::arg("a"), py::arg("b"), py::arg("targets"),
             py::arg("batch"), py::arg("b_batch"), py::arg("size"), py::arg("stabiliser_kind"), py::arg("epsilon"),
             py::arg("threads"));
  module.def("fanout_epsilon", &bind_fanout_epsilon, release_gil(), py::arg("itemsize"), py::arg("out"),
             py::arg("relevances"), py::arg("x"), py::arg("targets"), py::arg("size"), py::arg("stabiliser_kind"),
             py::arg("epsilon"), py::arg("threads"));
  module.def("matmul_half_share", &bind_share, release_gil(), py::arg("itemsize"), py::arg("s"), py::arg("relevance"),
             py::arg("z"), py::arg("targets"), py::arg("size"), py::arg("stabiliser_kind"), py::arg("epsilon"),
             py::arg("threads"));
  module.def("matmul_half_attention_shares", &bind_attention_shares, release_gil(), py::arg("itemsize"),
             py::arg("s_prime"), py::arg("relevance"), py::arg("attention"), py::arg("sv"), py::arg("dots"),
             py::arg("targets"), py::arg("size"), py::arg("stabiliser_kind"), py::arg("epsilon"), py::arg("threads"));
  module.def("matmul_half_rollout_matrix", &bind_rollout_matrix, release_gil(), py::arg("itemsize"), py::arg("e"),
             py::arg("grad"), py::arg("relevance"), py::arg("samples"), py::arg("heads"), py::arg("size"),
             py::arg("threads"));
  module.def("build_info", &build_info, "How this module was built and what it found at run time.");
  module.def("set_isa", &set_isa, py::arg("name"),
             "Replaces the instruction set for this process ('' for the default). For tests.");
}
