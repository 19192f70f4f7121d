// The tiles of attention_relevance for one instruction set. Included once for each by attention_relevance_cpu.cpp,
// inside a namespace of its own and under its target pragma, with RELPROP_VECTOR_BYTES, the block of accumulators
// (RELPROP_BLOCK_ROWS x RELPROP_BLOCK_VECTORS) and `fused` defined. Matrix products want their accumulators in
// registers, which compilers do not find from plain loops; everything else is plain loops.

// ---------------------------------------------------------------------------------------------------------------------
// c[r, n] (+)= sum over p of a[r * a_row + p * a_step] * b[p * b_row + n]

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(RELPROP_VECTOR_BYTES)));
  static constexpr int64_t lanes = RELPROP_VECTOR_BYTES / sizeof(T);
};

template <typename T, int rows, int vectors>
RELPROP_INLINE void multiply_block(T* c, int64_t c_row, const T* a, int64_t a_row, int64_t a_step, const T* b,
                                   int64_t b_row, int64_t depth, bool add) {
  using V = typename Vector<T>::type;
  constexpr int64_t lanes = Vector<T>::lanes;
  V sum[rows][vectors];
  RELPROP_UNROLL
  for (int r = 0; r < rows; ++r) {
    RELPROP_UNROLL
    for (int n = 0; n < vectors; ++n) {
      sum[r][n] = V{};
      if (add) __builtin_memcpy(&sum[r][n], c + r * c_row + n * lanes, sizeof(V));
    }
  }
  for (int64_t p = 0; p < depth; ++p) {
    V right[vectors];
    RELPROP_UNROLL
    for (int n = 0; n < vectors; ++n) __builtin_memcpy(&right[n], b + p * b_row + n * lanes, sizeof(V));
    RELPROP_UNROLL
    for (int r = 0; r < rows; ++r) {
      const V left = a[r * a_row + p * a_step] - V{};
      RELPROP_UNROLL
      for (int n = 0; n < vectors; ++n) sum[r][n] = fused(left, right[n], sum[r][n]);
    }
  }
  RELPROP_UNROLL
  for (int r = 0; r < rows; ++r) {
    RELPROP_UNROLL
    for (int n = 0; n < vectors; ++n) __builtin_memcpy(c + r * c_row + n * lanes, &sum[r][n], sizeof(V));
  }
}

template <typename T, int vectors>
void multiply_panel(T* c, int64_t c_row, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_row,
                    int64_t rows, int64_t depth, bool add) {
  constexpr int kBlock = RELPROP_BLOCK_ROWS;
  int64_t r = 0;
  for (; r + kBlock <= rows; r += kBlock) {
    multiply_block<T, kBlock, vectors>(c + r * c_row, c_row, a + r * a_row, a_row, a_step, b, b_row, depth, add);
  }
  if (r + 4 <= rows) {
    multiply_block<T, 4, vectors>(c + r * c_row, c_row, a + r * a_row, a_row, a_step, b, b_row, depth, add);
    r += 4;
  }
  if (r + 2 <= rows) {
    multiply_block<T, 2, vectors>(c + r * c_row, c_row, a + r * a_row, a_row, a_step, b, b_row, depth, add);
    r += 2;
  }
  if (r < rows) multiply_block<T, 1, vectors>(c + r * c_row, c_row, a + r * a_row, a_row, a_step, b, b_row, depth, add);
}

