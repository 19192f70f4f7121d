#include "add_epsilon.h"
#include "add_gamma.h"
#include "add_normalised.h"
#include "bindings.h"
#include "fanout_epsilon.h"
#include "tape.h"

namespace relprop {
namespace {

void check_b_batch(int64_t batch, int64_t b_batch) {
  if (b_batch != batch && b_batch != 1) {
    throw std::invalid_argument("b_batch: expected 1 or batch (" + std::to_string(batch) + "), got " +
                                std::to_string(b_batch));
  }
}

void bind_add_normalised(TensorArgument relevance_a, TensorArgument relevance_b, TensorArgument relevance,
                         TensorArgument a, TensorArgument b, int64_t targets, int64_t batch, int64_t b_batch,
                         int64_t size, int kind, double epsilon, int threads) {
  const Stabiliser stabiliser = checked_stabiliser(kind, epsilon);
  check_threads(threads);
  check_b_batch(batch, b_batch);
  if (checked_product({{"targets", targets}, {"batch", batch}, {"size", size}}) == 0) return;
  check_pointers(
      {{"relevance_a", relevance_a}, {"relevance_b", relevance_b}, {"relevance", relevance}, {"a", a}, {"b", b}});
  with_stream_type("relevance", relevance, [&](auto zero) {
    using T = decltype(zero);
    add_normalised(result<T>("relevance_a", relevance_a), result<T>("relevance_b", relevance_b),
                   operand<T>("relevance", relevance), operand<T>("a", a), operand<T>("b", b), targets, batch, b_batch,
                   size, stabiliser, threads);
  });
}

// Either result may be none.
void check_add(const TensorArgument& relevance_a, const TensorArgument& relevance_b, const TensorArgument& relevance,
               const TensorArgument& a, const TensorArgument& b) {
  check_pointers({{"relevance", relevance}, {"a", a}, {"b", b}});
  if (relevance_a.first == 0 && relevance_b.first == 0) check_pointers({{"relevance_a, relevance_b", relevance_a}});
}

void bind_add_epsilon(TensorArgument relevance_a, TensorArgument relevance_b, TensorArgument relevance,
                      TensorArgument a, TensorArgument b, int64_t targets, int64_t batch, int64_t b_batch, int64_t size,
                      int kind, double epsilon, int threads) {
  const Stabiliser stabiliser = checked_stabiliser(kind, epsilon);
  check_threads(threads);
  check_b_batch(batch, b_batch);
  if (checked_product({{"targets", targets}, {"batch", batch}, {"size", size}}) == 0) return;
  check_add(relevance_a, relevance_b, relevance, a, b);
  with_stream_type("relevance", relevance, [&](auto zero) {
    using T = decltype(zero);
    add_epsilon(result<T>("relevance_a", relevance_a), result<T>("relevance_b", relevance_b),
                operand<T>("relevance", relevance), operand<T>("a", a), operand<T>("b", b), targets, batch, b_batch,
                size, stabiliser, threads);
  });
}

void bind_add_gamma(TensorArgument relevance_a, TensorArgument relevance_b, TensorArgument relevance, TensorArgument a,
                    TensorArgument b, int64_t targets, int64_t batch, int64_t b_batch, int64_t size, double gamma,
                    int kind, double epsilon, int threads) {
  const Stabiliser stabiliser = checked_stabiliser(kind, epsilon);
  check_threads(threads);
  check_b_batch(batch, b_batch);
  if (checked_product({{"targets", targets}, {"batch", batch}, {"size", size}}) == 0) return;
  check_add(relevance_a, relevance_b, relevance, a, b);
  with_stream_type("relevance", relevance, [&](auto zero) {
    using T = decltype(zero);
    add_gamma(result<T>("relevance_a", relevance_a), result<T>("relevance_b", relevance_b),
              operand<T>("relevance", relevance), operand<T>("a", a), operand<T>("b", b), targets, batch, b_batch, size,
              gamma, stabiliser, threads);
  });
}

void bind_fanout_epsilon(TensorArgument out, const std::vector<TensorArgument>& relevances, TensorArgument x,
                         int64_t targets, int64_t size, int kind, double epsilon, int threads) {
  const Stabiliser stabiliser = checked_stabiliser(kind, epsilon);
  check_threads(threads);
  if (relevances.empty()) throw std::invalid_argument("relevances: expected at least one pointer, got none");
  if (checked_product({{"targets", targets}, {"size", size}}) == 0) return;
  check_pointers({{"out", out}, {"x", x}});
  for (const TensorArgument& relevance : relevances) check_pointers({{"relevances", relevance}});
  with_stream_type("out", out, [&](auto zero) {
    using T = decltype(zero);
    std::vector<Operand<T>> operands;
    for (const TensorArgument& relevance : relevances) operands.push_back(operand<T>("relevances", relevance));
    fanout_epsilon(result<T>("out", out), operands.data(), operand<T>("x", x), static_cast<int64_t>(operands.size()),
                   targets, size, stabiliser, threads);
  });
}

const Bindings bindings([](py::module_& module) {
  module.def("add_normalised", taped<&bind_add_normalised>, release_gil(), py::arg("relevance_a"),
             py::arg("relevance_b"), py::arg("relevance"), py::arg("a"), py::arg("b"), py::arg("targets"),
             py::arg("batch"), py::arg("b_batch"), py::arg("size"), py::arg("stabiliser_kind"), py::arg("epsilon"),
             py::arg("threads"));
  module.def("add_epsilon", taped<&bind_add_epsilon>, release_gil(), py::arg("relevance_a"), py::arg("relevance_b"),
             py::arg("relevance"), py::arg("a"), py::arg("b"), py::arg("targets"), py::arg("batch"), py::arg("b_batch"),
             py::arg("size"), py::arg("stabiliser_kind"), py::arg("epsilon"), py::arg("threads"));
  module.def("add_gamma", taped<&bind_add_gamma>, release_gil(), py::arg("relevance_a"), py::arg("relevance_b"),
             py::arg("relevance"), py::arg("a"), py::arg("b"), py::arg("targets"), py::arg("batch"), py::arg("b_batch"),
             py::arg("size"), py::arg("gamma"), py::arg("stabiliser_kind"), py::arg("epsilon"), py::arg("threads"));
  module.def("fanout_epsilon", taped<&bind_fanout_epsilon>, release_gil(), py::arg("out"), py::arg("relevances"),
             py::arg("x"), py::arg("targets"), py::arg("size"), py::arg("stabiliser_kind"), py::arg("epsilon"),
             py::arg("threads"));
});

}  // namespace
}  // namespace relprop
