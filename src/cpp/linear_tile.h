// y = x W'^T for few tokens: the weight is decoded in registers and meets x there, once per few tokens. The loop for all
// instruction sets; a variant brings the Lanes: what a register holds and how 32 packed bytes become weights.
//
// 64 weights are 32 bytes, seen as words or dwords of several nibbles. Register v (a zmm: the 32 bytes twice) is shifted so
// that every lane has another nibble in its low bits, the index of a table look-up. So the weights come in a fixed,
// odd order; instead of putting them right, `prepare` puts x into the same order, once per call.
//
// Include in an unnamed namespace of a variant file (see variant.h about inlining).

// Where the absmax of R neighbouring rows come from. Under double quantization absmax' takes only 256 values in a nested
// group: they are computed once (`values`), and the loop looks them up by code. Else code and value are the same.
struct Scales {
  const uint8_t* codes;  // of block 0 of the tensor
  const float* absmax;   // flat: of block 0
  const float* values;   // nested: 256 of group `first_group`, then of the next, ...
  int64_t first_group;
  int nested_shift;  // log2 of the nested block size
};

// absmax' of every code for the groups of blocks first .. last. `scratch` keeps them from one call to the next.
inline Scales scales(const Absmax& absmax, int64_t first, int64_t last, LinearScratch& scratch) {
  if (!absmax.codes) return {nullptr, absmax.absmax, nullptr, 0, 0};
  const int shift = __builtin_ctzll(uint64_t(absmax.nested_block_size));
  int64_t first_group = first >> shift, last_group = last >> shift;
  if (first_group < scratch.first_group || last_group >= scratch.first_group + scratch.groups) {
    scratch.first_group = first_group;
    scratch.groups = last_group - first_group + 1;
    const float mean = *absmax.mean, *__restrict__ map = absmax.map;
    for (int64_t group = first_group; group <= last_group; ++group) {
      const float scale = absmax.nested_absmax[group];
      float* __restrict__ values = scratch.values + 256 * (group - first_group);
      for (int code = 0; code < 256; ++code) values[code] = double_decode(map[code], scale, mean);
    }
  }
  return {absmax.codes, nullptr, scratch.values, scratch.first_group, shift};
}

// R rows of the weight and T tokens at a time: R x T accumulators. `nested` is whether the absmax have codes.
template <class Lanes, int R, int T, bool nested>
inline __attribute__((always_inline)) void tile(const LinearRows& call, const Scales& scales, int64_t row,
                                                const char* x, int64_t x_stride, int64_t prefetch, float* sums) {
  const Lanes lanes(*call.codebook);
  typename Lanes::Sum sum[R][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[r][t] = Lanes::zero();
  }
  const Weight4bit& weight = *call.weight;
  const int shift = call.block_shift;  // groups of 64 a block, as a power of two
  const int64_t groups = weight.cols / 64, blocks = groups >> shift;
  const int64_t stride = weight.cols / 2;
  const uint8_t *packed = weight.packed + row * stride, *codes = scales.codes + row * blocks;
  const float *values[R], *absmax = scales.absmax + row * blocks;
  for (int64_t g = 0, end = groups; g < groups; end = groups) {
    if (nested) {  // up to where a row enters another nested group
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int64_t group = ((row + r) * blocks + (g >> shift)) >> scales.nested_shift;
        values[r] = scales.values + 256 * (group - scales.first_group);
        int64_t rest = (((group + 1) << scales.nested_shift) - (row + r) * blocks) << shift;
        end = rest < end ? rest : end;
      }
    }
    for (; g < end; ++g, x += Lanes::kGroupBytes, packed += 32) {
      typename Lanes::Table table[R];
      typename Lanes::Bytes bytes[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int64_t block = (g >> shift) + r * blocks;
        table[r] = lanes.table(nested ? values[r][codes[block]] : absmax[block]);
        bytes[r] = Lanes::load(packed + r * stride);
        __builtin_prefetch(packed + r * stride + prefetch, 0, 2);
      }
#pragma GCC unroll 8
      for (int v = 0; v < Lanes::kVectors; ++v) {
        typename Lanes::Weights w[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) w[r] = lanes.weights(bytes[r], table[r], v);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          auto xs = Lanes::load_x(x + t * x_stride + v * Lanes::kVectorBytes);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) sum[r][t] = Lanes::add(sum[r][t], w[r], xs);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sums[r * T + t] = Lanes::reduce(sum[r][t]);
  }
}

