#include "attention_layer.cuh"

namespace relprop {
namespace {

// Queries walk along keys for the softmax's statistics, for sum(A grad_A) and for their own streams, then keys along
// queries for theirs: every sum has one owner and one order.
enum class Sweep : int { kStatistics, kGradientSums, kQueries, kKeys };

// Columns of a slice of outputs. Keys have four sums, with z+ shares five; bfloat16 factors are packed in registers
// too.
template <Sweep sweep, Product product, bool positive>
constexpr int kSlice = positive ? 32 : (sweep == Sweep::kKeys && product == Product::kBFloat16 ? 48 : 64);

// Blocks that a multiprocessor holds side by side: the compiler gives threads the registers that this leaves them.
template <Sweep sweep>
constexpr int kBlocks = sweep == Sweep::kStatistics     ? 8
                        : sweep == Sweep::kGradientSums ? 5
                                                        : 2;

// Softmax statistics of the block's queries: the highest logit (0 where nothing is seen), 1 / sum (0 there).
template <Product product, typename V>
struct Statistics {
  using E = typename Tiled<product>::Element;

  __device__ static void run(const Layer<V>& in, const Head& at, int first, E* own, E* other) {
    float highest[2] = {hidden(), hidden()}, sum[2] = {0.0f, 0.0f};
    load_rows(own, in.width, in.q.at(0, at.b, at.h, first), in.q.row, own_rows(), in.queries - first, in.d);
    const int64_t key_head = at.h / (in.heads / in.key_heads);
    for (int j = 0; j < in.keys && !(in.causal && j >= first + own_rows()); j += kOther) {
      __syncthreads();
      load_rows(other, in.width, in.k.at(0, at.b, key_head, j), in.k.row, kOther, in.keys - j, in.d);
      __syncthreads();
      Scores dots;
      score<product, false>(dots, own + warp_row() * in.width, other, in.width, in.d);
#pragma unroll
      for (int n = 0; n < kOther / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float x = logit(in, at, first + warp_row() + score_row(i), j + score_column(n, i), dots[n][i]);
          if (x > highest[i / 2]) {
            sum[i / 2] *= expf(highest[i / 2] - x);
            highest[i / 2] = x;
          }
          if (x != hidden()) sum[i / 2] += expf(x - highest[i / 2]);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = highest[half];
#pragma unroll
      for (int lanes = 1; lanes <= 2; lanes *= 2) {
        const float its = __shfl_xor_sync(kFullWarp, top, lanes);
        top = its > top ? its : top;
      }
      const bool sees = top != hidden();
      const float total = row_sum(sum[half] == 0.0f ? 0.0f : sum[half] * expf(highest[half] - top));
      const int query = first + warp_row() + lane_row() + half * 8;
      if (lane_column() == 0 && query < in.queries) {
        const int64_t to = (at.b * in.heads + at.h) * in.queries + query;
        in.highest[to] = sees ? top : 0.0f;
        in.inverse_sum[to] = sees ? 1.0f / total : total;
      }
    }
  }
};

// What a query's row of A is made from.
struct Softmax {
  float highest, inverse_sum, gradient_sum, weight;
};

template <typename V>
__device__ __forceinline__ Softmax softmax_of(const Layer<V>& in, const Head& at, int query, bool sums) {
  if (query >= in.queries) return {0.0f, 0.0f, 0.0f, 0.0f};
  const int64_t from = (at.b * in.heads + at.h) * in.queries + query;
  const float sum = sums ? in.gradient_sums[at.t * in.batch * in.heads * in.queries + from] : 0.0f;
  const float weight = in.edge == Edge::kNone ? 0.0f : in.row[at.t * in.row_target + at.b * in.row_batch + query];
  return {in.highest[from], in.inverse_sum[from], sum, weight / static_cast<float>(in.heads)};
}

// The scores of one step, turned in place into A, scale dS and s'.
struct Maps {
  Scores attention, gradient, share;
};

__device__ __forceinline__ float positive_part(float x) { return x < 0.0f ? 0.0f : x; }  // in this order a NaN stays

// Both sides of the walk see a score with its query's softmax.
template <bool positive, typename V>
__device__ __forceinline__ float finish_score(const Layer<V>& in, const Head& at, Maps& maps, int n, int i, int query,
                                              int key, float z, const Softmax& softmax) {
  const float x = logit(in, at, query, key, maps.attention[n][i]);
  const float dots = maps.attention[n][i];
  const float a = x == hidden() ? 0.0f : expf(x - softmax.highest) * softmax.inverse_sum;
  const float gradient = maps.gradient[n][i], relevance = 0.5f * a * maps.share[n][i];
  float edge = 0.0f;
  if (in.edge == Edge::kGradientRelevance) edge = positive_part(gradient * relevance);
  if (in.edge == Edge::kGradientAttention) edge = positive_part(gradient * a);
  if (in.edge == Edge::kRelevance) edge = positive_part(relevance);
  if (in.edge == Edge::kAttention) edge = a;
  maps.attention[n][i] = a;
  maps.gradient[n][i] = a * (gradient - softmax.gradient_sum) * in.scale;
  if constexpr (positive) {
    maps.share[n][i] = z == 0.0f ? 0.0f : relevance / in.qk_stab(z);
  } else {
    maps.share[n][i] = relevance / in.qk_stab(dots);
  }
  return edge * softmax.weight;
}

__device__ __forceinline__ void clear(Scores& scores) {
#pragma unroll
  for (int n = 0; n < kOther / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
  }
}

template <int tiles, typename V>
__device__ __forceinline__ void write_sums(const StreamView<V>& to, int64_t offset, const float (&sums)[tiles][4],
                                           int64_t there, int width) {
#pragma unroll
  for (int n = 0; n < tiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = warp_row() + score_row(i), c = score_column(n, i);
      if (r < there && c < width) to.store(offset + r * to.row + c, sums[n][i]);
    }
  }
}

// x sums / 2, of `minus` where x is negative.
template <int tiles, typename V>
__device__ __forceinline__ void write_shares(const StreamView<V>& to, int64_t offset, const V* x, int64_t x_stride,
                                             float factor, const float (&plus)[tiles][4],
                                             const float (&minus)[tiles][4], int64_t there, int width) {
#pragma unroll
  for (int n = 0; n < tiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = warp_row() + score_row(i), c = score_column(n, i);
      if (r >= there || c >= width) continue;
      const float value = to_float(x[r * x_stride + c]);
      to.store(offset + r * to.row + c, factor * value * (value > 0.0f ? plus[n][i] : minus[n][i]));
    }
  }
}

__device__ __forceinline__ int columns_of(int slice, int slice_width, int width) {
  const int left = (width + 15) / 16 * 16 - slice;
  return left < slice_width ? left : slice_width;
}

// sum(A grad_A), and the queries' own streams.
template <Product product, typename V, bool positive>
struct Queries {
  using E = typename Tiled<product>::Element;
  static constexpr int kColumns = kSlice<Sweep::kQueries, product, positive>, kTiles = kColumns / 8;

