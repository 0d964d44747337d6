// LoRA in float32, for variant_avx512_lora.h: a dword is an element, and so everything lies in the order in which it came.
// Included by variant_avx512.cpp, in its unnamed namespace.
#pragma once
#include "variant_avx512_lora.h"

struct F32Lora : F32Product<DType::f32> {
  // Up to 16 elements of a matrix, zeros behind them.
  static QLORA_INLINE __m512i load_some(const void* matrix, int64_t first, int64_t n) {
    if (n <= 0) return _mm512_setzero_si512();
    return _mm512_maskz_loadu_epi32(__mmask16(first_bits(n)), static_cast<const float*>(matrix) + first);
  }
  static QLORA_INLINE void store_up(const __m512i* row, __m512i* up) {
    for (int i = 0; i < 16; ++i) up[kPanelRegisters * i] = row[i];
  }
  static QLORA_INLINE void store_down(const __m512i* row, __m512i* down) {
    for (int i = 0; i < 16; ++i) down[i] = row[i];
  }

  // 16 ranks of 16 features, from (rank, features)
  template <DType>
  static QLORA_INLINE void pack_rank_rows(const LoraPacking& p, int64_t rank, int64_t feature, __m512i* down,
                                          __m512i* up) {
    __m512i row[16];  // 16 features of a rank
    for (int i = 0; i < 16; ++i) {
      const int64_t n = rank + i < p.rank ? p.features - feature : 0;
      row[i] = load_some(p.matrix, (rank + i) * p.features + feature, n);
    }
    if (up) store_up(row, up);
    if (!down) return;
    transpose16(row);
    store_down(row, down);
  }
  // The same from (features, rank)
  template <DType>
  static QLORA_INLINE void pack_rank_columns(const LoraPacking& p, int64_t rank, int64_t feature, __m512i* down,
                                             __m512i* up) {
    __m512i row[16];  // 16 ranks of a feature
    for (int i = 0; i < 16; ++i) {
      const int64_t n = feature + i < p.features ? p.rank - rank : 0;
      row[i] = load_some(p.matrix, (feature + i) * p.rank + rank, n);
    }
    if (down) store_down(row, down);
    if (!up) return;
    transpose16(row);
    store_up(row, up);
  }

  // Group g of the ranks of T tokens; rows and dwords are the same here.
  template <int T>
  static QLORA_INLINE void store_middle(const LoraTokens& call, int64_t token, int64_t g, int64_t groups,
                                        __mmask16 ranks, const __m512* value) {
    for (int t = 0; t < T; ++t) {
      const __m512 kept = _mm512_maskz_mov_ps(ranks, value[t]);
      if (call.rows) static_cast<__m512*>(call.rows)[(token + t) * groups + g] = kept;
      if (call.dwords) static_cast<__m512*>(call.dwords)[(token + t) * groups + g] = kept;
    }
  }

  static QLORA_INLINE void load_strip(const char* x, const char*, __mmask32 mask, __m512i* strip) {
    strip[0] = _mm512_maskz_loadu_epi32(__mmask16(mask), x);
    strip[1] = _mm512_maskz_loadu_epi32(__mmask16(mask >> 16), x + 64);
  }
  static QLORA_INLINE int feature_of(int half, int lane) { return 16 * half + lane; }
  static QLORA_INLINE void in_order(__m512&, __m512&) {}
  static QLORA_INLINE void store_gradient(const LoraGradient& call, int64_t where, __mmask16 mask, __m512 value) {
    _mm512_mask_storeu_ps(static_cast<float*>(call.gradient) + where, mask, value);
  }
};

constexpr LoraLoops f32_lora = {pack_panels<F32Lora, DType::f32>, lora_tokens<F32Lora>, lora_gradient<F32Lora>};
