// y = x W'^T for few tokens: the weight is decoded in registers and meets x there. Included by linear_rows.h.
#pragma once
#include "linear_step.h"

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
  if (!nested) {  // codes are a quarter of the bytes, and read in order
    for (int64_t i = 0; i < R * blocks; i += 16) __builtin_prefetch(absmax + 2 * R * blocks + i, 0, 2);
  }

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
        // Two codes that lie side by side in one load: with two, GCC runs out of registers.
        constexpr bool pairs = nested && by64 && Lanes::kSpan == 2;
        const uint16_t pair = pairs ? load_pair(codes + r * blocks + g) : uint16_t(0);
        rows[r] = Step<Lanes>::full(lanes, packed + r * stride, [&](int s) {
          if (pairs) return values[r][s ? pair >> 8 : pair & 255];
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

// R rows, few tokens; those that do not fit into the registers decode the rows again.
template <class Lanes, DType dtype, int R>
void few_tokens(const LinearRows& call, const Scales& from, int64_t row) {
  for (int64_t m = 0, tokens; m < call.m; m += tokens) {
    tokens = evenly<Lanes::kTokens>(call.m - m);
    with_constant<Lanes::kTokens>(
        tokens, [&](auto constant) { linear_tile<Lanes, dtype, R, decltype(constant)::value>(call, from, row, m); });
  }
}
