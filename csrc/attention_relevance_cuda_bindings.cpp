#include <tuple>

#include "attention_relevance_bindings.h"
#include "attention_relevance_cuda.h"
#include "cuda_bindings.h"

namespace relprop {
namespace {

AttentionTensor tensor(const AttentionTensors& tensors, const char* name, bool targets) {
  const auto* found = tensors.find(name, targets ? 4 : 3);
  if (found == nullptr) return {};
  const std::vector<int64_t>& strides = found->second;
  const size_t first = targets ? 1 : 0;
  return {as<void>(found->first), targets ? strides[0] : 0, strides[first], strides[first + 1], strides[first + 2]};
}

void take_sizes(AttentionRelevanceCuda& in, const AttentionSizes& sizes) {
  std::tie(in.targets, in.batch, in.heads, in.key_heads, in.queries, in.keys, in.d, in.dv, in.row_targets) =
      std::tuple_cat(sizes);
  for (const auto& [name, rows] : {std::pair{"queries", in.queries}, std::pair{"keys", in.keys}}) {
    if (rows <= kMostAttentionRows) continue;
    throw std::invalid_argument(std::string(name) + ": expected at most " + std::to_string(kMostAttentionRows) +
                                ", got " + std::to_string(rows));
  }
}

// workspace: attention_relevance_workspace(sizes, edge) float32 numbers
void run(const Context& context, int product, const AttentionSizes& sizes, const AttentionTensors::Map& map,
         double scale, bool causal, bool exact_output, int qk, int edge, const StabiliserArgument& qk_stabiliser,
         const StabiliserArgument& av_stabiliser, Pointer workspace) {
  const AttentionTensors tensors(map);
  AttentionRelevanceCuda in{};
  take_sizes(in, sizes);
  in.values = values_of(context), in.streams = streams_of(context);
  in.product = choice<Product>("product", product, 2);
  in.q = tensor(tensors, "q", false), in.k = tensor(tensors, "k", false), in.v = tensor(tensors, "v", false);
  in.output = tensor(tensors, "output", false), in.bias = tensor(tensors, "bias", false);
  in.seen = tensor(tensors, "seen", false);
  in.gradient = tensor(tensors, "gradient", true), in.relevance = tensor(tensors, "relevance", true);
  in.gradient_q = tensor(tensors, "gradient_q", true), in.gradient_k = tensor(tensors, "gradient_k", true);
  in.gradient_v = tensor(tensors, "gradient_v", true), in.relevance_q = tensor(tensors, "relevance_q", true);
  in.relevance_k = tensor(tensors, "relevance_k", true), in.relevance_v = tensor(tensors, "relevance_v", true);
  in.scale = scale, in.causal = causal, in.exact_output = exact_output;
  in.qk = checked_kind("qk", qk, QkRule::kDetached), in.edge = checked_kind("edge", edge, Edge::kAttention);
  in.qk_stabiliser = stabiliser_of(qk_stabiliser), in.av_stabiliser = stabiliser_of(av_stabiliser);
  check_attention(tensors, sizes, in.qk, in.edge, in.exact_output);
  const int64_t largest = attention_relevance_largest_head(in.values, stream_of(context).device);
  if (in.d > largest || in.dv > largest) {
    throw std::invalid_argument("d, dv: expected heads of at most " + std::to_string(largest) +
                                " channels on this device, got " + std::to_string(in.d) + " and " +
                                std::to_string(in.dv));
  }
  if (const auto* row = in.edge == Edge::kNone ? nullptr : tensors.find("row", 2)) {
    in.row = as<float>(row->first), in.row_target = row->second[0], in.row_batch = row->second[1];
    in.row_out = as<float>(tensors.find("row_out", 2)->first);
  }
  if (in.batch == 0 || in.queries == 0 || in.keys == 0) return;
  check_pointers({{"workspace", workspace}});
  in.workspace = as<float>(workspace);
  attention_relevance_cuda(in, stream_of(context));
}

int64_t workspace(const AttentionSizes& sizes, int edge) {
  AttentionRelevanceCuda in{};
  take_sizes(in, sizes);
  in.edge = checked_kind("edge", edge, Edge::kAttention);
  return attention_relevance_workspace(in);
}

const Bindings bindings([](py::module_& module) {
  module.def("attention_relevance", &run, release_gil());
  module.def("attention_relevance_workspace", &workspace);
  module.def("attention_relevance_largest_head",
             [](int values, int device) { return attention_relevance_largest_head(dtype_of(values), device); });
});

}  // namespace
}  // namespace relprop