template <class Lanes, DType dtype, int R, int T>
void linear_tile(const LinearRows& call, const Scales& scales, int64_t row) {
  using E = Element<dtype>;
  const Weight4bit& weight = *call.weight;
  const int64_t x_stride = weight.cols / 64 * Lanes::kGroupBytes;
  const int64_t prefetch = 2 * R * weight.cols / 2;  // the rows after the next ones
  auto* x = static_cast<const char*>(call.x);
  auto* bias = static_cast<const typename E::type*>(call.bias);
  auto* y = static_cast<typename E::type*>(call.y) + row;
  float sums[R * T];
  if (scales.codes) {
    tile<Lanes, R, T, true>(call, scales, row, x, x_stride, prefetch, sums);
  } else {
    tile<Lanes, R, T, false>(call, scales, row, x, x_stride, prefetch, sums);
  }
  for (int t = 0; t < T; ++t) {
    for (int r = 0; r < R; ++r) {
      float add = bias ? E::load(bias[row + r]) : 0.0f;
      y[t * weight.rows + r] = E::store(sums[r * T + t] + add);
    }
  }
}

// One token: one row at a time, in the order it lies in memory, which is what the prefetchers expect; the sums of kUnroll
// neighbouring groups are independent instead.
constexpr int kUnroll = 4;
constexpr int kAhead = 1024;  // bytes of prefetch: 16 lines, about what a core can have on the way

template <class Lanes, bool nested>
inline __attribute__((always_inline)) float row_product(const LinearRows& call, const Scales& scales, int64_t row) {
  const Lanes lanes(*call.codebook);
  const Weight4bit& weight = *call.weight;
  const int shift = call.block_shift;
  const int64_t groups = weight.cols / 64, blocks = groups >> shift, first = row * blocks;
  const uint8_t *packed = weight.packed + row * weight.cols / 2, *codes = scales.codes + first;
  const float *absmax = scales.absmax + first, *values = nullptr;
  auto* x = static_cast<const char*>(call.x);
  typename Lanes::Sum sum[kUnroll];
#pragma GCC unroll 8
  for (int u = 0; u < kUnroll; ++u) sum[u] = Lanes::zero();
  auto group = [&](int64_t g, typename Lanes::Sum& to) __attribute__((always_inline)) {
    int64_t block = g >> shift;
    auto table = lanes.table(nested ? values[codes[block]] : absmax[block]);
    auto bytes = Lanes::load(packed + 32 * g);
#pragma GCC unroll 8
    for (int v = 0; v < Lanes::kVectors; ++v) {
      auto xs = Lanes::load_x(x + g * Lanes::kGroupBytes + v * Lanes::kVectorBytes);
      to = Lanes::add(to, lanes.weights(bytes, table, v), xs);
    }
  };
  for (int64_t g = 0, end = groups; g < groups; end = groups) {
    if (nested) {
      int64_t nest = (first + (g >> shift)) >> scales.nested_shift;
      values = scales.values + 256 * (nest - scales.first_group);
      int64_t rest = (((nest + 1) << scales.nested_shift) - first) << shift;
      end = rest < end ? rest : end;
    }
    for (; g + kUnroll <= end; g += kUnroll) {
      __builtin_prefetch(packed + 32 * g + kAhead, 0, 3);
      __builtin_prefetch(packed + 32 * g + kAhead + 64, 0, 3);
#pragma GCC unroll 8
      for (int u = 0; u < kUnroll; ++u) group(g + u, sum[u]);
    }
    for (; g < end; ++g) group(g, sum[0]);
  }
  float total = 0.0f;
#pragma GCC unroll 8
  for (int u = 0; u < kUnroll; ++u) total += Lanes::reduce(sum[u]);
  return total;
}

