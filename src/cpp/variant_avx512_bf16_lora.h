// LoRA in bfloat16, for variant_avx512_lora.h: a dword is two neighbours along the sum, which vdpbf16ps multiplies and adds.
// Included by variant_avx512_bf16.cpp, in its unnamed namespace.
#pragma once
#include "variant_avx512_lora.h"

struct BF16Lora : BF16Product {
  // Up to 32 elements as bf16, zeros behind them.
  template <DType dtype>
  static QLORA_INLINE __m512i load_rounded(const void* matrix, int64_t first, int64_t n) {
    if (n <= 0) return _mm512_setzero_si512();
    uint32_t mask = first_bits(n);
    if constexpr (dtype == DType::bf16) {
      return _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(matrix) + first);
    } else {
      auto* p = static_cast<const float*>(matrix) + first;
      __m512 low = _mm512_maskz_loadu_ps(__mmask16(mask), p),
             high = _mm512_maskz_loadu_ps(__mmask16(mask >> 16), p + 16);
      return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
    }
  }

  // 16 ranks of 32 features, from (rank, features)
  template <DType dtype>
  static QLORA_INLINE void pack_rank_rows(const LoraPacking& p, int64_t rank, int64_t feature, __m512i* down,
                                          __m512i* up) {
    __m512i row[16];
    for (int i = 0; i < 16; ++i) {
      int64_t n = rank + i < p.rank ? p.features - feature : 0;
      row[i] = load_rounded<dtype>(p.matrix, (rank + i) * p.features + feature, n);
    }
    if (up) {
      for (int i = 0; i < 8; ++i) {
        up[4 * i] = pairs_of_words(row[2 * i], row[2 * i + 1], 0);
        up[4 * i + 1] = pairs_of_words(row[2 * i], row[2 * i + 1], 1);
      }
    }
    if (down) {
      transpose16(row);
      for (int i = 0; i < 16; ++i) down[i] = row[i];
    }
  }

  // The same from (features, rank)
  template <DType dtype>
  static QLORA_INLINE void pack_rank_columns(const LoraPacking& p, int64_t rank, int64_t feature, __m512i* down,
                                             __m512i* up) {
    const int64_t ranks = p.rank - rank < 16 ? p.rank - rank : 16;
    __m256i column[32];  // 16 ranks of a feature
    for (int i = 0; i < 32; ++i) {
      const int64_t f = feature + i;
      column[i] = _mm512_castsi512_si256(load_rounded<dtype>(p.matrix, f * p.rank + rank, f < p.features ? ranks : 0));
    }
    if (down) {
      for (int i = 0; i < 16; ++i) {
        __m512i even = _mm512_cvtepu16_epi32(column[2 * i]), odd = _mm512_cvtepu16_epi32(column[2 * i + 1]);
        down[i] = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
      }
    }
    if (up) {
      __m512i row[16];  // column i of the result: of feature i, then of feature i + 16
      for (int i = 0; i < 16; ++i) row[i] = _mm512_inserti64x4(_mm512_castsi256_si512(column[i]), column[i + 16], 1);
      transpose16(row);
      for (int i = 0; i < 8; ++i) {
        up[4 * i] = row[i];
        up[4 * i + 1] = row[8 + i];
      }
    }
  }

  // Group g of the ranks of T tokens.
  template <int T>
  static QLORA_INLINE void store_middle(const LoraTokens& call, int64_t token, int64_t g, int64_t groups,
                                        __mmask16 ranks, const __m512* value) {
    __m512i wide[T + 1];
    wide[T] = _mm512_setzero_si512();
    for (int t = 0; t < T; ++t) {
      auto rounded = reinterpret_cast<__m256i>(_mm512_maskz_cvtneps_pbh(ranks, value[t]));
      if (call.rows) static_cast<__m256i*>(call.rows)[(token + t) * groups + g] = rounded;
      wide[t] = _mm512_cvtepu16_epi32(rounded);
    }
    if (!call.dwords) return;
    for (int t = 0; t < T; t += 2) {
      static_cast<__m512i*>(call.dwords)[(token + t) / 2 * groups + g] =
          _mm512_or_si512(wide[t], _mm512_slli_epi32(wide[t + 1], 16));
    }
  }

  // 32 features of two tokens, in pairs: those of feature_of(0, i), then of feature_of(1, i), as unpack works on quarters.
  static QLORA_INLINE void load_strip(const char* x, const char* next, __mmask32 mask, __m512i* strip) {
    __m512i even = _mm512_maskz_loadu_epi16(mask, x), odd = _mm512_setzero_si512();
    if (next) odd = _mm512_maskz_loadu_epi16(mask, next);
    strip[0] = _mm512_unpacklo_epi16(even, odd);
    strip[1] = _mm512_unpackhi_epi16(even, odd);
  }
  static QLORA_INLINE int feature_of(int half, int lane) { return 8 * (lane / 4) + 4 * half + lane % 4; }
  static QLORA_INLINE void in_order(__m512& low, __m512& high) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512 from = low;
    low = _mm512_permutex2var_ps(from, first, high);
    high = _mm512_permutex2var_ps(from, _mm512_add_epi32(first, _mm512_set1_epi32(8)), high);
  }
  static QLORA_INLINE void store_gradient(const LoraGradient& call, int64_t where, __mmask16 mask, __m512 value) {
    if (call.dtype == DType::f32) {
      _mm512_mask_storeu_ps(static_cast<float*>(call.gradient) + where, mask, value);
    } else {
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(call.gradient) + where, mask,
                               reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
    }
  }
};

void pack_bf16(const LoraPacking& p, int64_t begin, int64_t end) {
  p.dtype == DType::f32 ? pack_panels<BF16Lora, DType::f32>(p, begin, end)
                        : pack_panels<BF16Lora, DType::bf16>(p, begin, end);
}

constexpr LoraLoops bf16_lora = {pack_bf16, lora_tokens<BF16Lora>, lora_gradient<BF16Lora>};
