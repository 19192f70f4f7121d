// The Python module relprop._cuda: the CUDA kernels, apart from relprop._C, so that what needs a CUDA driver is never
// in the way of what does not. Built with the host emulation it is the same module, with its kernels run on the CPU.
#include "cuda_bindings.h"

#include "activation_gradient_cuda.h"
#include "add_epsilon_cuda.h"
#include "add_gamma_cuda.h"
#include "add_normalised_cuda.h"
#include "cuda_device.h"
#include "fanout_epsilon_cuda.h"
#include "linear_alpha_beta_cuda.h"
#include "linear_back_cuda.h"
#include "linear_epsilon_cuda.h"
#include "linear_gamma_cuda.h"
#include "matmul_half_cuda.h"
#include "norm_gradient_cuda.h"
#include "softmax_taylor_cuda.h"

namespace relprop {
namespace {

Product product_of(int code) { return choice<Product>("product", code, 4); }

struct LinearSizes {
  int64_t targets, rows, n, k;
};

// False where there is nothing to do.
bool has_work(const LinearSizes& sizes) {
  checked_product({{"rows", sizes.rows}, {"k", sizes.k}});
  checked_product({{"n", sizes.n}, {"k", sizes.k}});
  return checked_product({{"targets", sizes.targets}, {"rows", sizes.rows}, {"n", sizes.n}}) != 0;
}

// y is read, and must be there, where the product is float32.
void check_linear(Product product, int64_t k, Pointer relevance, Pointer x, Pointer w, Pointer y) {
  check_pointers({{"relevance", relevance}});
  if (k > 0) check_pointers({{"x", x}, {"w", w}});
  if (product == Product::kFloat32) check_pointers({{"y", y}});
}

void bind_alpha_beta(const Context& context, int product_code, Pointer p1, Pointer p2, Pointer relevance, Pointer x,
                     Pointer w, Pointer y, Pointer bias, int64_t targets, int64_t rows, int64_t n, int64_t k,
                     double alpha, double beta, double tolerance, const StabiliserArgument& stabiliser) {
  const Product product = product_of(product_code);
  if (!has_work({targets, rows, n, k})) return;
  check_linear(product, k, relevance, x, w, y);
  check_pointers({{"p1", p1}});
  if (beta != 0.0) check_pointers({{"p2", p2}});
  linear_alpha_beta_share_out_cuda(values_of(context), streams_of(context), product, as<void>(p1), as<void>(p2),
                                   as<void>(relevance), as<void>(x), as<void>(w), as<void>(y), as<void>(bias), targets,
                                   rows, n, k, alpha, beta, tolerance, stabiliser_of(stabiliser), stream_of(context));
}

void bind_linear_epsilon(const Context& context, int product_code, Pointer s, Pointer relevance, Pointer x, Pointer w,
                         Pointer y, Pointer bias, bool bias_takes_share, int64_t targets, int64_t rows, int64_t n,
                         int64_t k, const StabiliserArgument& stabiliser) {
  const Product product = product_of(product_code);
  if (!has_work({targets, rows, n, k})) return;
  check_linear(product, k, relevance, x, w, y);
  check_pointers({{"s", s}});
  linear_epsilon_share_out_cuda(values_of(context), streams_of(context), product, as<void>(s), as<void>(relevance),
                                as<void>(x), as<void>(w), as<void>(y), as<void>(bias), bias_takes_share, targets, rows,
                                n, k, stabiliser_of(stabiliser), stream_of(context));
}

void bind_linear_gamma(const Context& context, int product_code, Pointer p1, Pointer p2, Pointer relevance, Pointer x,
                       Pointer w, Pointer y, Pointer bias, bool bias_takes_share, int64_t targets, int64_t rows,
                       int64_t n, int64_t k, double gamma, const StabiliserArgument& stabiliser) {
  const Product product = product_of(product_code);
  if (!has_work({targets, rows, n, k})) return;
  check_linear(product, k, relevance, x, w, y);
  check_pointers({{"p1", p1}, {"p2", p2}});
  linear_gamma_share_out_cuda(values_of(context), streams_of(context), product, as<void>(p1), as<void>(p2),
                              as<void>(relevance), as<void>(x), as<void>(w), as<void>(y), as<void>(bias),
                              bias_takes_share, targets, rows, n, k, gamma, stabiliser_of(stabiliser),
                              stream_of(context));
}

// out, p1, p2, targets, selection, factor1, factor2
using BackArgument = std::tuple<Pointer, Pointer, Pointer, int64_t, int, double, double>;

void bind_linear_back(const Context& context, int product_code, const std::vector<BackArgument>& arguments, Pointer x,
                      Pointer w, int64_t rows, int64_t n, int64_t k) {
  const Product product = product_of(product_code);
  std::vector<LinearBack> backs;
  for (const BackArgument& argument : arguments) {
    const auto& [out, p1, p2, targets, selection_code, factor1, factor2] = argument;
    const auto selection = choice<Selection>("selection", selection_code, 3);
    if (checked_product({{"targets", targets}, {"rows", rows}, {"k", k}}) == 0) continue;
    check_pointers({{"out", out}});
    if (n > 0) check_pointers({{"p1", p1}});
    if (n > 0 && selection == Selection::kHalves) check_pointers({{"p2", p2}});
    if (selection != Selection::kNone) check_pointers({{"x", x}});
    backs.push_back({as<void>(out), as<void>(p1), as<void>(p2), targets, selection, static_cast<float>(factor1),
                     static_cast<float>(factor2)});
  }
  has_work({1, rows, n, k});
  if (backs.empty()) return;
  if (n > 0) check_pointers({{"w", w}});
  linear_back_cuda(values_of(context), streams_of(context), product, backs.data(), static_cast<int>(backs.size()),
                   as<void>(x), as<void>(w), rows, n, k, stream_of(context));
}

void bind_add_normalised(const Context& context, Pointer relevance_a, Pointer relevance_b, Pointer relevance, Pointer a,
                         Pointer b, Pointer workspace, int64_t targets, int64_t batch, int64_t b_batch, int64_t size,
                         const StabiliserArgument& stabiliser) {
  if (b_batch != batch && b_batch != 1) {
    throw std::invalid_argument("b_batch: expected 1 or batch (" + std::to_string(batch) + "), got " +
                                std::to_string(b_batch));
  }
  if (checked_product({{"targets", targets}, {"batch", batch}, {"size", size}}) == 0) return;
  check_pointers({{"relevance_a", relevance_a},
                  {"relevance_b", relevance_b},
                  {"relevance", relevance},
                  {"a", a},
                  {"b", b},
                  {"workspace", workspace}});
  add_normalised_cuda(values_of(context), streams_of(context), as<void>(relevance_a), as<void>(relevance_b),
                      as<void>(relevance), as<void>(a), as<void>(b), as<double>(workspace), targets, batch, b_batch,
                      size, stabiliser_of(stabiliser), stream_of(context));
}

void bind_add_epsilon(const Context& context, Pointer relevance_a, Pointer relevance_b, Pointer relevance, Pointer a,
                      Pointer b, int64_t targets, int64_t size, const StabiliserArgument& stabiliser) {
  if (checked_product({{"targets", targets}, {"size", size}}) == 0) return;
  check_pointers(
      {{"relevance_a", relevance_a}, {"relevance_b", relevance_b}, {"relevance", relevance}, {"a", a}, {"b", b}});
  add_epsilon_cuda(values_of(context), streams_of(context), as<void>(relevance_a), as<void>(relevance_b),
                   as<void>(relevance), as<void>(a), as<void>(b), targets, size, stabiliser_of(stabiliser),
                   stream_of(context));
}

void bind_add_gamma(const Context& context, Pointer relevance_a, Pointer relevance_b, Pointer relevance, Pointer a,
                    Pointer b, int64_t targets, int64_t size, double gamma, const StabiliserArgument& stabiliser) {
  if (checked_product({{"targets", targets}, {"size", size}}) == 0) return;
  check_pointers(
      {{"relevance_a", relevance_a}, {"relevance_b", relevance_b}, {"relevance", relevance}, {"a", a}, {"b", b}});
  add_gamma_cuda(values_of(context), streams_of(context), as<void>(relevance_a), as<void>(relevance_b),
                 as<void>(relevance), as<void>(a), as<void>(b), targets, size, gamma, stabiliser_of(stabiliser),
                 stream_of(context));
}

void bind_fanout_epsilon(const Context& context, Pointer out, const std::vector<Pointer>& relevances, Pointer x,
                         int64_t targets, int64_t size, const StabiliserArgument& stabiliser) {
  if (checked_product({{"targets", targets}, {"size", size}}) == 0) return;
  check_pointers({{"out", out}, {"x", x}});
  std::vector<const void*> pointers;
  for (Pointer relevance : relevances) {
    check_pointers({{"relevances", relevance}});
    pointers.push_back(as<void>(relevance));
  }
  fanout_epsilon_cuda(values_of(context), streams_of(context), as<void>(out), pointers.data(), as<void>(x),
                      static_cast<int>(pointers.size()), targets, size, stabiliser_of(stabiliser), stream_of(context));
}

void bind_share(const Context& context, Pointer s, Pointer relevance, Pointer z, int64_t targets, int64_t size,
                const StabiliserArgument& stabiliser) {
  if (checked_product({{"targets", targets}, {"size", size}}) == 0) return;
  check_pointers({{"s", s}, {"relevance", relevance}, {"z", z}});
  matmul_half_share_cuda(values_of(context), streams_of(context), as<void>(s), as<void>(relevance), as<void>(z),
                         targets, size, stabiliser_of(stabiliser), stream_of(context));
}

void bind_attention_shares(const Context& context, Pointer s_prime, Pointer relevance, Pointer attention, Pointer sv,
                           Pointer dots, int64_t targets, int64_t size, const StabiliserArgument& stabiliser) {
  if (checked_product({{"targets", targets}, {"size", size}}) == 0) return;
  check_pointers({{"s_prime", s_prime}, {"attention", attention}, {"sv", sv}, {"dots", dots}});
  matmul_half_attention_shares_cuda(values_of(context), streams_of(context), as<void>(s_prime), as<void>(relevance),
                                    as<void>(attention), as<void>(sv), as<void>(dots), targets, size,
                                    stabiliser_of(stabiliser), stream_of(context));
}

void bind_softmax_taylor(const Context& context, Pointer out, Pointer relevance, Pointer logits, Pointer probabilities,
                         int64_t targets, int64_t rows, int64_t n) {
  if (checked_product({{"targets", targets}, {"rows", rows}, {"n", n}}) == 0) return;
  check_pointers({{"out", out}, {"relevance", relevance}, {"logits", logits}, {"probabilities", probabilities}});
  softmax_taylor_cuda(values_of(context), streams_of(context), as<void>(out), as<void>(relevance), as<void>(logits),
                      as<void>(probabilities), targets, rows, n, stream_of(context));
}

void bind_norm_gradient(const Context& context, Pointer out, Pointer gradient, Pointer x, Pointer weight,
                        int64_t targets, int64_t rows, int64_t n, double epsilon, int norm) {
  const Norm kind = choice<Norm>("norm", norm, 2);
  check_epsilon(epsilon);
  if (checked_product({{"targets", targets}, {"rows", rows}, {"n", n}}) == 0) return;
  check_pointers({{"out", out}, {"gradient", gradient}, {"x", x}});
  norm_gradient_cuda(values_of(context), streams_of(context), as<void>(out), as<void>(gradient), as<void>(x),
                     as<void>(weight), targets, rows, n, epsilon, kind, stream_of(context));
}

void bind_activation_gradient(const Context& context, Pointer out, Pointer gradient, Pointer x, int64_t targets,
                              int64_t size, int activation) {
  const Activation kind = choice<Activation>("activation", activation, 3);
  if (checked_product({{"targets", targets}, {"size", size}}) == 0) return;
  check_pointers({{"out", out}, {"gradient", gradient}, {"x", x}});
  activation_gradient_cuda(values_of(context), streams_of(context), as<void>(out), as<void>(gradient), as<void>(x),
                           targets, size, kind, stream_of(context));
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = cuda_compiler();
  info["reason"] = cuda_reason();
  return info;
}

}  // namespace
}  // namespace relprop

