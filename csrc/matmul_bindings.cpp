#include "bindings.h"
#include "matmul_half.h"

namespace relprop {
namespace {

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

const Bindings bindings([](py::module_& module) {
  module.def("matmul_half_share", &bind_share, release_gil(), py::arg("itemsize"), py::arg("s"), py::arg("relevance"),
             py::arg("z"), py::arg("targets"), py::arg("size"), py::arg("stabiliser_kind"), py::arg("epsilon"),
             py::arg("threads"));
  module.def("matmul_half_attention_shares", &bind_attention_shares, release_gil(), py::arg("itemsize"),
             py::arg("s_prime"), py::arg("relevance"), py::arg("attention"), py::arg("sv"), py::arg("dots"),
             py::arg("targets"), py::arg("size"), py::arg("stabiliser_kind"), py::arg("epsilon"), py::arg("threads"));
  module.def("matmul_half_rollout_matrix", &bind_rollout_matrix, release_gil(), py::arg("itemsize"), py::arg("e"),
             py::arg("grad"), py::arg("relevance"), py::arg("samples"), py::arg("heads"), py::arg("size"),
             py::arg("threads"));
});

}  // namespace
}  // namespace relprop
