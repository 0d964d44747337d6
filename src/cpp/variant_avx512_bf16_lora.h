// The thin products of LoRA by vdpbf16ps: every dword is a pair of neighbours along the sum, and one operand is one pair,
// broadcast. So the packed adapter has neither a horizontal sum nor a rest: it is padded with zeros.
//
//   down      sums over features: a pair is two features, lanes are 16 ranks
//   gradient  sums over tokens: a pair is two tokens, lanes are 16 features
//
// The way up, from the ranks to the features, is a part of the large product (variant_avx512_product.h).
// Included by variant_avx512_bf16.cpp, in its unnamed namespace.
#pragma once
#include "variant_avx512_bf16_lora_pack.h"

QLORA_INLINE __m512bh as_pairs(__m512i v) { return reinterpret_cast<__m512bh>(v); }
QLORA_INLINE __m512bh broadcast_pair(const uint16_t* p) {
  int pair;
  memcpy(&pair, p, sizeof pair);
  return as_pairs(_mm512_set1_epi32(pair));
}

// --- down: T tokens -------------------------------------------------------------------------------------------------------

// 16 ranks of T tokens. Two sums each: one would wait for itself.
template <int T>
QLORA_INLINE void down_product(const uint16_t* x, int64_t in, const __m512i* w, __m512* out) {
  __m512 sum[T][2];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) sum[t][0] = sum[t][1] = _mm512_setzero_ps();
  int64_t k = 0;
  for (; k + 4 <= in; k += 4, w += 2) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        sum[t][i] = _mm512_dpbf16_ps(sum[t][i], as_pairs(w[i]), broadcast_pair(x + t * in + k + 2 * i));
      }
    }
  }
  for (; k < in; k += 2, ++w) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const uint16_t* last = x + t * in + k;
      __m512bh pair = k + 1 < in ? broadcast_pair(last) : as_pairs(_mm512_set1_epi32(*last));
      sum[t][0] = _mm512_dpbf16_ps(sum[t][0], as_pairs(*w), pair);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) out[t] = _mm512_add_ps(sum[t][0], sum[t][1]);
}

// T tokens from `token` on, an even one: then pairs are whole, but for that of the last token.
template <int T>
void token_block(const LoraTokens& call, int64_t token) {
  const int64_t groups = (call.rank + kLoraGroup - 1) / kLoraGroup;
  const int64_t w_group = (call.in + kPanelFeatures - 1) / kPanelFeatures * 32;
  for (int64_t g = 0; g < groups; ++g) {
    __m512 sum[T];
    down_product<T>(static_cast<const uint16_t*>(call.x) + token * call.in, call.in,
                    static_cast<const __m512i*>(call.down) + g * w_group, sum);
    const __mmask16 ranks = __mmask16(first_bits(call.rank - kLoraGroup * g));  // Inf x has made the padding NaN
    __m512i wide[T + 1];
    wide[T] = _mm512_setzero_si512();
    for (int t = 0; t < T; ++t) {
      __m512 scaled = _mm512_mul_ps(sum[t], _mm512_set1_ps(call.scaling));
      auto rounded = reinterpret_cast<__m256i>(_mm512_maskz_cvtneps_pbh(ranks, scaled));
      if (call.rows) static_cast<__m256i*>(call.rows)[(token + t) * groups + g] = rounded;
      wide[t] = _mm512_cvtepu16_epi32(rounded);
    }
    if (!call.pairs) continue;
    for (int t = 0; t < T; t += 2) {
      static_cast<__m512i*>(call.pairs)[(token + t) / 2 * groups + g] =
          _mm512_or_si512(wide[t], _mm512_slli_epi32(wide[t + 1], 16));
    }
  }
}

void lora_tokens(const LoraTokens& call, int64_t begin, int64_t end) {
  for (int64_t count; begin < end; begin += count) {
    count = end - begin < kLoraTokens ? end - begin : kLoraTokens;
    with_constant<kLoraTokens>(count, [&](auto constant) { token_block<decltype(constant)::value>(call, begin); });
  }
}

// --- gradient: a strip of features ------------------------------------------------------------------------------------------

constexpr int kGradientRanks = 8;  // at a time, two registers each

