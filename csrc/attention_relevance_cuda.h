// Relevance and gradient of attention in tiles on the GPU; formulas and options are those of attention_relevance.h.
#pragma once

#include "attention_relevance.h"
#include "cuda_types.h"

namespace relprop {

// By its strides (in elements); the last axis is contiguous. No data where it is absent.
struct AttentionTensor {  // [targets, batch, heads, rows, width], without targets for the layer's own
  void* data = nullptr;
  int64_t target = 0, batch = 0, head = 0, row = 0;
};

constexpr int64_t kMostAttentionRows = int64_t{1} << 30;  // queries or keys of a head: kernels count them in 32 bits

struct AttentionRelevanceCuda {
  int64_t targets, batch, heads, key_heads, queries, keys, d, dv;
  int64_t row_targets;
  DType values, streams;  // of the layer's tensors; of the streams: float32 or as the layer's
  Product product;        // kFloat32 (three tf32 products) or kTFloat32 for float32 layers; else the dtype decides

  AttentionTensor q, k, v, output;                        // values
  AttentionTensor bias, seen;                             // float32; bytes
  AttentionTensor gradient, relevance;                    // streams
  AttentionTensor gradient_q, gradient_k, gradient_v;     // streams
  AttentionTensor relevance_q, relevance_k, relevance_v;  // streams
  double scale;
  bool causal, exact_output;
  QkRule qk;
  Edge edge;
  Stabiliser qk_stabiliser, av_stabiliser;

  const float* row;  // [row_targets, batch, queries]
  int64_t row_target, row_batch;
  float* row_out;    // [row_targets, batch, keys], contiguous
  float* workspace;  // attention_relevance_workspace() numbers
};

int64_t attention_relevance_workspace(const AttentionRelevanceCuda& arguments);

constexpr int64_t kLargestHead = 256;  // channels

// How many channels a head may have for tiles of its rows to fit into a device's shared memory: kLargestHead at most.
int64_t attention_relevance_largest_head(DType values, int device);

void attention_relevance_cuda(const AttentionRelevanceCuda& arguments, Stream stream);

}  // namespace relprop