  __device__ static void run(const Layer<V>& in, const Head& at, int first, int slice, bool sums_only, E* shared) {
    if (sums_only && in.exact_output) return write_totals(in, at, first, {});
    const int w = in.width;
    E *q = shared, *gradient = q + own_rows() * w, *shares = gradient + own_rows() * w, *k = shares + own_rows() * w,
      *v = k + kOther * w;
    const int64_t there = in.queries - first, key_head = at.h / (in.heads / in.key_heads);
    load_rows(q, w, in.q.at(0, at.b, at.h, first), in.q.row, own_rows(), there, in.d);
    if (in.gradient_logits) {
      load_stream(gradient, w, in.gradient, in.gradient.offset(at.t, at.b, at.h, first), own_rows(), there, in.dv);
    }
    const bool relevance = in.relevance_shares && in.relevance_q.data != nullptr && !sums_only;
    if (relevance) load_shares(shares, w, in, at, first, own_rows());
    Softmax softmax[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      softmax[half] = softmax_of(in, at, first + warp_row() + lane_row() + half * 8, in.gradient_logits && !sums_only);
    float to_q[kTiles][4] = {}, plus[kTiles][4] = {}, minus[kTiles][4] = {}, total[2] = {};
    for (int j = 0; j < in.keys && !(in.causal && j >= first + own_rows()); j += kOther) {
      __syncthreads();
      load_rows(k, w, in.k.at(0, at.b, key_head, j), in.k.row, kOther, in.keys - j, in.d);
      load_rows(v, w, in.v.at(0, at.b, key_head, j), in.v.row, kOther, in.keys - j, in.dv);
      __syncthreads();
      Maps maps;
      Scores z;
      clear(maps.gradient), clear(maps.share), clear(z);
      score<product, false>(maps.attention, q + warp_row() * w, k, w, in.d);
      if (in.gradient_logits) score<product, false>(maps.gradient, gradient + warp_row() * w, v, w, in.dv);
      if (relevance) score<product, false>(maps.share, shares + warp_row() * w, v, w, in.dv);
      if (positive && relevance) score<product, true>(z, q + warp_row() * w, k, w, in.d);
#pragma unroll
      for (int n = 0; n < kOther / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float gradient_here = maps.gradient[n][i];
          finish_score<positive>(in, at, maps, n, i, first + warp_row() + score_row(i), j + score_column(n, i), z[n][i],
                                 softmax[i / 2]);
          total[i / 2] += maps.attention[n][i] * gradient_here;
        }
      }
      const int columns = sums_only ? 0 : columns_of(slice, kColumns, in.d);
      if (in.gradient_q.data != nullptr) add_rows<product, Part::kWhole>(to_q, maps.gradient, k + slice, w, columns);
      if (!relevance) continue;
      if constexpr (positive) {
        add_rows<product, Part::kPositive>(plus, maps.share, k + slice, w, columns);
        add_rows<product, Part::kNegative>(minus, maps.share, k + slice, w, columns);
      } else {
        add_rows<product, Part::kWhole>(plus, maps.share, k + slice, w, columns);
      }
    }
    if (sums_only) return write_totals(in, at, first, total);
    if (in.gradient_q.data != nullptr) {
      write_sums(in.gradient_q, in.gradient_q.offset(at.t, at.b, at.h, first) + slice, to_q, there, in.d - slice);
    }
    if (relevance) {
      write_shares(in.relevance_q, in.relevance_q.offset(at.t, at.b, at.h, first) + slice,
                   in.q.at(0, at.b, at.h, first) + slice, in.q.row, 0.5f, plus, positive ? minus : plus, there,
                   in.d - slice);
    }
  }

