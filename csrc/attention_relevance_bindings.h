// What the binding files of attention_relevance share: a call's tensors by name, and what it needs of them.
#pragma once

#include <array>
#include <map>

#include "attention_relevance.h"
#include "bindings.h"

namespace relprop {

// The tensors of a call by name, absent ones left out.
class AttentionTensors {
 public:
  using Map = std::map<std::string, std::pair<Pointer, std::vector<int64_t>>>;

  explicit AttentionTensors(const Map& map) : map_(map) {}

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
inline void check_tensors(const AttentionTensors& tensors, QkRule qk, Edge edge, bool exact_output) {
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

using AttentionSizes = std::array<int64_t, 9>;  // targets, batch, heads, key_heads, queries, keys, d, dv, row_targets

inline void check_attention(const AttentionTensors& tensors, const AttentionSizes& sizes, QkRule qk, Edge edge,
                            bool exact_output) {
  check_tensors(tensors, qk, edge, exact_output);
  const int64_t heads = sizes[2], key_heads = sizes[3];
  if (key_heads < 1 || heads < 1 || heads % key_heads != 0) {
    throw std::invalid_argument("key_heads: expected a divisor of heads (" + std::to_string(heads) + "), got " +
                                std::to_string(key_heads));
  }
  for (int64_t size : sizes) checked_product({{"sizes", size}});
}

}  // namespace relprop
