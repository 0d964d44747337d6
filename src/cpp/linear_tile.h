// y = x W'^T for few tokens: the weight is decoded in registers and meets x there, once per few tokens. The loop for all
// instruction sets; a variant brings the Lanes: what a register holds and how packed bytes become weights.
//
// A step is Lanes::kSpan times 64 weights: 32 or 64 bytes, seen as words or dwords of several nibbles. Register v of a
// step is shifted so that every lane has another nibble in its low bits, the index of a table look-up. So the weights come
// in a fixed, odd order; instead of putting them right, `prepare` puts x into the same order, once per call.
//
// Include in an unnamed namespace of a variant file (see variant.h about inlining).

// Where the absmax come from. Under double quantization absmax' takes only 256 values in a nested group: they are computed
// once (`values`), and the loop looks them up by code.
struct Scales {
  const uint8_t* codes;  // of block 0 of the tensor
  const float* absmax;   // flat: of block 0
  const float* values;   // nested: 256 a group, group g in slot g & mask
  int64_t mask;
  int nested_shift;  // log2 of the nested block size

  QLORA_INLINE const float* values_of(int64_t block) const { return values + 256 * ((block >> nested_shift) & mask); }
  QLORA_INLINE float operator[](int64_t block) const { return codes ? values_of(block)[codes[block]] : absmax[block]; }
};

// absmax' of every code for the groups of blocks first .. last, which ascend from call to call, and for one group more: so
// a value is looked up long after it was stored, which a store still on its way to the cache would delay.
inline Scales scales(const Absmax& absmax, int64_t first, int64_t last, int64_t blocks, LinearScratch& scratch) {
  if (!absmax.codes) return {nullptr, absmax.absmax, nullptr, 0, 0};
  const int shift = __builtin_ctzll(uint64_t(absmax.nested_block_size));
  const int64_t last_of_all = (blocks - 1) >> shift, ahead = (last >> shift) + 1;
  const int64_t until = ahead < last_of_all ? ahead : last_of_all;
  if (scratch.next_group < first >> shift) scratch.next_group = first >> shift;
  for (; scratch.next_group <= until; ++scratch.next_group) {
    const float mean = *absmax.mean, scale = absmax.nested_absmax[scratch.next_group], *__restrict__ map = absmax.map;
    float* __restrict__ values = scratch.values + 256 * (scratch.next_group & scratch.mask);
    for (int code = 0; code < 256; ++code) values[code] = double_decode(map[code], scale, mean);
  }
  return {absmax.codes, nullptr, scratch.values, scratch.mask, shift};
}

// A step of one row, ready to be decoded.
template <class Lanes>
struct Step {
  typename Lanes::Bytes bytes;
  typename Lanes::Table table;

  // `absmax(s)` is that of the s-th group of 64.
  template <class Get>
  static QLORA_INLINE Step full(const Lanes& lanes, const uint8_t* packed, Get absmax) {
    if constexpr (Lanes::kSpan == 1) {
      return {Lanes::load(packed), lanes.table(absmax(0))};
    } else {
      return {Lanes::load(packed), lanes.table(absmax(0), absmax(1))};
    }
  }
  // The last one of a row may have one group only; x is zero in the place of the other.
  static QLORA_INLINE Step any(const Lanes& lanes, const uint8_t* packed, const Scales& scales, int64_t first_block,
                               int64_t group, int shift, bool half) {
    auto absmax = [&](int s) { return scales[first_block + ((group + s) >> shift)]; };
    if constexpr (Lanes::kSpan == 2) {
      if (half) return {Lanes::load_half(packed), lanes.table(absmax(0), 0.0f)};
    }
    return full(lanes, packed, absmax);
  }
};