  __device__ static void write_totals(const Layer<V>& in, const Head& at, int first, const float (&total)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = first + warp_row() + lane_row() + half * 8;
      float sum = 0.0f;
      if (in.exact_output && query < in.queries) {
        for (int c = lane_column(); c < in.dv; c += 4) {
          sum += in.gradient.load(in.gradient.offset(at.t, at.b, at.h, query) + c) *
                 to_float(in.output.at(0, at.b, at.h, query)[c]);
        }
      }
      sum = row_sum(in.exact_output ? sum : total[half]);
      if (lane_column() == 0 && query < in.queries) {
        in.gradient_sums[((at.t * in.batch + at.b) * in.heads + at.h) * in.queries + query] = sum;
      }
    }
  }
};

// The keys' streams and their part of the walked row.
template <Product product, typename V, bool positive>
struct Keys {
  using E = typename Tiled<product>::Element;
  static constexpr int kColumns = kSlice<Sweep::kKeys, product, positive>, kTiles = kColumns / 8;

  float to_k[kTiles][4] = {}, to_v[kTiles][4] = {}, share_v[kTiles][4] = {};
  float plus[kTiles][4] = {}, minus[kTiles][4] = {}, walked[2] = {};

  __device__ void run(const Layer<V>& in, Head at, int64_t key_head, int first, int slice, E* shared) {
    const int w = in.width;
    E *k = shared, *v = k + own_rows() * w;
    const int64_t there = in.keys - first, groups = in.heads / in.key_heads;
    load_rows(k, w, in.k.at(0, at.b, key_head, first), in.k.row, own_rows(), there, in.d);
    if (in.gradient_map || in.relevance_map) {
      load_rows(v, w, in.v.at(0, at.b, key_head, first), in.v.row, own_rows(), there, in.dv);
    }
    for (at.h = key_head * groups; at.h < (key_head + 1) * groups; ++at.h) {
      const int start = in.causal ? first / kOther * kOther : 0;  // earlier queries do not see these keys
      for (int i = start; i < in.queries; i += kOther) step(in, at, first, i, slice, v + own_rows() * w, k, v);
    }
    write(in, at, key_head, first, slice);
  }

