#include "attention_relevance_bindings.h"

#include <tuple>

#include "tape.h"

namespace relprop {
namespace {

template <typename T>
Heads<T> heads_of(const AttentionTensors& tensors, const char* name) {
  const auto* found = tensors.find(name, 3);
  if (found == nullptr) return {};
  const std::vector<int64_t>& strides = found->second;
  return {as<T>(found->first), strides[0], strides[1], strides[2]};
}

template <typename T>
TargetHeads<T> target_heads_of(const AttentionTensors& tensors, const char* name) {
  const auto* found = tensors.find(name, 4);
  if (found == nullptr) return {};
  const std::vector<int64_t>& strides = found->second;
  return {as<T>(found->first), strides[0], strides[1], strides[2], strides[3]};
}

// sizes: targets, batch, heads, key_heads, queries, keys, d, dv, row_targets
void bind_attention_relevance(int itemsize, const AttentionSizes& sizes, const AttentionTensors::Map& map, double scale,
                              bool causal, bool exact_output, int qk, int edge, int qk_kind, double qk_epsilon,
                              int av_kind, double av_epsilon, int threads) {
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
    in.q = heads_of<const T>(tensors, "q"), in.k = heads_of<const T>(tensors, "k"),
    in.v = heads_of<const T>(tensors, "v");
    in.output = heads_of<const T>(tensors, "output"), in.bias = heads_of<const T>(tensors, "bias");
    in.seen = heads_of<const uint8_t>(tensors, "seen");
    in.scale = scale, in.causal = causal, in.exact_output = exact_output;
    in.gradient = target_heads_of<const T>(tensors, "gradient"),
    in.relevance = target_heads_of<const T>(tensors, "relevance");
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
             py::arg("sizes"), py::arg("tensors"), py::arg("scale"), py::arg("causal"), py::arg("exact_output"),
             py::arg("qk"), py::arg("edge"), py::arg("qk_stabiliser_kind"), py::arg("qk_epsilon"),
             py::arg("av_stabiliser_kind"), py::arg("av_epsilon"), py::arg("threads"));
}

const Bindings bindings(bind);

}  // namespace
}  // namespace relprop