// R rows of the weight and T tokens at a time: R x T accumulators. `nested`: the absmax have codes. `by64`: blocks of 64.
template <class Lanes, int R, int T, bool nested, bool by64>
QLORA_INLINE void tile(const LinearRows& call, const Scales& scales, int64_t row, const char* x, float* sums) {
  const Lanes lanes(*call.codebook);
  typename Lanes::Sum sum[R][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[r][t] = Lanes::zero();
  }
  const Weight4bit& weight = *call.weight;
  const int shift = by64 ? 0 : call.block_shift;  // groups of 64 a block, as a power of two
  const int64_t groups = weight.cols / 64, blocks = groups >> shift, first = row * blocks, stride = weight.cols / 2;
  const uint8_t *packed = weight.packed + row * stride, *codes = scales.codes + first;
  // The rows two tiles on, into the second-level cache: the first level can have too few lines on the way.
  const uint8_t* ahead = packed + 2 * R * stride;
  const float *absmax = scales.absmax + first, *values[R];
  const char* statistics = nested ? reinterpret_cast<const char*>(codes) : reinterpret_cast<const char*>(absmax);
  const int64_t bytes = R * blocks * (nested ? 1 : 4);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(statistics + 2 * bytes + i, 0, 2);

  auto add = [&](const Step<Lanes>(&rows)[R]) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int v = 0; v < Lanes::kVectors; ++v) {
      typename Lanes::Weights w[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) w[r] = lanes.weights(rows[r].bytes, rows[r].table, v);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        auto xs = Lanes::load_x(x + t * call.x_stride + v * Lanes::kVectorBytes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sum[r][t] = Lanes::add(sum[r][t], w[r], xs);
      }
    }
    x += Lanes::kStepBytes, packed += 32 * Lanes::kSpan, ahead += 32 * Lanes::kSpan;
  };
  for (int64_t g = 0; g < groups;) {
    int64_t end = groups;
    if (nested) {  // up to where a row enters another nested group
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int64_t block = first + r * blocks + (g >> shift), next = ((block >> scales.nested_shift) + 1)
                                                                  << scales.nested_shift;
        values[r] = scales.values_of(block);
        const int64_t until = (next - first - r * blocks) << shift;
        end = until < end ? until : end;
      }
    }
    for (; g + Lanes::kSpan <= end; g += Lanes::kSpan) {
      Step<Lanes> rows[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        rows[r] = Step<Lanes>::full(lanes, packed + r * stride, [&](int s) {
          int64_t block = r * blocks + ((g + s) >> shift);
          return nested ? values[r][codes[block]] : absmax[block];
        });
        __builtin_prefetch(ahead + r * stride, 0, 2);
      }
      add(rows);
    }
    if (g < end) {  // half a step is left, or a step across two nested groups
      Step<Lanes> rows[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        rows[r] = Step<Lanes>::any(lanes, packed + r * stride, scales, first + r * blocks, g, shift, g + 1 == groups);
      }
      add(rows);
      g += Lanes::kSpan;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sums[r * T + t] = Lanes::reduce(sum[r][t]);
  }
}

// Rows row .. row + R, tokens token .. token + T.
template <class Lanes, DType dtype, int R, int T>
void linear_tile(const LinearRows& call, const Scales& scales, int64_t row, int64_t token) {
  using E = Element<dtype>;
  const Weight4bit& weight = *call.weight;
  auto* x = static_cast<const char*>(call.x) + token * call.x_stride;
  auto* bias = static_cast<const typename E::type*>(call.bias);
  auto* y = static_cast<typename E::type*>(call.y) + token * weight.rows + row;
  float sums[R * T];
  const bool by64 = call.block_shift == 0;
  if (scales.codes && by64) tile<Lanes, R, T, true, true>(call, scales, row, x, sums);
  if (scales.codes && !by64) tile<Lanes, R, T, true, false>(call, scales, row, x, sums);
  if (!scales.codes && by64) tile<Lanes, R, T, false, true>(call, scales, row, x, sums);
  if (!scales.codes && !by64) tile<Lanes, R, T, false, false>(call, scales, row, x, sums);
  for (int t = 0; t < T; ++t) {
    for (int r = 0; r < R; ++r) {
      float add = bias ? E::load(bias[row + r]) : 0.0f;
      y[t * weight.rows + r] = E::store(sums[r * T + t] + add);
    }
  }
}

