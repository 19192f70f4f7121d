#include "bindings.h"
#include "linear_products.h"
#include "tape.h"

namespace relprop {
namespace {

Matrix matrix(const char* name, Pointer data, int dtype, int64_t row, int64_t column) {
  if (dtype < 0 || dtype > 2) {
    throw std::invalid_argument(std::string(name) + ": expected dtype 0, 1 or 2, got " + std::to_string(dtype));
  }
  if (row != 1 && column != 1) {
    throw std::invalid_argument(std::string(name) + ": expected rows or columns next to each other, got strides " +
                                std::to_string(row) + ", " + std::to_string(column));
  }
  check_pointers({{name, data}});
  return {as<const void>(data), static_cast<DType>(dtype), row, column};
}

Operands checked_operands(int operands) {
  if (operands != 0 && operands != 1) {
    throw std::invalid_argument("operands: expected 0 (float32) or 1 (bfloat16), got " + std::to_string(operands));
  }
  return static_cast<Operands>(operands);
}

// (pointer, dtype, row stride, column stride)
using PythonMatrix = std::tuple<Pointer, int, int64_t, int64_t>;

// x: (pointer, dtype); packed: 0, or w as linear_pack leaves it.
struct PythonLinear {
  std::pair<Pointer, int> x;
  PythonMatrix w;
  Pointer packed;
  int64_t rows, k, n;
  int operands;
};

void each_pointer(PythonLinear& layer, const EachPointer& each) {
  each(layer.x.first);
  relprop::each_pointer(layer.w, each);
  each(layer.packed);
}

// The layer, and whether there is anything to do.
std::pair<Linear, bool> checked(const PythonLinear& given, int64_t targets, int threads) {
  check_threads(threads);
  Linear layer{{}, {}, given.rows, given.k, given.n, checked_operands(given.operands)};
  const bool some = checked_product({{"targets", targets}, {"rows", given.rows}, {"n", given.n}}) != 0 &&
                    checked_product({{"n", given.n}, {"k", given.k}}) != 0;
  if (!some) return {layer, false};
  const auto& [w, dtype, row, column] = given.w;
  layer.w = matrix("w", w, dtype, row, column);
  layer.w.packed = as<const char>(given.packed);
  if (given.x.first != 0) layer.x = matrix("x", given.x.first, given.x.second, given.k, 1);
  return {layer, true};
}

int64_t bind_packed_bytes(int64_t n, int64_t depth, int operands) {
  const int64_t panels = (n + kTileColumns - 1) / kTileColumns;
  return checked_product({{"panels", panels}, {"panel", panel_bytes(depth, checked_operands(operands))}});
}

void bind_pack(Pointer packed, const PythonMatrix& given, int64_t n, int64_t k, bool transpose, int operands,
               int threads) {
  check_threads(threads);
  check_pointers({{"packed", packed}});
  const auto& [w, dtype, row, column] = given;
  linear_pack(as<char>(packed), matrix("w", w, dtype, row, column), n, k, transpose, checked_operands(operands),
              threads);
}

void bind_apply(Pointer y, Pointer bias, const PythonLinear& given, int threads) {
  const auto [layer, some] = checked(given, 1, threads);
  if (!some) return;
  check_pointers({{"y", y}, {"x", given.x.first}});
  linear_apply(as<float>(y), as<const float>(bias), layer, threads);
}

void bind_apply_rounded(Pointer y, Pointer sums, Pointer bias, const PythonLinear& given, int threads) {
  const auto [layer, some] = checked(given, 1, threads);
  if (!some) return;
  check_pointers({{"y", y}, {"sums", sums}, {"x", given.x.first}});
  linear_apply_rounded(as<uint16_t>(y), as<float>(sums), as<const float>(bias), layer, threads);
}

void bind_transpose(Pointer out, Pointer r, const PythonLinear& given, int64_t targets, int threads) {
  const auto [layer, some] = checked(given, targets, threads);
  if (!some) return;
  check_pointers({{"out", out}, {"r", r}});
  linear_transpose(as<float>(out), as<const float>(r), layer, targets, threads);
}

void bind_share_out(Pointer shares, Pointer relevance, Pointer y, Pointer bias, const PythonLinear& given,
                    int64_t targets, double alpha, double tolerance, int kind, double epsilon, int threads) {
  const Stabiliser stabiliser = checked_stabiliser(kind, epsilon);
  const auto [layer, some] = checked(given, targets, threads);
  if (!some) return;
  check_pointers({{"shares", shares}, {"relevance", relevance}, {"x", given.x.first}});
  linear_alpha_beta_share_out_product(as<float>(shares), as<const float>(relevance), as<const float>(y),
                                      as<const float>(bias), layer, targets, alpha, tolerance, stabiliser, threads);
}

void bind_back(Pointer out, Pointer shares, const PythonLinear& given, int64_t targets, int threads) {
  const auto [layer, some] = checked(given, targets, threads);
  if (!some) return;
  check_pointers({{"out", out}, {"shares", shares}, {"x", given.x.first}});
  linear_alpha_beta_back_product(as<float>(out), as<const float>(shares), layer, targets, threads);
}

const Bindings bindings([](py::module_& module) {
  py::class_<PythonLinear>(module, "Linear")
      .def(py::init<std::pair<Pointer, int>, PythonMatrix, Pointer, int64_t, int64_t, int64_t, int>(), py::arg("x"),
           py::arg("w"), py::arg("packed"), py::arg("rows"), py::arg("k"), py::arg("n"), py::arg("operands"));
  module.def("gemm_fast", [](int operands) { return gemm_fast(checked_operands(operands)); }, py::arg("operands"));
  module.def("linear_packed_bytes", &bind_packed_bytes, py::arg("n"), py::arg("depth"), py::arg("operands"));
  module.def("linear_pack", taped<&bind_pack>, release_gil(), py::arg("packed"), py::arg("w"), py::arg("n"),
             py::arg("k"), py::arg("transpose"), py::arg("operands"), py::arg("threads"));
  module.def("linear_apply", taped<&bind_apply>, release_gil(), py::arg("y"), py::arg("bias"), py::arg("layer"),
             py::arg("threads"));
  module.def("linear_apply_rounded", taped<&bind_apply_rounded>, release_gil(), py::arg("y"), py::arg("sums"),
             py::arg("bias"), py::arg("layer"), py::arg("threads"));
  module.def("linear_transpose", taped<&bind_transpose>, release_gil(), py::arg("out"), py::arg("r"), py::arg("layer"),
             py::arg("targets"), py::arg("threads"));
  module.def("linear_alpha_beta_share_out_product", taped<&bind_share_out>, release_gil(), py::arg("shares"),
             py::arg("relevance"), py::arg("y"), py::arg("bias"), py::arg("layer"), py::arg("targets"),
             py::arg("alpha"), py::arg("tolerance"), py::arg("stabiliser_kind"), py::arg("epsilon"),
             py::arg("threads"));
  module.def("linear_alpha_beta_back_product", taped<&bind_back>, release_gil(), py::arg("out"), py::arg("shares"),
             py::arg("layer"), py::arg("targets"), py::arg("threads"));
});

}  // namespace
}  // namespace relprop