  __device__ void step(const Layer<V>& in, const Head& at, int first, int query, int slice, E* shared, const E* k,
                       const E* v) {
    using Row = Softmax[kOther];
    RELPROP_SHARED(Row, softmax);
    const int w = in.width;
    E *q = shared, *gradient = q + kOther * w, *shares = gradient + kOther * w;
    __syncthreads();
    load_rows(q, w, in.q.at(0, at.b, at.h, query), in.q.row, kOther, in.queries - query, in.d);
    if (in.gradient.data != nullptr) {
      load_stream(gradient, w, in.gradient, in.gradient.offset(at.t, at.b, at.h, query), kOther, in.queries - query,
                  in.dv);
    }
    if (in.relevance.data != nullptr) load_shares(shares, w, in, at, query, kOther);
    if (threadIdx.x < kOther)
      softmax[threadIdx.x] = softmax_of(in, at, query + static_cast<int>(threadIdx.x), in.gradient_logits);
    __syncthreads();
    Maps maps;
    Scores z;
    clear(maps.gradient), clear(maps.share), clear(z);
    score<product, false>(maps.attention, k + warp_row() * w, q, w, in.d);
    if (in.gradient_map) score<product, false>(maps.gradient, v + warp_row() * w, gradient, w, in.dv);
    if (in.relevance_map) score<product, false>(maps.share, v + warp_row() * w, shares, w, in.dv);
    if (positive && in.relevance_shares) score<product, true>(z, k + warp_row() * w, q, w, in.d);
#pragma unroll
    for (int n = 0; n < kOther / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = score_column(n, i);
        walked[i / 2] += finish_score<positive>(in, at, maps, n, i, query + column, first + warp_row() + score_row(i),
                                                z[n][i], softmax[column]);
      }
    }
    const int columns = columns_of(slice, kColumns, in.d);
    const int value_columns = columns_of(slice, kColumns, in.dv);
    if (in.gradient_k.data != nullptr) add_rows<product, Part::kWhole>(to_k, maps.gradient, q + slice, w, columns);
    if (in.gradient_v.data != nullptr) {
      add_rows<product, Part::kWhole>(to_v, maps.attention, gradient + slice, w, value_columns);
    }
    if (in.relevance_v.data != nullptr) {
      add_rows<product, Part::kWhole>(share_v, maps.attention, shares + slice, w, value_columns);
    }
    if (in.relevance_k.data == nullptr) return;
    if constexpr (positive) {
      add_rows<product, Part::kPositive>(plus, maps.share, q + slice, w, columns);
      add_rows<product, Part::kNegative>(minus, maps.share, q + slice, w, columns);
    } else {
      add_rows<product, Part::kWhole>(plus, maps.share, q + slice, w, columns);
    }
  }

  __device__ void write(const Layer<V>& in, const Head& at, int64_t h, int first, int slice) {
    const int64_t there = in.keys - first;
    if (in.gradient_k.data != nullptr) {
      write_sums(in.gradient_k, in.gradient_k.offset(at.t, at.b, h, first) + slice, to_k, there, in.d - slice);
    }
    if (in.gradient_v.data != nullptr) {
      write_sums(in.gradient_v, in.gradient_v.offset(at.t, at.b, h, first) + slice, to_v, there, in.dv - slice);
    }
    if (in.relevance_k.data != nullptr) {
      write_shares(in.relevance_k, in.relevance_k.offset(at.t, at.b, h, first) + slice,
                   in.k.at(0, at.b, h, first) + slice, in.k.row, 0.5f, plus, positive ? minus : plus, there,
                   in.d - slice);
    }
    if (in.relevance_v.data != nullptr) {
      write_shares(in.relevance_v, in.relevance_v.offset(at.t, at.b, h, first) + slice,
                   in.v.at(0, at.b, h, first) + slice, in.v.row, in.detached ? 1.0f : 0.5f, share_v, share_v, there,
                   in.dv - slice);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = row_sum(walked[half]);
      const int64_t key = first + warp_row() + lane_row() + half * 8;
      if (in.edge != Edge::kNone && slice == 0 && lane_column() == 0 && key < in.keys) {
        in.row_parts[((at.t * in.batch + at.b) * in.key_heads + h) * in.keys + key] = sum;
      }
    }
  }
};

// Blocks run over targets, samples, heads, row blocks and slices, the last fastest.
template <Sweep sweep, Product product, typename V, bool positive>
__global__ void __launch_bounds__(kThreads, kBlocks<sweep>)
    attention_relevance_kernel(Layer<V> in, int64_t heads, int64_t blocks, int slices) {
  RELPROP_DYNAMIC_SHARED(shared);
  auto* tiles = reinterpret_cast<typename Tiled<product>::Element*>(shared);
  int64_t at = blockIdx.x;
  const int slice = static_cast<int>(at % slices) * kSlice<sweep, product, positive>;
  at /= slices;
  const int first = static_cast<int>(at % blocks) * own_rows();
  at /= blocks;
  const int64_t h = at % heads;
  at /= heads;
  const Head head{at / in.batch, at % in.batch, h};
  if constexpr (sweep == Sweep::kStatistics) {
    Statistics<product, V>::run(in, head, first, tiles, tiles + own_rows() * in.width);
  } else if constexpr (sweep == Sweep::kKeys) {
    Keys<product, V, positive>().run(in, head, h, first, slice, tiles);
  } else {
    Queries<product, V, positive>::run(in, head, first, slice, sweep == Sweep::kGradientSums, tiles);
  }
}

