#include <array>
#include <map>

#include "attention_relevance.h"
#include "bindings.h"

namespace relprop {
namespace {

struct Strided {
  Pointer data;
  std::vector<int64_t> strides;  // in elements, of all axes but the last, which is contiguous
};

// The tensors of a call by name, absent ones left out.
class Tensors {
 public:
  using Map = std::map<std::string, std::pair<Pointer, std::vector<int64_t>>>;

  explicit Tensors(const Map& map) : map_(map) {}

  template <typename T>
  Heads<T> heads(const char* name) const {
    const auto* found = find(name, 3);
    if (found == nullptr) return {};
    const std::vector<int64_t>& strides = found->second;
    return {as<T>(found->first), strides[0], strides[1], strides[2]};
  }

  template <typename T>
  TargetHeads<T> targets(const char* name) const {
    const auto* found = find(name, 4);
    if (found == nullptr) return {};
    const std::vector<int64_t>& strides = found->second;
    return {as<T>(found->first), strides[0], strides[1], strides[2], strides[3]};
  }

  const Map::mapped_type* find(const char* name, size_t rank) const {
    const auto found = map_.find(name);
    if (found == map_.end()) return nullptr;
    check_pointers({{name, found->second.first}});
    if (found->second.second.size() != rank) {
      throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(rank) + " strides, got " +
                                  std::to_string(found->second.second.size()));
    }
    return &found->second;
  }

  void need(std::initializer_list<const char*> names, const char* why) const {
    for (const char* name : names) {
      if (map_.count(name) == 0) throw std::invalid_argument(std::string(name) + ": expected a tensor " + why);
    }
  }

  bool has(const char* name) const { return map_.count(name) != 0; }

 private:
  const Map& map_;
};

// Every tensor that the results asked for depend on must be there.
void check_tensors(const Tensors& tensors, QkRule qk, Edge edge, bool exact_output) {
  tensors.need({"q", "k"}, "always");
  const bool gradient = tensors.has("gradient"), relevance = tensors.has("relevance");
  if (gradient || relevance) tensors.need({"v"}, "for a stream");
  if (relevance) tensors.need({"output"}, "for the relevance stream");
  if (exact_output && gradient) tensors.need({"output"}, "if exact_output is set");
  for (const char* name : {"gradient_q", "gradient_k", "gradient_v"}) {
    if (tensors.has(name)) tensors.need({"gradient"}, (std::string("for ") + name).c_str());
  }
  for (const char* name : {"relevance_q", "relevance_k", "relevance_v"}) {
    if (tensors.has(name)) tensors.need({"relevance"}, (std::string("for ") + name).c_str());
  }
  if (qk == QkRule::kDetached && (tensors.has("relevance_q") || tensors.has("relevance_k"))) {
    throw std::invalid_argument("relevance_q, relevance_k: expected none with the rule detached, got one");
  }
  if (edge != Edge::kNone) tensors.need({"row", "row_out"}, "for an edge");
  if (edge == Edge::kGradientRelevance || edge == Edge::kGradientAttention) tensors.need({"gradient"}, "for the edge");
  if (edge == Edge::kGradientRelevance || edge == Edge::kRelevance) tensors.need({"relevance"}, "for the edge");
}

template <typename Kind>
Kind checked_kind(const char* name, int kind, Kind last) {
  if (kind < 0 || kind > static_cast<int>(last)) {
    throw std::invalid_argument(std::string(name) + ": expected 0 to " + std::to_string(static_cast<int>(last)) +
                                ", got " + std::to_string(kind));
  }
  return static_cast<Kind>(kind);
}

// sizes: targets, batch, heads, key_heads, queries, keys, d, dv, row_targets
void bind_attention_relevance(int itemsize, const std::array<int64_t, 9>& sizes, const Tensors::Map& map, double scale,
                              bool causal, bool exact_output, int qk, int edge, int qk_kind, double qk_epsilon,
                              int av_kind, double av_epsilon, int threads) {
  const Tensors tensors(map);
  check_threads(threads);
  const auto [targets, batch, heads, key_heads, queries, keys, d, dv, row_targets] = sizes;
  const QkRule rule = checked_kind("qk", qk, QkRule::kDetached);
  const Edge made_of = checked_kind("edge", edge, Edge::kAttention);
  check_tensors(tensors, rule, made_of, exact_output);
  if (key_heads < 1 || heads < 1 || heads % key_heads != 0) {
    throw std::invalid_argument("key_heads: expected a divisor of heads (" + std::to_string(heads) + "), got " +
                                std::to_string(key_heads));
  }
  for (int64_t size : sizes) checked_product({{"sizes", size}});
  if (batch == 0 || queries == 0 || keys == 0) return;
  with_type(itemsize, [&](auto zero) {
    using T = decltype(zero);
    AttentionRelevance<T> in{targets, batch, heads, key_heads, queries, keys, d, dv, row_targets};
    in.q = tensors.heads<const T>("q"), in.k = tensors.heads<const T>("k"), in.v = tensors.heads<const T>("v");
    in.output = tensors.heads<const T>("output"), in.bias = tensors.heads<const T>("bias");
    in.seen = tensors.heads<const uint8_t>("seen");
    in.scale = scale, in.causal = causal, in.exact_output = exact_output;
    in.gradient = tensors.targets<const T>("gradient"), in.relevance = tensors.targets<const T>("relevance");
    in.gradient_q = tensors.targets<T>("gradient_q"), in.gradient_k = tensors.targets<T>("gradient_k");
    in.gradient_v = tensors.targets<T>("gradient_v"), in.relevance_q = tensors.targets<T>("relevance_q");
    in.relevance_k = tensors.targets<T>("relevance_k"), in.relevance_v = tensors.targets<T>("relevance_v");
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
  module.def("attention_relevance", &bind_attention_relevance, release_gil(), py::arg("itemsize"), py::arg("sizes"),
             py::arg("tensors"), py::arg("scale"), py::arg("causal"), py::arg("exact_output"), py::arg("qk"),
             py::arg("edge"), py::arg("qk_stabiliser_kind"), py::arg("qk_epsilon"), py::arg("av_stabiliser_kind"),
             py::arg("av_epsilon"), py::arg("threads"));
}

const Bindings bindings(bind);

}  // namespace
}  // namespace relprop
