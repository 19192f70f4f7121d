#include "activation_gradient.h"
#include "activation_slope.h"
#include "bindings.h"
#include "norm_gradient.h"
#include "norm_sigma_constant.h"
#include "tape.h"

namespace relprop {
namespace {

Norm checked_norm(int norm) {
  if (norm != 0 && norm != 1) {
    throw std::invalid_argument("norm: expected 0 (layer) or 1 (rms), got " + std::to_string(norm));
  }
  return static_cast<Norm>(norm);
}

void bind_norm_gradient(TensorArgument out, TensorArgument gradient, TensorArgument x, TensorArgument weight,
                        int64_t targets, int64_t rows, int64_t n, int norm, double epsilon, int threads) {
  const Norm checked = checked_norm(norm);
  check_epsilon(epsilon);
  check_threads(threads);
  if (checked_product({{"targets", targets}, {"rows", rows}, {"n", n}}) == 0) return;
  check_pointers({{"out", out}, {"gradient", gradient}, {"x", x}});
  with_stream_type("gradient", gradient, [&](auto zero) {
    using T = decltype(zero);
    norm_gradient(result<T>("out", out), operand<T>("gradient", gradient), operand<T>("x", x),
                  operand<T>("weight", weight), targets, rows, n, checked, epsilon, threads);
  });
}

void bind_norm_sigma_constant(TensorArgument out, TensorArgument relevance, TensorArgument x, TensorArgument y,
                              TensorArgument weight, int64_t targets, int64_t rows, int64_t n, int norm,
                              double norm_epsilon, int kind, double epsilon, int threads) {
  const Stabiliser stabiliser = checked_stabiliser(kind, epsilon);
  const Norm checked = checked_norm(norm);
  check_epsilon(norm_epsilon);
  check_threads(threads);
  if (checked_product({{"targets", targets}, {"rows", rows}, {"n", n}}) == 0) return;
  check_pointers({{"out", out}, {"relevance", relevance}, {"x", x}, {"y", y}});
  with_stream_type("relevance", relevance, [&](auto zero) {
    using T = decltype(zero);
    norm_sigma_constant(result<T>("out", out), operand<T>("relevance", relevance), operand<T>("x", x),
                        operand<T>("y", y), operand<T>("weight", weight), targets, rows, n, checked, norm_epsilon,
                        stabiliser, threads);
  });
}

void bind_activation_gradient(TensorArgument out, TensorArgument gradient, TensorArgument x, int64_t targets,
                              int64_t size, int activation, int threads) {
  if (activation < 0 || activation > 2) {
    throw std::invalid_argument("activation: expected 0 (gelu), 1 (gelu, tanh) or 2 (silu), got " +
                                std::to_string(activation));
  }
  check_threads(threads);
  if (checked_product({{"targets", targets}, {"size", size}}) == 0) return;
  check_pointers({{"out", out}, {"gradient", gradient}, {"x", x}});
  with_stream_type("gradient", gradient, [&](auto zero) {
    using T = decltype(zero);
    activation_gradient(result<T>("out", out), operand<T>("gradient", gradient), operand<T>("x", x), targets, size,
                        static_cast<Activation>(activation), threads);
  });
}

void bind_activation_slope(TensorArgument out, TensorArgument relevance, TensorArgument x, TensorArgument y,
                           int64_t targets, int64_t size, int kind, double epsilon, int threads) {
  const Stabiliser stabiliser = checked_stabiliser(kind, epsilon);
  check_threads(threads);
  if (checked_product({{"targets", targets}, {"size", size}}) == 0) return;
  check_pointers({{"out", out}, {"relevance", relevance}, {"x", x}, {"y", y}});
  with_stream_type("relevance", relevance, [&](auto zero) {
    using T = decltype(zero);
    activation_slope(result<T>("out", out), operand<T>("relevance", relevance), operand<T>("x", x), operand<T>("y", y),
                     targets, size, stabiliser, threads);
  });
}

const Bindings bindings([](py::module_& module) {
  module.def("norm_gradient", taped<&bind_norm_gradient>, release_gil(), py::arg("out"), py::arg("gradient"),
             py::arg("x"), py::arg("weight"), py::arg("targets"), py::arg("rows"), py::arg("n"), py::arg("norm"),
             py::arg("epsilon"), py::arg("threads"));
  module.def("norm_sigma_constant", taped<&bind_norm_sigma_constant>, release_gil(), py::arg("out"),
             py::arg("relevance"), py::arg("x"), py::arg("y"), py::arg("weight"), py::arg("targets"), py::arg("rows"),
             py::arg("n"), py::arg("norm"), py::arg("norm_epsilon"), py::arg("stabiliser_kind"), py::arg("epsilon"),
             py::arg("threads"));
  module.def("activation_gradient", taped<&bind_activation_gradient>, release_gil(), py::arg("out"),
             py::arg("gradient"), py::arg("x"), py::arg("targets"), py::arg("size"), py::arg("activation"),
             py::arg("threads"));
  module.def("activation_slope", taped<&bind_activation_slope>, release_gil(), py::arg("out"), py::arg("relevance"),
             py::arg("x"), py::arg("y"), py::arg("targets"), py::arg("size"), py::arg("stabiliser_kind"),
             py::arg("epsilon"), py::arg("threads"));
});

}  // namespace
}  // namespace relprop