// row_out from the key heads' parts, added in order.
__global__ void __launch_bounds__(kThreads)
    attention_row_kernel(float* out, const float* parts, int64_t samples, int64_t heads, int64_t keys) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= samples * keys) return;
  const int64_t sample = i / keys;
  float sum = 0.0f;
  for (int64_t h = 0; h < heads; ++h) sum += parts[(sample * heads + h) * keys + i % keys];
  out[i] = sum;
}

int64_t count_blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Elements of a head's row in shared memory.
template <Product product>
int row_width(int64_t channels) {
  return static_cast<int>(count_blocks(channels, 16)) * 16 + Tiled<product>::kPadding;
}

// Bytes of a block's tiles: so many of its own rows, so many of the other side's.
template <Product product>
size_t tile_bytes(int width, int own_tiles, int other_tiles, int threads) {
  return sizeof(typename Tiled<product>::Element) *
         static_cast<size_t>(width * (own_tiles * threads / 2 + other_tiles * kOther));
}

// What a device has for them beside the keys' array of Softmax.
size_t tile_room(int device) { return most_shared(device) - kOther * sizeof(Softmax); }

template <Product product>
int64_t largest_head(int device) {
  int64_t channels = kLargestHead;
  const auto bytes = [&](int own, int other) {
    return tile_bytes<product>(row_width<product>(channels), own, other, kFewThreads);
  };
  while (std::max(bytes(3, 2), bytes(2, 3)) > tile_room(device)) channels -= 16;
  return channels;
}

dim3 grid_of(int64_t blocks) {
  if (blocks > 2147483647) throw std::invalid_argument("attention_relevance: expected fewer than 2^31 blocks");
  return dim3(static_cast<unsigned>(blocks));
}

template <Product product, typename V, bool positive>
struct Launcher {
  const Layer<V>& in;
  Stream stream;

  template <Sweep sweep>
  void run(int64_t targets, int own_tiles, int other_tiles) const {
    constexpr bool kByKeys = sweep == Sweep::kKeys;
    constexpr bool kSliced = sweep == Sweep::kKeys || sweep == Sweep::kQueries;
    const int64_t heads = kByKeys ? in.key_heads : in.heads;
    const int64_t widest = kByKeys ? std::max(in.d, in.dv) : in.d;
    const int64_t slices = kSliced ? count_blocks(widest, kSlice<sweep, product, positive>) : 1;
    const auto shared_for = [&](int threads) { return tile_bytes<product>(in.width, own_tiles, other_tiles, threads); };
    const size_t room = std::min(kMostTiles, tile_room(stream.device));
    const int threads = shared_for(kThreads) <= room ? kThreads : kFewThreads;
    const int64_t blocks = count_blocks(kByKeys ? in.keys : in.queries, threads / 2);
    launch("attention_relevance", attention_relevance_kernel<sweep, product, V, positive>,
           grid_of(targets * in.batch * heads * blocks * slices), dim3(static_cast<unsigned>(threads)),
           shared_for(threads), stream, in, heads, blocks, static_cast<int>(slices));
  }

  void run() const {
    run<Sweep::kStatistics>(1, 1, 1);
    if (in.gradient_logits) run<Sweep::kGradientSums>(in.targets, 3, 2);
    if (in.gradient_q.data != nullptr || in.relevance_q.data != nullptr) run<Sweep::kQueries>(in.targets, 3, 2);
    const bool keys = in.gradient_k.data != nullptr || in.gradient_v.data != nullptr ||
                      in.relevance_k.data != nullptr || in.relevance_v.data != nullptr;
    if (keys || in.edge != Edge::kNone) run<Sweep::kKeys>(in.targets, 2, 3);
  }
};

