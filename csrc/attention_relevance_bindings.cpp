#include "attention_relevance_bindings.h"

#include <tuple>

#include "tape.h"

namespace relprop {
namespace {

using DTypes = std::map<std::string, int>;  // of tensors that are not of the type computed in

// Of type T or of a half precision.
template <typename T>
Source<T> source_of(const AttentionTensors& tensors, const DTypes& dtypes, const char* name, bool targets = false) {
  const auto* found = tensors.find(name, targets ? 4 : 3);
  if (found == nullptr) return {};
  const auto code = dtypes.find(name);
  const DType dtype = code == dtypes.end() ? kDTypeOf<T> : checked_dtype(name, code->second);
  const Operand<T> read = operand<T>(name, {found->first, static_cast<int>(dtype)});
  const std::vector<int64_t>& strides = found->second;
  const size_t first = targets ? 1 : 0;
  return {read.data, read.widen, targets ? strides[0] : 0, strides[first], strides[first + 1], strides[first + 2]};
}

Flags flags_of(const AttentionTensors& tensors, const char* name) {
  const auto* found = tensors.find(name, 3);
  if (found == nullptr) return {};
  const std::vector<int64_t>& strides = found->second;
  return {as<const uint8_t>(found->first), strides[0], strides[1], strides[2]};
}

template <typename T>
TargetHeads<T> target_heads_of(const AttentionTensors& tensors, const char* name) {
  const auto* found = tensors.find(name, 4);
  if (found == nullptr) return {};
  const std::vector<int64_t>& strides = found->second;
  return {as<T>(found->first), strides[0], strides[1], strides[2], strides[3]};
}

// sizes: targets, batch, heads, key_heads, queries, keys, d, dv, row_targets
void bind_attention_relevance(int itemsize, const AttentionSizes& sizes, const AttentionTensors::Map& map,
                              const DTypes& dtypes, double scale, bool causal, bool exact_output, int qk, int edge,
                              int qk_kind, double qk_epsilon, int av_kind, double av_epsilon, int threads) {
  const AttentionTensors tensors(map);
  check_threads(threads);
  const QkRule rule = checked_kind("qk", qk, QkRule::kDetached);
  const Edge made_of = checked_kind("edge", edge, Edge::kAttention);
  check_attention(tensors, sizes, rule, made_of, exact_output);
  if (sizes[1] == 0 || sizes[4] == 0 || sizes[5] == 0) return;  // batch, queries, keys
  with_type(itemsize, [&](auto zero) {
    using T = decltype(zero);
    AttentionRelevance<T> in{};
    std::tie(in.targets, in.batch, in.heads, in.key_heads, in.queries, in.keys, in.d, in.dv, in.row_targets) =
        std::tuple_cat(sizes);
    in.q = source_of<T>(tensors, dtypes, "q"), in.k = source_of<T>(tensors, dtypes, "k");
    in.v = source_of<T>(tensors, dtypes, "v"), in.output = source_of<T>(tensors, dtypes, "output");
    in.bias = source_of<T>(tensors, dtypes, "bias"), in.seen = flags_of(tensors, "seen");
    in.scale = scale, in.causal = causal, in.exact_output = exact_output && in.output.widen == nullptr;
    in.gradient = source_of<T>(tensors, dtypes, "gradient", true);
    in.relevance = source_of<T>(tensors, dtypes, "relevance", true);
    in.gradient_q = target_heads_of<T>(tensors, "gradient_q"),
    in.gradient_k = target_heads_of<T>(tensors, "gradient_k");
    in.gradient_v = target_heads_of<T>(tensors, "gradient_v"),
    in.relevance_q = target_heads_of<T>(tensors, "relevance_q");
    in.relevance_k = target_heads_of<T>(tensors, "relevance_k"),
    in.relevance_v = target_heads_of<T>(tensors, "relevance_v");
    in.qk = rule, in.edge = made_of;
    in.qk_stabiliser = checked_stabiliser(qk_kind, qk_epsilon);
    in.av_stabiliser = checked_stabiliser(av_kind, av_epsilon);
    if (const auto* row = made_of == Edge::kNone ? nullptr : tensors.find("row", 2)) {
      in.row = as<const T>(row->first), in.row_target = row->second[0], in.row_batch = row->second[1];
      in.row_out = as<T>(tensors.find("row_out", 2)->first);
    }
    attention_relevance(in, threads);
  });
}

void bind(py::module_& module) {
  module.def("attention_relevance", taped<&bind_attention_relevance>, release_gil(), py::arg("itemsize"),
             py::arg("sizes"), py::arg("tensors"), py::arg("dtypes"), py::arg("scale"), py::arg("causal"),
             py::arg("exact_output"), py::arg("qk"), py::arg("edge"), py::arg("qk_stabiliser_kind"),
             py::arg("qk_epsilon"), py::arg("av_stabiliser_kind"), py::arg("av_epsilon"), py::arg("threads"));
}

const Bindings bindings(bind);

}  // namespace
}  // namespace relprop
