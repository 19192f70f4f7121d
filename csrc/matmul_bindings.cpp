#include "bindings.h"
#include "matmul_half.h"
#include "softmax_taylor.h"
#include "tape.h"

namespace relprop {
namespace {

void bind_share(TensorArgument s, TensorArgument relevance, TensorArgument z, int64_t targets, int64_t size, int kind,
                double epsilon, int threads) {
  const Stabiliser stabiliser = checked_stabiliser(kind, epsilon);
  check_threads(threads);
  if (checked_product({{"targets", targets}, {"size", size}}) == 0) return;
  check_pointers({{"s", s}, {"relevance", relevance}, {"z", z}});
  with_stream_type("relevance", relevance, [&](auto zero) {
    using T = decltype(zero);
    matmul_half_share(result<T>("s", s), operand<T>("relevance", relevance), operand<T>("z", z), targets, size,
                      stabiliser, threads);
  });
}

void bind_attention_shares(TensorArgument s_prime, TensorArgument relevance, TensorArgument attention,
                           TensorArgument sv, TensorArgument dots, int64_t targets, int64_t size, int kind,
                           double epsilon, int threads) {
  const Stabiliser stabiliser = checked_stabiliser(kind, epsilon);
  check_threads(threads);
  if (checked_product({{"targets", targets}, {"size", size}}) == 0) return;
  check_pointers({{"s_prime", s_prime}, {"attention", attention}, {"sv", sv}, {"dots", dots}});
  with_stream_type("sv", sv, [&](auto zero) {
    using T = decltype(zero);
    matmul_half_attention_shares(result<T>("s_prime", s_prime), result<T>("relevance", relevance),
                                 operand<T>("attention", attention), operand<T>("sv", sv), operand<T>("dots", dots),
                                 targets, size, stabiliser, threads);
  });
}

void bind_rollout_matrix(TensorArgument e, TensorArgument grad, TensorArgument relevance, int64_t samples,
                         int64_t heads, int64_t size, int threads) {
  check_threads(threads);
  if (heads < 1) throw std::invalid_argument("heads: expected at least 1, got " + std::to_string(heads));
  if (checked_product({{"samples", samples}, {"size", size}, {"heads", heads}}) == 0) return;
  check_pointers({{"e", e}, {"grad", grad}, {"relevance", relevance}});
  with_stream_type("grad", grad, [&](auto zero) {
    using T = decltype(zero);
    matmul_half_rollout_matrix(result<T>("e", e), operand<T>("grad", grad), operand<T>("relevance", relevance), samples,
                               heads, size, threads);
  });
}

void bind_softmax_taylor(TensorArgument out, TensorArgument relevance, TensorArgument logits,
                         TensorArgument probabilities, int64_t targets, int64_t rows, int64_t n, int threads) {
  check_threads(threads);
  if (checked_product({{"targets", targets}, {"rows", rows}, {"n", n}}) == 0) return;
  check_pointers({{"out", out}, {"relevance", relevance}, {"logits", logits}, {"probabilities", probabilities}});
  with_stream_type("relevance", relevance, [&](auto zero) {
    using T = decltype(zero);
    softmax_taylor(result<T>("out", out), operand<T>("relevance", relevance), operand<T>("logits", logits),
                   operand<T>("probabilities", probabilities), targets, rows, n, threads);
  });
}

const Bindings bindings([](py::module_& module) {
  module.def("matmul_half_share", taped<&bind_share>, release_gil(), py::arg("s"), py::arg("relevance"), py::arg("z"),
             py::arg("targets"), py::arg("size"), py::arg("stabiliser_kind"), py::arg("epsilon"), py::arg("threads"));
  module.def("matmul_half_attention_shares", taped<&bind_attention_shares>, release_gil(), py::arg("s_prime"),
             py::arg("relevance"), py::arg("attention"), py::arg("sv"), py::arg("dots"), py::arg("targets"),
             py::arg("size"), py::arg("stabiliser_kind"), py::arg("epsilon"), py::arg("threads"));
  module.def("matmul_half_rollout_matrix", taped<&bind_rollout_matrix>, release_gil(), py::arg("e"), py::arg("grad"),
             py::arg("relevance"), py::arg("samples"), py::arg("heads"), py::arg("size"), py::arg("threads"));
  module.def("softmax_taylor", taped<&bind_softmax_taylor>, release_gil(), py::arg("out"), py::arg("relevance"),
             py::arg("logits"), py::arg("probabilities"), py::arg("targets"), py::arg("rows"), py::arg("n"),
             py::arg("threads"));
});

}  // namespace
}  // namespace relprop