// How many of `rest` tokens to take next, at most T: 8 are 4 + 4 and not 6 + 2.
template <int T>
inline int64_t evenly(int64_t rest) {
  int64_t times = (rest + T - 1) / T;
  return (rest + times - 1) / times;
}

// f(a constant equal to `tokens`), 1 to T: the kernels want the number of tokens at compile time.
template <int T, class F>
QLORA_INLINE void with_constant(int64_t tokens, const F& f) {
  if (tokens == T) return f(std::integral_constant<int, T>());
  if constexpr (T > 1) with_constant<T - 1>(tokens, f);
}

// R rows, few tokens; those that do not fit into the registers decode the rows again.
template <class Lanes, DType dtype, int R>
void few_tokens(const LinearRows& call, const Scales& from, int64_t row) {
  for (int64_t m = 0, tokens; m < call.m; m += tokens) {
    tokens = evenly<Lanes::kTokens>(call.m - m);
    with_constant<Lanes::kTokens>(
        tokens, [&](auto constant) { linear_tile<Lanes, dtype, R, decltype(constant)::value>(call, from, row, m); });
  }
}

// --- more tokens: decode a chunk of R rows into the first-level cache, then multiply it with all tokens ------------------

constexpr int64_t kChunk = 32;  // groups of 64 weights: R rows of them fit into the first-level cache