template <Product product, typename V>
Layer<V> layer_of(const AttentionRelevanceCuda& from) {
  const auto there = [](const AttentionTensor& tensor) { return tensor.data != nullptr; };
  const bool shares = from.qk != QkRule::kDetached && (there(from.relevance_q) || there(from.relevance_k));
  const bool logits = there(from.gradient_q) || there(from.gradient_k);
  const bool relevance_edge = from.edge == Edge::kGradientRelevance || from.edge == Edge::kRelevance;
  const bool gradient_edge = from.edge == Edge::kGradientRelevance || from.edge == Edge::kGradientAttention;
  const int64_t statistics = from.batch * from.heads * from.queries;
  return {from.targets,
          from.batch,
          from.heads,
          from.key_heads,
          static_cast<int>(from.queries),
          static_cast<int>(from.keys),
          static_cast<int>(from.d),
          static_cast<int>(from.dv),
          row_width<product>(std::max(from.d, from.dv)),
          from.q,
          from.k,
          from.v,
          from.output,
          from.bias,
          from.seen,
          {from.gradient, from.streams},
          {from.relevance, from.streams},
          {from.gradient_q, from.streams},
          {from.gradient_k, from.streams},
          {from.gradient_v, from.streams},
          {from.relevance_q, from.streams},
          {from.relevance_k, from.streams},
          {from.relevance_v, from.streams},
          static_cast<float>(from.scale),
          from.causal,
          from.exact_output,
          from.qk == QkRule::kDetached,
          logits,
          shares,
          logits || gradient_edge,
          shares || relevance_edge,
          from.edge,
          from.qk_stabiliser,
          from.av_stabiliser,
          from.row,
          from.row_target,
          from.row_batch,
          from.workspace,
          from.workspace + statistics,
          from.workspace + 2 * statistics,
          from.workspace + (2 + from.targets) * statistics};
}

template <Product product, typename V>
void run_layer(const AttentionRelevanceCuda& from, Stream stream) {
  const Layer<V> in = layer_of<product, V>(from);
  if (from.qk == QkRule::kPositive && in.relevance_shares) {
    Launcher<product, V, true>{in, stream}.run();
  } else {
    Launcher<product, V, false>{in, stream}.run();
  }
  if (from.edge == Edge::kNone) return;
  const int64_t samples = from.row_targets * from.batch;
  launch("attention_row", attention_row_kernel, grid_of(count_blocks(samples * from.keys, kThreads)), dim3(kThreads), 0,
         stream, from.row_out, in.row_parts, samples, from.key_heads, from.keys);
}

void run_dtypes(const AttentionRelevanceCuda& from, Stream stream) {
  if (from.streams != from.values && from.streams != DType::kFloat32) {
    throw std::invalid_argument("streams: expected float32 or the dtype of the layer's tensors");
  }
  if (from.values == DType::kBFloat16) {
    run_layer<Product::kBFloat16, bfloat16>(from, stream);
  } else if (from.values == DType::kFloat16) {
    run_layer<Product::kTFloat32, float16>(from, stream);  // holds float16 exactly, and shares that float16 cannot hold
  } else if (from.product == Product::kFloat32) {
    run_layer<Product::kFloat32, float>(from, stream);
  } else {
    run_layer<Product::kTFloat32, float>(from, stream);
  }
}

}  // namespace

int64_t attention_relevance_workspace(const AttentionRelevanceCuda& from) {
  const int64_t parts = from.edge == Edge::kNone ? 0 : from.row_targets * from.batch * from.key_heads * from.keys;
  return (2 + std::max(from.targets, from.row_targets)) * from.batch * from.heads * from.queries + parts;
}

int64_t attention_relevance_largest_head(DType values, int device) {
  return values == DType::kBFloat16 ? largest_head<Product::kBFloat16>(device)
                                    : largest_head<Product::kTFloat32>(device);
}

void attention_relevance_cuda(const AttentionRelevanceCuda& from, Stream stream) {
  if (from.edge != Edge::kAttention || from.row_targets == from.targets) return run_dtypes(from, stream);
  // A walk through A alone may have other targets than the streams: first the streams, then the walk without them.
  AttentionRelevanceCuda streams = from, walk = from;
  streams.edge = Edge::kNone;
  if (from.targets > 0) run_dtypes(streams, stream);
  walk.targets = from.row_targets;
  walk.gradient = walk.relevance = walk.gradient_q = walk.gradient_k = walk.gradient_v = {};
  walk.relevance_q = walk.relevance_k = walk.relevance_v = {};
  run_dtypes(walk, stream);
}

}  // namespace relprop