// sums (of 8 ranks, two registers each) += pairs of tokens times their strip
QLORA_INLINE void add_tokens(const __m512i* strip, const uint16_t* middle, int64_t stride, int64_t pairs, bool first,
                             __m512* sums) {
  __m512 low[kGradientRanks], high[kGradientRanks];
#pragma GCC unroll 8
  for (int r = 0; r < kGradientRanks; ++r) {
    low[r] = first ? _mm512_setzero_ps() : sums[2 * r];
    high[r] = first ? _mm512_setzero_ps() : sums[2 * r + 1];
  }
  for (int64_t i = 0; i < pairs; ++i, strip += 2, middle += stride) {
#pragma GCC unroll 8
    for (int r = 0; r < kGradientRanks; ++r) {
      __m512bh pair = broadcast_pair(middle + 2 * r);
      low[r] = _mm512_dpbf16_ps(low[r], as_pairs(strip[0]), pair);
      high[r] = _mm512_dpbf16_ps(high[r], as_pairs(strip[1]), pair);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kGradientRanks; ++r) {
    sums[2 * r] = low[r];
    sums[2 * r + 1] = high[r];
  }
}

QLORA_INLINE void store_gradient(const LoraGradient& call, int64_t where, uint32_t mask, __m512 value) {
  if (call.dtype == DType::f32) {
    _mm512_mask_storeu_ps(static_cast<float*>(call.gradient) + where, __mmask16(mask), value);
  } else {
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(call.gradient) + where, __mmask16(mask),
                             reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
  }
}

// Lane j of low is feature 8 (j / 4) + j % 4 of the strip (unpack works on quarters), that of high the one 4 on.
QLORA_INLINE void store_rank_rows(const LoraGradient& call, int64_t feature, const __m512* sums) {
  const uint32_t mask = first_bits(call.features - feature);
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int64_t r = 0; r < call.rank; ++r) {
    const __m512 low = sums[2 * r], high = sums[2 * r + 1];
    store_gradient(call, r * call.features + feature, mask & 0xffff, _mm512_permutex2var_ps(low, first, high));
    store_gradient(call, r * call.features + feature + 16, mask >> 16, _mm512_permutex2var_ps(low, second, high));
  }
}

QLORA_INLINE void store_rank_columns(const LoraGradient& call, int64_t feature, const __m512* sums) {
  for (int64_t rank = 0; rank < call.rank; rank += 16) {
    const uint32_t mask = first_bits(call.rank - rank) & 0xffff;
    for (int half = 0; half < 2; ++half) {
      __m512i rows[16];
      for (int r = 0; r < 16; ++r) {
        rows[r] = rank + r < call.rank ? _mm512_castps_si512(sums[2 * (rank + r) + half]) : _mm512_setzero_si512();
      }
      transpose16(rows);
      for (int i = 0; i < 16; ++i) {
        const int64_t f = feature + 8 * (i / 4) + 4 * half + i % 4;
        if (f < call.features) store_gradient(call, f * call.rank + rank, mask, _mm512_castsi512_ps(rows[i]));
      }
    }
  }
}

void lora_gradient(const LoraGradient& call, void* scratch, int64_t begin, int64_t end) {
  auto* strip = static_cast<__m512i*>(scratch);
  auto* sums = reinterpret_cast<__m512*>(strip + kLoraChunk);
  const int64_t stride = (call.rank + kLoraGroup - 1) / kLoraGroup * kLoraGroup * 2;  // of a pair of tokens
  for (int64_t feature = begin * kLoraStrip; feature < end * kLoraStrip; feature += kLoraStrip) {
    const __mmask32 mask = first_bits(call.features - feature);
    for (int64_t token = 0; token < call.m; token += kLoraChunk) {
      const int64_t count = call.m - token < kLoraChunk ? call.m - token : kLoraChunk;
      auto* x = static_cast<const uint16_t*>(call.x) + token * call.features + feature;
      for (int64_t t = 0; t < count; t += 2, x += 2 * call.features) {
        __m512i even = _mm512_maskz_loadu_epi16(mask, x), odd = _mm512_setzero_si512();
        if (t + 1 < count) odd = _mm512_maskz_loadu_epi16(mask, x + call.features);
        strip[t] = _mm512_unpacklo_epi16(even, odd);
        strip[t + 1] = _mm512_unpackhi_epi16(even, odd);
      }
      auto* middle = static_cast<const uint16_t*>(call.pairs) + token / 2 * stride;
      for (int64_t r = 0; r < call.rank; r += kGradientRanks) {
        add_tokens(strip, middle + 2 * r, stride, (count + 1) / 2, token == 0, sums + 2 * r);
      }
    }
    call.rank_rows ? store_rank_rows(call, feature, sums) : store_rank_columns(call, feature, sums);
  }
}
