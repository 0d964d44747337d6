// y = x W'^T for more tokens: a chunk of some rows is decoded into the cache, then multiplied with all tokens. Included by
// linear_rows.h.
#pragma once
#include "linear_step.h"

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