template <class Lanes, DType dtype>
void one_token(const LinearRows& call, const Scales& from, int64_t row) {
  using E = Element<dtype>;
  auto* bias = static_cast<const typename E::type*>(call.bias);
  float sum = from.codes ? row_product<Lanes, true>(call, from, row) : row_product<Lanes, false>(call, from, row);
  static_cast<typename E::type*>(call.y)[row] = E::store(sum + (bias ? E::load(bias[row]) : 0.0f));
}

// R rows, at most 4 tokens.
template <class Lanes, DType dtype, int R>
void few_tokens(const LinearRows& call, const Scales& from, int64_t row) {
  switch (call.m) {
    case 4:
      return linear_tile<Lanes, dtype, R, 4>(call, from, row);
    case 3:
      return linear_tile<Lanes, dtype, R, 3>(call, from, row);
    case 2:
      return linear_tile<Lanes, dtype, R, 2>(call, from, row);
    case 1:
      for (int r = 0; r < R; ++r) one_token<Lanes, dtype>(call, from, row + r);
  }
}

// --- more tokens: decode a chunk of R rows into the first-level cache, then multiply it with all tokens ------------------

constexpr int64_t kChunk = 32;  // groups of 64 weights

template <class Lanes, int R>
inline __attribute__((always_inline)) void decode_chunk(const LinearRows& call, const Scales& scales, int64_t row,
                                                        int64_t first, int64_t count, char* out) {
  const Lanes lanes(*call.codebook);
  const Weight4bit& weight = *call.weight;
  const int64_t blocks = weight.cols / weight.block_size;
  for (int r = 0; r < R; ++r) {
    const uint8_t* packed = weight.packed + (row + r) * weight.cols / 2 + 32 * first;
    for (int64_t g = first; g < first + count; ++g, packed += 32) {
      int64_t block = (row + r) * blocks + (g >> call.block_shift);
      float absmax =
          scales.codes
              ? scales.values[256 * ((block >> scales.nested_shift) - scales.first_group) + scales.codes[block]]
              : scales.absmax[block];
      auto table = lanes.table(absmax);
      auto bytes = Lanes::load(packed);
      __builtin_prefetch(packed + R * weight.cols / 2, 0, 2);
#pragma GCC unroll 8
      for (int v = 0; v < Lanes::kVectors; ++v, out += Lanes::kVectorBytes) {
        Lanes::store(out, lanes.weights(bytes, table, v));
      }
    }
  }
}

// sums (R x T registers, in memory) += w (R rows of `vectors` registers) times x (T rows, x_stride bytes apart)
template <class Lanes, int R, int T>
void multiply_chunk(const char* w, const char* x, int64_t x_stride, int64_t vectors, bool first,
                    typename Lanes::Sum* sums) {
  typename Lanes::Sum sum[R][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[r][t] = first ? Lanes::zero() : sums[r * T + t];
  }
  for (int64_t v = 0; v < vectors; ++v, w += Lanes::kVectorBytes, x += Lanes::kVectorBytes) {
    typename Lanes::Weights row[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) row[r] = Lanes::load_x(w + r * vectors * Lanes::kVectorBytes);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      auto xs = Lanes::load_x(x + t * x_stride);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][t] = Lanes::add(sum[r][t], row[r], xs);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sums[r * T + t] = sum[r][t];
  }
}

template <class Lanes, int R>
void multiply_chunk(int tokens, const char* w, const char* x, int64_t x_stride, int64_t vectors, bool first,
                    typename Lanes::Sum* sums) {
  switch (tokens) {
    case 6:
      return multiply_chunk<Lanes, R, 6>(w, x, x_stride, vectors, first, sums);
    case 5:
      return multiply_chunk<Lanes, R, 5>(w, x, x_stride, vectors, first, sums);
    case 4:
      return multiply_chunk<Lanes, R, 4>(w, x, x_stride, vectors, first, sums);
    case 3:
      return multiply_chunk<Lanes, R, 3>(w, x, x_stride, vectors, first, sums);
    case 2:
      return multiply_chunk<Lanes, R, 2>(w, x, x_stride, vectors, first, sums);
    case 1:
      return multiply_chunk<Lanes, R, 1>(w, x, x_stride, vectors, first, sums);
  }
}

