#include "bindings.h"
#include "linear_alpha_beta.h"
#include "linear_epsilon.h"
#include "linear_gamma.h"
#include "tape.h"

namespace relprop {
namespace {

void bind_share_out(TensorArgument p1, TensorArgument p2, TensorArgument relevance, TensorArgument y,
                    TensorArgument bias, TensorArgument absz, int64_t targets, int64_t rows, int64_t n, double alpha,
                    double beta, double tolerance, int kind, double epsilon, int threads) {
  const Stabiliser stabiliser = checked_stabiliser(kind, epsilon);
  check_threads(threads);
  if (checked_product({{"targets", targets}, {"rows", rows}, {"n", n}}) == 0) return;
  check_pointers({{"p1", p1}, {"relevance", relevance}, {"y", y}, {"absz", absz}});
  if (beta != 0.0) check_pointers({{"p2", p2}});
  with_stream_type("relevance", relevance, [&](auto zero) {
    using T = decltype(zero);
    linear_alpha_beta_share_out(result<T>("p1", p1), result<T>("p2", p2), operand<T>("relevance", relevance),
                                operand<T>("y", y), operand<T>("bias", bias), operand<T>("absz", absz), targets, rows,
                                n, alpha, beta, tolerance, stabiliser, threads);
  });
}

void bind_select(TensorArgument out, TensorArgument x, TensorArgument c1, TensorArgument c2, int64_t targets,
                 int64_t size, int threads) {
  check_threads(threads);
  if (checked_product({{"targets", targets}, {"size", size}}) == 0) return;
  check_pointers({{"out", out}, {"x", x}, {"c1", c1}, {"c2", c2}});
  with_stream_type("c1", c1, [&](auto zero) {
    using T = decltype(zero);
    linear_alpha_beta_select(result<T>("out", out), operand<T>("x", x), operand<T>("c1", c1), operand<T>("c2", c2),
                             targets, size, threads);
  });
}

void bind_epsilon_share_out(TensorArgument s, TensorArgument relevance, TensorArgument y, TensorArgument bias,
                            int64_t targets, int64_t rows, int64_t n, double bias_factor, int kind, double epsilon,
                            int threads) {
  const Stabiliser stabiliser = checked_stabiliser(kind, epsilon);
  check_threads(threads);
  if (checked_product({{"targets", targets}, {"rows", rows}, {"n", n}}) == 0) return;
  check_pointers({{"s", s}, {"relevance", relevance}, {"y", y}});
  with_stream_type("relevance", relevance, [&](auto zero) {
    using T = decltype(zero);
    linear_epsilon_share_out(result<T>("s", s), operand<T>("relevance", relevance), operand<T>("y", y),
                             operand<T>("bias", bias), targets, rows, n, bias_factor, stabiliser, threads);
  });
}

void bind_epsilon_select(TensorArgument out, TensorArgument x, TensorArgument c, int64_t targets, int64_t size,
                         int threads) {
  check_threads(threads);
  if (checked_product({{"targets", targets}, {"size", size}}) == 0) return;
  check_pointers({{"out", out}, {"x", x}, {"c", c}});
  with_stream_type("c", c, [&](auto zero) {
    using T = decltype(zero);
    linear_epsilon_select(result<T>("out", out), operand<T>("x", x), operand<T>("c", c), targets, size, threads);
  });
}

void bind_gamma_share_out(TensorArgument p1, TensorArgument p2, TensorArgument relevance, TensorArgument y,
                          TensorArgument bias, TensorArgument absz, int64_t targets, int64_t rows, int64_t n,
                          double gamma, bool biased, bool bias_share, int kind, double epsilon, int threads) {
  const Stabiliser stabiliser = checked_stabiliser(kind, epsilon);
  check_threads(threads);
  if (checked_product({{"targets", targets}, {"rows", rows}, {"n", n}}) == 0) return;
  check_pointers({{"p1", p1}, {"p2", p2}, {"relevance", relevance}, {"y", y}, {"absz", absz}});
  with_stream_type("relevance", relevance, [&](auto zero) {
    using T = decltype(zero);
    linear_gamma_share_out(result<T>("p1", p1), result<T>("p2", p2), operand<T>("relevance", relevance),
                           operand<T>("y", y), operand<T>("bias", bias), operand<T>("absz", absz), targets, rows, n,
                           gamma, biased, bias_share, stabiliser, threads);
  });
}

const Bindings bindings([](py::module_& module) {
  module.def("linear_alpha_beta_share_out", taped<&bind_share_out>, release_gil(), py::arg("p1"), py::arg("p2"),
             py::arg("relevance"), py::arg("y"), py::arg("bias"), py::arg("absz"), py::arg("targets"), py::arg("rows"),
             py::arg("n"), py::arg("alpha"), py::arg("beta"), py::arg("tolerance"), py::arg("stabiliser_kind"),
             py::arg("epsilon"), py::arg("threads"));
  module.def("linear_alpha_beta_select", taped<&bind_select>, release_gil(), py::arg("out"), py::arg("x"),
             py::arg("c1"), py::arg("c2"), py::arg("targets"), py::arg("size"), py::arg("threads"));
  module.def("linear_epsilon_share_out", taped<&bind_epsilon_share_out>, release_gil(), py::arg("s"),
             py::arg("relevance"), py::arg("y"), py::arg("bias"), py::arg("targets"), py::arg("rows"), py::arg("n"),
             py::arg("bias_factor"), py::arg("stabiliser_kind"), py::arg("epsilon"), py::arg("threads"));
  module.def("linear_epsilon_select", taped<&bind_epsilon_select>, release_gil(), py::arg("out"), py::arg("x"),
             py::arg("c"), py::arg("targets"), py::arg("size"), py::arg("threads"));
  module.def("linear_gamma_share_out", taped<&bind_gamma_share_out>, release_gil(), py::arg("p1"), py::arg("p2"),
             py::arg("relevance"), py::arg("y"), py::arg("bias"), py::arg("absz"), py::arg("targets"), py::arg("rows"),
             py::arg("n"), py::arg("gamma"), py::arg("biased"), py::arg("bias_share"), py::arg("stabiliser_kind"),
             py::arg("epsilon"), py::arg("threads"));
});

}  // namespace
}  // namespace relprop