PYBIND11_MODULE(_cuda, module) {
  using namespace relprop;
  module.doc() = "relprop's CUDA kernels; call them through relprop.native_cuda.";
  for (const Bindings::Bind bind : Bindings::all()) bind(module);
  module.def("linear_alpha_beta_share_out", &bind_alpha_beta, release_gil());
  module.def("linear_epsilon_share_out", &bind_linear_epsilon, release_gil());
  module.def("linear_gamma_share_out", &bind_linear_gamma, release_gil());
  module.def("linear_back", &bind_linear_back, release_gil());
  module.def("add_normalised", &bind_add_normalised, release_gil());
  module.def("add_normalised_workspace", &add_normalised_workspace);
  module.def("add_epsilon", &bind_add_epsilon, release_gil());
  module.def("add_gamma", &bind_add_gamma, release_gil());
  module.def("fanout_epsilon", &bind_fanout_epsilon, release_gil());
  module.def("matmul_half_share", &bind_share, release_gil());
  module.def("matmul_half_attention_shares", &bind_attention_shares, release_gil());
  module.def("softmax_taylor", &bind_softmax_taylor, release_gil());
  module.def("norm_gradient", &bind_norm_gradient, release_gil());
  module.def("activation_gradient", &bind_activation_gradient, release_gil());
  module.def("build_info", &build_info, "How this module was built and whether it can run here.");
  module.def("set_order", &set_cuda_order, py::arg("order"),
             "Emulation only: fibres run forwards (0), backwards (1) or shuffled (2). For tests.");
  module.def("launches", &cuda_launches, "Emulation only: how many kernels were launched. For tests.");
  module.def("set_most_shared", &set_cuda_most_shared, py::arg("bytes"),
             "Emulation only: shared memory that one block may have. For tests.");
  module.attr("DEVICE_TYPE") = cuda_device_type();  // where tensors must lie
  module.attr("MAX_BACKS") = kMaxBacks;
  module.attr("MAX_FANOUT") = kMaxFanout;
}