// Columns are written, and read of b, up to the next whole vector.
template <typename T>
void multiply(T* c, int64_t c_row, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_row, int64_t rows,
              int64_t columns, int64_t depth, bool add) {
  constexpr int64_t lanes = Vector<T>::lanes;
  constexpr int kVectors = RELPROP_BLOCK_VECTORS;
  for (int64_t n = 0; n < columns; n += kVectors * lanes) {
    const int64_t vectors = std::min<int64_t>(kVectors, (columns - n + lanes - 1) / lanes);
    if (vectors == kVectors) {
      multiply_panel<T, kVectors>(c + n, c_row, a, a_row, a_step, b + n, b_row, rows, depth, add);
    } else if (kVectors > 3 && vectors == 3) {
      multiply_panel<T, std::min(kVectors, 3)>(c + n, c_row, a, a_row, a_step, b + n, b_row, rows, depth, add);
    } else if (kVectors > 2 && vectors == 2) {
      multiply_panel<T, std::min(kVectors, 2)>(c + n, c_row, a, a_row, a_step, b + n, b_row, rows, depth, add);
    } else {
      multiply_panel<T, 1>(c + n, c_row, a, a_row, a_step, b + n, b_row, rows, depth, add);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows of a tile. Loops run over whole lanes: buffers are padded to kLanes.

// exp(x) for x <= 0, 0 where that is denormal; NaN stays. Cody and Waite's reduction, Taylor's polynomial.
template <typename T>
RELPROP_INLINE T exp_of_negative(T x) {
  using E = ExpConstants<T>;
  const T clamped = x < E::lowest ? E::lowest : x;
  const T shifted = clamped * T(1.4426950408889634) + E::round;
  const T n = shifted - E::round;
  const T r = (clamped - n * E::ln2_high) - n * E::ln2_low;
  T sum = E::inverse_factorial[E::degree];
  RELPROP_UNROLL
  for (int i = E::degree - 1; i >= 0; --i) sum = sum * r + E::inverse_factorial[i];
  // The low bits of `shifted` hold n; they move to the exponent of 1.
  typename E::Bits bits;
  __builtin_memcpy(&bits, &shifted, sizeof(T));
  bits = (bits + E::bias) << E::mantissa;
  T power;
  __builtin_memcpy(&power, &bits, sizeof(T));
  return x < E::lowest ? T(0) : sum * power;
}

// Lanes are folded in one order for every instruction set. lanes: [size], whole lanes
template <typename T>
RELPROP_INLINE T largest(T* lanes, int64_t size) {
  for (int64_t j = kLanes; j < size; j += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] = lanes[j + l] > lanes[l] ? lanes[j + l] : lanes[l];
  }
  T found = lanes[0];
  for (int64_t l = 1; l < kLanes; ++l) found = lanes[l] > found ? lanes[l] : found;
  return found;
}

template <typename T>
RELPROP_INLINE T total(T* lanes, int64_t size) {
  for (int64_t j = kLanes; j < size; j += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += lanes[j + l];
  }
  for (int64_t half = kLanes / 2; half >= 1; half /= 2) {
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

template <typename T>
RELPROP_INLINE T inner_product(const T* a, const T* b, int64_t size) {
  T lanes[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= size; c += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += a[c + l] * b[c + l];
  }
  for (int64_t l = 0; c + l < size; ++l) lanes[l] += a[c + l] * b[c + l];
  for (int64_t half = kLanes / 2; half >= 1; half /= 2) {
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

// Rows [i0, i0 + rows) of a head, each of `width`, to rows of type T and of whole lanes, the rest 0.
template <typename T>
RELPROP_INLINE void pack_rows(T* out, int64_t out_row, const Source<T>& source, int64_t b, int64_t h, int64_t i0,
                              int64_t rows, int64_t width, int64_t t = 0) {
  for (int64_t i = 0; i < rows; ++i, out += out_row) {
    const T* from = source.read(b, h, i0 + i, 0, width, out, t);
    if (from != out) std::copy_n(from, width, out);
    for (int64_t c = width; c < out_row; ++c) out[c] = T(0);
  }
}

// [rows, width] -> blocks of kKeys rows, each [width, kKeys]; rows that a block lacks are 0 up to the next whole lanes.
template <typename T>
void pack_transposed(T* out, const T* rows_at, int64_t row, int64_t rows, int64_t width) {
  for (int64_t j0 = 0; j0 < rows; j0 += kKeys, out += width * kKeys) {
    const int64_t count = std::min(kKeys, rows - j0);
    const T* from = rows_at + j0 * row;
    for (int64_t j = 0; j < whole_lanes(count); j += kLanes) {
      const int64_t some = std::min(kLanes, count - j);
      for (int64_t c = 0; c < width; ++c) {
        T* to = out + c * kKeys + j;
        for (int64_t l = 0; l < some; ++l) to[l] = from[(j + l) * row + c];
        for (int64_t l = some; l < kLanes; ++l) to[l] = T(0);
      }
    }
  }
}

// Rows split by sign, [x+ | x-], for z+ shares.
template <typename T>
void pack_signed(T* out, int64_t half, const T* rows_at, int64_t row, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; ++i, out += 2 * half) {
    const T* x = rows_at + i * row;
    for (int64_t c = 0; c < width; ++c) out[c] = x[c] > T(0) ? x[c] : T(0);
    for (int64_t c = 0; c < width; ++c) out[half + c] = x[c] < T(0) ? x[c] : T(0);
    for (int64_t c = width; c < half; ++c) out[c] = out[half + c] = T(0);
  }
}

template <StabiliserKind kind, typename T>
RELPROP_INLINE void share_row(T* s, const T* relevance, const T* z, int64_t size, T epsilon) {
  RELPROP_VECTORISE
  for (int64_t c = 0; c < size; ++c) s[c] = relevance[c] / stabilised<kind>(z[c], epsilon);
}

template <typename T>
RELPROP_INLINE void share_row(T* s, const T* relevance, const T* z, int64_t size, const Stabiliser& stabiliser) {
  const T epsilon = static_cast<T>(stabiliser.epsilon);
  if (stabiliser.kind == StabiliserKind::kSigned) {
    share_row<StabiliserKind::kSigned>(s, relevance, z, size, epsilon);
  } else {
    share_row<StabiliserKind::kReference>(s, relevance, z, size, epsilon);
  }
}

// x (s' y) / 2, or with `half` > 0 (x+ (s' y+) + x- (s' y-)) / 2, the second sums `half` behind the first.
template <typename T>
RELPROP_INLINE void half_shares(T* out, const T* x, const T* sum, int64_t width, int64_t half) {
  if (half == 0) {
    for (int64_t c = 0; c < width; ++c) out[c] = T(0.5) * x[c] * sum[c];
  } else {
    for (int64_t c = 0; c < width; ++c) out[c] = T(0.5) * x[c] * (x[c] > T(0) ? sum[c] : sum[half + c]);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// One task: some row blocks of the query heads that share one key head.

template <typename T>
struct Task {
  const AttentionRelevance<T>& in;
  const Layout<T>& at;
  T* room;      // the thread's own buffers
  T* sums;      // key-side sums of the task
  T* row_part;  // [row_targets, keys], the task's part of row_out
  int64_t b, key_head;
  int64_t head = 0, i0 = 0, rows = 0, blocks = 0;  // the row block at hand
  const T *q = nullptr, *k = nullptr, *qk_q = nullptr, *qk_k = nullptr;
  int64_t q_row = 0, k_row = 0, qk_q_row = 0, qk_k_row = 0;

  void run(int64_t chunk) {
    pack_keys();
    std::fill_n(sums, at.sums_size, T(0));
    std::fill_n(row_part, at.row_part_size, T(0));
    const int64_t items = at.groups * at.row_blocks;
    for (int64_t item = chunk * items / at.chunks; item < (chunk + 1) * items / at.chunks; ++item) row_block(item);
  }

  void pack_keys() {
    if (at.pack_k) {
      pack_rows(room + at.k_rows, at.d_padded, in.k, b, key_head, 0, in.keys, in.d);
      k = room + at.k_rows, k_row = at.d_padded;
    } else {
      k = in.k.at(b, key_head, 0), k_row = in.k.row;
    }
    pack_transposed(room + at.k_transposed, k, k_row, in.keys, in.d);
    for (int64_t n = 0; at.streams && n < at.key_blocks; ++n) {
      const auto [v, v_row] = value_rows(n, in.v.widen != nullptr);
      pack_transposed(room + at.v_transposed + n * in.dv * kKeys, v, v_row, count(n), in.dv);
    }
    qk_k = k, qk_k_row = k_row;
    if (!at.positive) return;
    pack_signed(room + at.k_signed, at.d_padded, k, k_row, in.keys, in.d);
    qk_k = room + at.k_signed, qk_k_row = at.qk_width;
    pack_transposed(room + at.k_signed_transposed, qk_k, qk_k_row, in.keys, at.qk_width);
  }

  // Values of key block n and how far apart their rows are, packed or as they lie.
  std::pair<const T*, int64_t> value_rows(int64_t n, bool packed) const {
    if (!packed) return {in.v.at(b, key_head, n * kKeys), in.v.row};
    pack_rows(room + at.v_rows, at.dv_padded, in.v, b, key_head, n * kKeys, count(n), in.dv);
    return {room + at.v_rows, at.dv_padded};
  }

  void row_block(int64_t item) {
    head = key_head * at.groups + item / at.row_blocks;
    i0 = item % at.row_blocks * kRows;
    rows = std::min(kRows, in.queries - i0);
    blocks = in.causal ? std::min(at.key_blocks, (i0 + rows - 1) / kKeys + 1) : at.key_blocks;
    pack_queries();
    for (int64_t n = 0; n < blocks; ++n) {
      multiply(dots(n), kKeys, q, q_row, 1, room + at.k_transposed + n * in.d * kKeys, kKeys, rows, columns(n), in.d,
               false);
    }
    for (int64_t i = 0; i < rows; ++i) statistics(i);
    pack_streams();
    std::fill_n(room + at.query_sums, at.query_sums_size, T(0));
    for (int64_t n = 0; n < blocks; ++n) tile(n);
    write_queries();
  }

  T* dots(int64_t n) const { return room + at.dots + n * kRows * kKeys; }
  int64_t count(int64_t n) const { return std::min(kKeys, in.keys - n * kKeys); }
  int64_t columns(int64_t n) const { return whole_lanes(count(n)); }

  void pack_queries() {
    if (at.pack_q) {
      pack_rows(room + at.q_rows, at.d_padded, in.q, b, head, i0, rows, in.d);
      q = room + at.q_rows, q_row = at.d_padded;
    } else {
      q = in.q.at(b, head, i0), q_row = in.q.row;
    }
    qk_q = q, qk_q_row = q_row;
    if (!at.positive) return;
    pack_signed(room + at.q_signed, at.d_padded, q, q_row, rows, in.d);
    qk_q = room + at.q_signed, qk_q_row = at.qk_width;
  }

  // scale * dots + mask of row i, -inf where nothing is seen.
  RELPROP_INLINE void logits(T* x, int64_t i, int64_t n) const {
    const T* from = dots(n) + i * kKeys;
    const T scale = static_cast<T>(in.scale);
    const int64_t width = columns(n), j0 = n * kKeys;
    for (int64_t j = 0; j < width; ++j) x[j] = from[j] * scale;
    int64_t seen = count(n);
    if (in.bias) {
      T buffer[kKeys];
      const T* bias = in.bias.read(b, head, i0 + i, j0, seen, buffer);
      for (int64_t j = 0; j < seen; ++j) x[j] += bias[j];
    }
    if (in.seen) {
      const uint8_t* flags = in.seen.at(b, head, i0 + i) + j0;
      for (int64_t j = 0; j < seen; ++j) x[j] = flags[j] != 0 ? x[j] : kHidden<T>;
    }
    if (in.causal) seen = std::max<int64_t>(0, std::min(seen, i0 + i + 1 - j0));
    for (int64_t j = seen; j < width; ++j) x[j] = kHidden<T>;
  }

  void statistics(int64_t i) const {
    T x[kKeys], lanes[kKeys];
    const int64_t width = columns(0);
    std::fill_n(lanes, width, kHidden<T>);
    for (int64_t n = 0; n < blocks; ++n) {
      logits(x, i, n);
      for (int64_t j = 0; j < columns(n); ++j) lanes[j] = x[j] > lanes[j] ? x[j] : lanes[j];
    }
    T highest = largest(lanes, width);
    const bool sees = highest != kHidden<T>;
    if (!sees) highest = T(0);
    std::fill_n(lanes, width, T(0));
    for (int64_t n = 0; n < blocks; ++n) {
      logits(x, i, n);
      for (int64_t j = 0; j < columns(n); ++j) lanes[j] += exp_of_negative(x[j] - highest);
    }
    room[at.highest + i] = highest;
    room[at.inverse_sum + i] = sees ? T(1) / total(lanes, width) : T(0);
  }

  RELPROP_INLINE void probabilities(T* a, int64_t i, int64_t n) const {
    const T highest = room[at.highest + i], inverse = room[at.inverse_sum + i];
    logits(a, i, n);
    for (int64_t j = 0; j < columns(n); ++j) a[j] = exp_of_negative(a[j] - highest) * inverse;
  }

  const T* gradient_rows(int64_t t) const {
    return at.pack_gradient ? room + at.gradient_rows + t * kRows * at.dv_padded : in.gradient.at(b, head, i0, t);
  }
  int64_t gradient_row() const { return at.pack_gradient ? at.dv_padded : in.gradient.row; }
  T* shares(int64_t t) const { return room + at.shares + t * kRows * at.dv_padded; }

  void pack_streams() {
    for (int64_t r = 0; at.edge && r < in.row_targets; ++r) {
      const T* from = in.row + r * in.row_target + b * in.row_batch + i0;
      for (int64_t i = 0; i < rows; ++i) room[at.row_weights + r * kRows + i] = from[i] / static_cast<T>(in.heads);
    }
    for (int64_t t = 0; in.relevance && t < in.targets; ++t) {
      std::fill_n(shares(t), rows * at.dv_padded, T(0));
      for (int64_t i = 0; i < rows; ++i) {
        T* share = shares(t) + i * at.dv_padded;
        const T* relevance = in.relevance.read(b, head, i0 + i, 0, in.dv, share, t);
        const T* output = in.output.read(b, head, i0 + i, 0, in.dv, room + at.output_row);
        share_row(share, relevance, output, in.dv, in.av_stabiliser);
      }
    }
    if (!in.gradient) return;
    for (int64_t t = 0; at.pack_gradient && t < in.targets; ++t) {
      pack_rows(room + at.gradient_rows + t * kRows * at.dv_padded, at.dv_padded, in.gradient, b, head, i0, rows, in.dv,
                t);
    }
    if (at.gradient_logits) gradient_sums();
  }

  // sum(A grad_A) = dO O of every row, with O recomputed where the output was rounded.
  void gradient_sums() {
    const T* output = in.exact_output ? in.output.at(b, head, i0) : recomputed_output();
    const int64_t output_row = in.exact_output ? in.output.row : at.dv_padded;
    for (int64_t t = 0; t < in.targets; ++t) {
      for (int64_t i = 0; i < rows; ++i) {
        room[at.gradient_sums + t * kRows + i] =
            inner_product(gradient_rows(t) + i * gradient_row(), output + i * output_row, in.dv);
      }
    }
  }

  const T* recomputed_output() {
    T* output = room + at.output;
    std::fill_n(output, rows * at.dv_padded, T(0));
    for (int64_t n = 0; n < blocks; ++n) {
      T* a = room + at.attention;
      for (int64_t i = 0; i < rows; ++i) probabilities(a + i * kKeys, i, n);
      const auto [v, v_row] = value_rows(n, in.v.widen != nullptr || at.dv_padded != in.dv);
      multiply(output, at.dv_padded, a, kKeys, 1, v, v_row, rows, in.dv, count(n), true);
    }
    return output;
  }

  void tile(int64_t n) {
    T *a = room + at.attention, *to_a = room + at.to_attention, *share = room + at.share;
    for (int64_t i = 0; i < rows; ++i) probabilities(a + i * kKeys, i, n);
    if (in.edge == Edge::kAttention) walk_attention(n);
    const T* z = dots(n);
    if (at.positive) {
      multiply(room + at.positive_dots, kKeys, qk_q, qk_q_row, 1,
               room + at.k_signed_transposed + n * at.qk_width * kKeys, kKeys, rows, columns(n), at.qk_width, false);
      z = room + at.positive_dots;
    }
    const T* v = room + at.v_transposed + n * in.dv * kKeys;
    for (int64_t t = 0; at.streams && t < in.targets; ++t) {
      if (at.gradient_map) {
        multiply(to_a, kKeys, gradient_rows(t), gradient_row(), 1, v, kKeys, rows, columns(n), in.dv, false);
      }
      if (at.relevance_map) {
        multiply(share, kKeys, shares(t), at.dv_padded, 1, v, kKeys, rows, columns(n), in.dv, false);
      }
      for (int64_t i = 0; i < rows; ++i) map_row(t, i, n, z + i * kKeys);
      add_gradient(t, n);
      add_relevance(t, n);
    }
  }

  RELPROP_INLINE T* walked(int64_t t, int64_t n) const { return row_part + (t * at.key_blocks + n) * kKeys; }

  void walk_attention(int64_t n) {
    for (int64_t r = 0; r < in.row_targets; ++r) {
      T* out = walked(r, n);
      for (int64_t i = 0; i < rows; ++i) {
        const T weight = room[at.row_weights + r * kRows + i];
        const T* a = room + at.attention + i * kKeys;
        for (int64_t j = 0; j < columns(n); ++j) out[j] += weight * a[j];
      }
    }
  }

  // From grad_A and s v^T of one row to its edges, scale dS and s'.
  RELPROP_INLINE void map_row(int64_t t, int64_t i, int64_t n, const T* z) const {
    const T* a = room + at.attention + i * kKeys;
    T *gradient = room + at.to_attention + i * kKeys, *share = room + at.share + i * kKeys;
    const int64_t width = columns(n);
    if (at.relevance_map) {
      for (int64_t j = 0; j < width; ++j) share[j] = T(0.5) * a[j] * share[j];
    }
    if (in.edge != Edge::kNone && in.edge != Edge::kAttention) {
      const T weight = room[at.row_weights + t * kRows + i];
      T* out = walked(t, n);
      if (in.edge == Edge::kGradientRelevance) walk(out, weight, gradient, share, width);
      if (in.edge == Edge::kGradientAttention) walk(out, weight, gradient, a, width);
      if (in.edge == Edge::kRelevance) {
        for (int64_t j = 0; j < width; ++j) out[j] += weight * (share[j] < T(0) ? T(0) : share[j]);
      }
    }
    if (at.gradient_logits) {
      const T sum = room[at.gradient_sums + t * kRows + i], scale = static_cast<T>(in.scale);
      for (int64_t j = 0; j < width; ++j) gradient[j] = a[j] * (gradient[j] - sum) * scale;
    }
    if (at.relevance_shares) {
      if (at.positive) {
        for (int64_t j = 0; j < width; ++j) share[j] = z[j] == T(0) ? T(0) : share[j];
      }
      share_row(share, share, z, width, in.qk_stabiliser);
    }
  }

  RELPROP_INLINE static void walk(T* out, T weight, const T* one, const T* other, int64_t width) {
    for (int64_t j = 0; j < width; ++j) {
      const T product = one[j] * other[j];
      out[j] += weight * (product < T(0) ? T(0) : product);  // in this order a NaN stays
    }
  }

  void add_gradient(int64_t t, int64_t n) {
    const T *logits = room + at.to_attention, *a = room + at.attention;
    if (in.gradient_q) {
      multiply(room + at.gradient_q + t * kRows * at.d_padded, at.d_padded, logits, kKeys, 1, k + n * kKeys * k_row,
               k_row, rows, in.d, count(n), true);
    }
    if (in.gradient_k) {
      multiply(sums + at.gradient_k + (t * in.keys + n * kKeys) * at.d_padded, at.d_padded, logits, 1, kKeys, q, q_row,
               count(n), in.d, rows, true);
    }
    if (in.gradient_v) {
      multiply(sums + at.gradient_v + (t * in.keys + n * kKeys) * at.dv_padded, at.dv_padded, a, 1, kKeys,
               gradient_rows(t), gradient_row(), count(n), in.dv, rows, true);
    }
  }

  void add_relevance(int64_t t, int64_t n) {
    const T *share = room + at.share, *a = room + at.attention;
    if (at.relevance_shares && in.relevance_q) {
      multiply(room + at.relevance_q + t * kRows * at.qk_width, at.qk_width, share, kKeys, 1,
               qk_k + n * kKeys * qk_k_row, qk_k_row, rows, at.qk_width, count(n), true);
    }
    if (at.relevance_shares && in.relevance_k) {
      multiply(sums + at.relevance_k + (t * in.keys + n * kKeys) * at.qk_width, at.qk_width, share, 1, kKeys, qk_q,
               qk_q_row, count(n), at.qk_width, rows, true);
    }
    if (in.relevance_v) {
      multiply(sums + at.relevance_v + (t * in.keys + n * kKeys) * at.dv_padded, at.dv_padded, a, 1, kKeys, shares(t),
               at.dv_padded, count(n), in.dv, rows, true);
    }
  }

  void write_queries() const {
    for (int64_t t = 0; t < in.targets; ++t) {
      for (int64_t i = 0; i < rows; ++i) {
        if (in.gradient_q) {
          const T* from = room + at.gradient_q + (t * kRows + i) * at.d_padded;
          std::copy_n(from, in.d, in.gradient_q.at(t, b, head, i0 + i));
        }
        if (in.relevance_q) {
          half_shares(in.relevance_q.at(t, b, head, i0 + i), q + i * q_row,
                      room + at.relevance_q + (t * kRows + i) * at.qk_width, in.d, at.positive ? at.d_padded : 0);
        }
      }
    }
  }
};

// Sums of key j over the chunks of a head, added in order into those of the first.
template <typename T>
RELPROP_INLINE T* gathered(const AttentionRelevance<T>& in, const Layout<T>& at, T* sums, int64_t width, int64_t t,
                           int64_t j) {
  T* first = sums + (t * in.keys + j) * width;
  for (int64_t chunk = 1; chunk < at.chunks; ++chunk) {
    const T* more = first + chunk * at.sums_size;
    for (int64_t c = 0; c < width; ++c) first[c] += more[c];
  }
  return first;
}

// Outputs at keys [begin, end) of one key head from the sums of its chunks.
template <typename T>
void write_keys(const AttentionRelevance<T>& in, const Layout<T>& at, T* sums, int64_t b, int64_t key_head,
                int64_t begin, int64_t end) {
  const T value_factor = in.qk == QkRule::kDetached ? T(1) : T(0.5);
  for (int64_t t = 0; t < in.targets; ++t) {
    for (int64_t j = begin; j < end; ++j) {
      if (in.gradient_k)
        std::copy_n(gathered(in, at, sums + at.gradient_k, at.d_padded, t, j), in.d,
                    in.gradient_k.at(t, b, key_head, j));
      if (in.gradient_v)
        std::copy_n(gathered(in, at, sums + at.gradient_v, at.dv_padded, t, j), in.dv,
                    in.gradient_v.at(t, b, key_head, j));
      if (in.relevance_k) {
        T* out = in.relevance_k.at(t, b, key_head, j);
        half_shares(out, in.k.read(b, key_head, j, 0, in.d, out),
                    gathered(in, at, sums + at.relevance_k, at.qk_width, t, j), in.d, at.positive ? at.d_padded : 0);
      }
      if (in.relevance_v) {
        T* out = in.relevance_v.at(t, b, key_head, j);
        const T* sum = gathered(in, at, sums + at.relevance_v, at.dv_padded, t, j);
        const T* v = in.v.read(b, key_head, j, 0, in.dv, out);
        for (int64_t c = 0; c < in.dv; ++c) out[c] = value_factor * v[c] * sum[c];
      }
    }
  }
}

template <typename T>
void run_tasks(const void* job_at, int64_t begin, int64_t end) {
  const Job<T>& job = *static_cast<const Job<T>*>(job_at);
  const Layout<T>& at = job.at;
  const Slot slot(job.busy);
  T* room = job.rooms + slot.index * at.room_size;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / at.chunks, b = head / job.in.key_heads, key_head = head % job.in.key_heads;
    T* sums = at.chunks == 1 ? room + at.own_sums : job.sums + task * at.sums_size;
    Task<T>{job.in, at, room, sums, job.row_parts + task * at.row_part_size, b, key_head}.run(task % at.chunks);
    if (at.chunks == 1) write_keys(job.in, at, sums, b, key_head, 0, job.in.keys);
  }
}

// Indices run over [batch * key_heads * key_blocks].
template <typename T>
void run_key_blocks(const void* job_at, int64_t begin, int64_t end) {
  const Job<T>& job = *static_cast<const Job<T>*>(job_at);
  const Layout<T>& at = job.at;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t head = block / at.key_blocks, j0 = block % at.key_blocks * kKeys;
    write_keys(job.in, at, job.sums + head * at.chunks * at.sums_size, head / job.in.key_heads, head % job.in.key_heads,
               j0, std::min(j0 + kKeys, job.in.keys));
  }
}
