// LoRA in float32, for variant_avx512_lora.h: a dword is an element, and so everything lies in the order in which it came.
// Included by variant_avx512.cpp, in its unnamed namespace.
#pragma once
#include "variant_avx512_lora.h"

struct F32Lora : F32Product<DType::f32> {
  // 16 x 16 elements of a matrix from (row, col) on, zeros behind it: its rows as they are, `stride` registers apart, and
  // its columns, where wanted.
  static QLORA_INLINE void pack(const void* matrix, int64_t rows, int64_t cols, int64_t row, int64_t col,
                                __m512i* as_rows, int row_stride, __m512i* as_cols, int col_stride) {
    __m512i block[16];
    for (int i = 0; i < 16; ++i) {
      const __mmask16 mask = row + i < rows && col < cols ? __mmask16(first_bits(cols - col)) : __mmask16(0);
      block[i] = _mm512_maskz_loadu_epi32(mask, static_cast<const float*>(matrix) + (row + i) * cols + col);
    }
    for (int i = 0; as_rows && i < 16; ++i) as_rows[row_stride * i] = block[i];
    if (!as_cols) return;
    transpose16(block);
    for (int i = 0; i < 16; ++i) as_cols[col_stride * i] = block[i];
  }
  // 16 ranks of 16 features, from (rank, features)
  template <DType>
  static QLORA_INLINE void pack_rank_rows(const LoraPacking& p, int64_t rank, int64_t feature, __m512i* down,
                                          __m512i* up) {
    pack(p.matrix, p.rank, p.features, rank, feature, up, kPanelRegisters, down, 1);
  }
  // The same from (features, rank)
  template <DType>
  static QLORA_INLINE void pack_rank_columns(const LoraPacking& p, int64_t rank, int64_t feature, __m512i* down,
                                             __m512i* up) {
    pack(p.matrix, p.features, p.rank, feature, rank, down, 1, up, kPanelRegisters);
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