// How many of `rest` tokens to take next, at most T: 8 are 4 + 4 and not 6 + 2.
template <int T>
inline int64_t evenly(int64_t rest) {
  int64_t times = (rest + T - 1) / T;
  return (rest + times - 1) / times;
}

template <class Lanes, DType dtype, int R>
void more_tokens(const LinearRows& call, const Scales& from, LinearScratch& scratch, int64_t row) {
  using E = Element<dtype>;
  using Sum = typename Lanes::Sum;
  constexpr int T = Lanes::kTokens;
  const int64_t groups = call.weight->cols / 64, x_stride = groups * Lanes::kGroupBytes, rows = call.weight->rows;
  alignas(64) char chunk[R * kChunk * Lanes::kGroupBytes];
  auto* sums = static_cast<Sum*>(scratch.sums);
  for (int64_t first = 0; first < groups; first += kChunk) {
    int64_t count = groups - first < kChunk ? groups - first : kChunk;
    decode_chunk<Lanes, R>(call, from, row, first, count, chunk);
    for (int64_t m = 0, tokens; m < call.m; m += tokens) {
      tokens = evenly<T>(call.m - m);
      auto* x = static_cast<const char*>(call.x) + m * x_stride + first * Lanes::kGroupBytes;
      multiply_chunk<Lanes, R>(int(tokens), chunk, x, x_stride, count * Lanes::kVectors, first == 0, sums + m * R);
    }
  }
  auto* bias = static_cast<const typename E::type*>(call.bias);
  auto* y = static_cast<typename E::type*>(call.y) + row;
  for (int64_t m = 0, tokens; m < call.m; m += tokens) {
    tokens = evenly<T>(call.m - m);
    for (int r = 0; r < R; ++r) {
      float add = bias ? E::load(bias[row + r]) : 0.0f;
      for (int t = 0; t < tokens; ++t) {
        y[(m + t) * rows + r] = E::store(Lanes::reduce(sums[m * R + r * tokens + t]) + add);
      }
    }
  }
}

template <class Lanes, DType dtype, int R>
void linear_row_group(const LinearRows& call, LinearScratch& scratch, int64_t row) {
  int64_t blocks = call.weight->cols / call.weight->block_size;
  Scales from = scales(call.weight->absmax, row * blocks, (row + R) * blocks - 1, scratch);
  if (call.m <= 4) return few_tokens<Lanes, dtype, R>(call, from, row);
  more_tokens<Lanes, dtype, R>(call, from, scratch, row);
}

template <class Lanes, DType dtype>
void linear_rows(const LinearRows& call, LinearScratch& scratch, int64_t begin, int64_t end) {
  constexpr int R = Lanes::kRows;
  static_assert(R <= kLinearRows, "LinearScratch has room for kLinearRows");
  for (; begin + R <= end; begin += R) linear_row_group<Lanes, dtype, R>(call, scratch, begin);
  for (; begin < end; ++begin) linear_row_group<Lanes, dtype, 1>(call, scratch, begin);
}

// x (m, cols) of `dtype` into the order of the weights.
template <class Lanes, DType dtype>
void linear_prepare(const void* x_, int64_t m, int64_t cols, void* out_) {
  using E = Element<dtype>;
  auto* x = static_cast<const typename E::type*>(x_);
  auto* out = static_cast<typename Lanes::X*>(out_);
  for (int64_t i = 0; i < m * cols; i += 64) {
    for (int j = 0; j < 64; ++j) *out++ = Lanes::convert(x[i + Lanes::source(j)]);
  }
}