// Groups first .. first + count of R rows -> out, row after row.
template <class Lanes, int R>
QLORA_INLINE void decode_chunk(const LinearRows& call, const Scales& scales, int64_t row, int64_t first, int64_t count,
                               char* out) {
  const Lanes lanes(*call.codebook);
  const Weight4bit& weight = *call.weight;
  const int64_t blocks = weight.cols / weight.block_size;
  for (int r = 0; r < R; ++r) {
    const uint8_t* packed = weight.packed + (row + r) * weight.cols / 2 + 32 * first;
    for (int64_t g = first; g < first + count; g += Lanes::kSpan, packed += 32 * Lanes::kSpan) {
      auto step =
          Step<Lanes>::any(lanes, packed, scales, (row + r) * blocks, g, call.block_shift, g + 1 == first + count);
      __builtin_prefetch(packed + R * weight.cols / 2, 0, 2);
#pragma GCC unroll 8
      for (int v = 0; v < Lanes::kVectors; ++v, out += Lanes::kVectorBytes) {
        Lanes::store(out, lanes.weights(step.bytes, step.table, v));
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

// G times R rows: their decoded chunks lie in the second-level cache and share a pass over the chunk of x, which is the
// larger one where there are many tokens.
template <class Lanes, DType dtype, int R, int G>
void more_tokens(const LinearRows& call, const Scales& from, LinearScratch& scratch, int64_t row) {
  using E = Element<dtype>;
  using Sum = typename Lanes::Sum;
  constexpr int T = Lanes::kTokens;
  constexpr int64_t kPart = R * kChunk / Lanes::kSpan * Lanes::kStepBytes;
  static_assert(G * kPart <= kLinearChunkBytes, "LinearScratch has room for kLinearChunkBytes");
  const int64_t groups = call.weight->cols / 64, x_stride = call.x_stride, rows = call.weight->rows;
  auto* sums = static_cast<Sum*>(scratch.sums);
  for (int64_t first = 0; first < groups; first += kChunk) {
    int64_t count = groups - first < kChunk ? groups - first : kChunk;
    for (int g = 0; g < G; ++g) {
      decode_chunk<Lanes, R>(call, from, row + g * R, first, count, scratch.chunk + g * kPart);
    }
    const int64_t vectors = (count + Lanes::kSpan - 1) / Lanes::kSpan * Lanes::kVectors;
    for (int64_t m = 0, tokens; m < call.m; m += tokens) {
      tokens = evenly<T>(call.m - m);
      auto* x = static_cast<const char*>(call.x) + m * x_stride + first / Lanes::kSpan * Lanes::kStepBytes;
      with_constant<T>(tokens, [&](auto constant) {
        for (int g = 0; g < G; ++g) {
          multiply_chunk<Lanes, R, decltype(constant)::value>(scratch.chunk + g * kPart, x, x_stride, vectors,
                                                              first == 0, sums + (m * G + g * tokens) * R);
        }
      });
    }
  }
  auto* bias = static_cast<const typename E::type*>(call.bias);
  auto* y = static_cast<typename E::type*>(call.y) + row;
  for (int64_t m = 0, tokens; m < call.m; m += tokens) {
    tokens = evenly<T>(call.m - m);
    for (int r = 0; r < R * G; ++r) {
      float add = bias ? E::load(bias[row + r]) : 0.0f;
      for (int t = 0; t < tokens; ++t) {
        y[(m + t) * rows + r] = E::store(Lanes::reduce(sums[m * R * G + r * tokens + t]) + add);
      }
    }
  }
}

template <class Lanes, DType dtype, int R, int G>
void linear_row_group(const LinearRows& call, LinearScratch& scratch, int64_t row) {
  const Weight4bit& weight = *call.weight;
  const int64_t blocks = weight.cols / weight.block_size;
  Scales from = scales(weight.absmax, row * blocks, (row + R * G) * blocks - 1, weight.rows * blocks, scratch);
  if constexpr (G == 1) {
    if (call.m <= Lanes::kFew) return few_tokens<Lanes, dtype, R>(call, from, row);
  }
  more_tokens<Lanes, dtype, R, G>(call, from, scratch, row);
}

template <class Lanes, DType dtype>
void linear_rows(const LinearRows& call, LinearScratch& scratch, int64_t begin, int64_t end) {
  constexpr int R = Lanes::kRows, G = kLinearRows / R;
  static_assert(R <= kTileRows && G * R == kLinearRows, "LinearScratch has room for them");
  if (call.m > kManyTokens) {
    for (; begin + R * G <= end; begin += R * G) linear_row_group<Lanes, dtype, R, G>(call, scratch, begin);
  }
  for (; begin + R <= end; begin += R) linear_row_group<Lanes, dtype, R, 1>(call, scratch, begin);
  for (; begin < end; ++begin) linear_row_group<Lanes, dtype, 1, 1>(call, scratch, begin);
}

// A step of x, one element after the other; `source` says which element belongs to lane j.
template <class Lanes, class T>
QLORA_INLINE void reorder_by_source(const T* x, typename Lanes::X* out) {
  for (int j = 0; j < 64 * Lanes::kSpan; ++j) out[j] = Lanes::convert(x[Lanes::source(j)]);
}

// x (m, cols) of `dtype` -> rows of `stride` bytes in the order of the weights, zeros where the last step is not full.
template <class Lanes, DType dtype>
void linear_prepare(const void* x_, int64_t m, int64_t cols, int64_t stride, void* out_) {
  using E = Element<dtype>;
  constexpr int kStep = 64 * Lanes::kSpan;
  auto* x = static_cast<const typename E::type*>(x_);
  for (int64_t row = 0; row < m; ++row, x += cols) {
    auto* out = reinterpret_cast<typename Lanes::X*>(static_cast<char*>(out_) + row * stride);
    int64_t i = 0;
    for (; i + kStep <= cols; i += kStep, out += kStep) Lanes::reorder(x + i, out);
    if (i < cols) {
      typename E::type last[kStep] = {};
      memcpy(last, x + i, size_t(cols - i) * sizeof *last);
      Lanes::reorder(last, out);
    }
  }
}
