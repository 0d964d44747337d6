// An adapter in the order of the products of LoRA (variant_avx512_bf16_lora.h), padded with zeros.
//
//   down  lanes are 16 ranks, a pair is two features; [group of ranks][pair of features][16]
//   up    rows of a panel of variant_avx512_product.h: lanes are 64 features, a pair is two ranks; [panel][pair of ranks][64]
#pragma once
#include "variant_avx512_transpose.h"

// Up to 32 elements as bf16, zeros behind them.
template <DType dtype>
QLORA_INLINE __m512i load_rounded(const void* matrix, int64_t first, int64_t n) {
  if (n <= 0) return _mm512_setzero_si512();
  uint32_t mask = first_bits(n);
  if constexpr (dtype == DType::bf16) {
    return _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(matrix) + first);
  } else {
    auto* p = static_cast<const float*>(matrix) + first;
    __m512 low = _mm512_maskz_loadu_ps(__mmask16(mask), p), high = _mm512_maskz_loadu_ps(__mmask16(mask >> 16), p + 16);
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  }
}

// 16 ranks of half a panel, from (rank, features)
template <DType dtype>
QLORA_INLINE void pack_rank_rows(const LoraPacking& p, int64_t rank, int64_t feature, __m512i* down, __m512i* up) {
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
QLORA_INLINE void pack_rank_columns(const LoraPacking& p, int64_t rank, int64_t feature, __m512i* down, __m512i* up) {
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

template <DType dtype>
void pack_panels(const LoraPacking& p, int64_t begin, int64_t end) {
  const int64_t groups = (p.rank + kLoraGroup - 1) / kLoraGroup;
  const int64_t panels = (p.features + kPanelFeatures - 1) / kPanelFeatures;
  for (int64_t half = 2 * begin; half < 2 * end; ++half) {
    for (int64_t g = 0; g < groups; ++g) {
      auto* down = p.down ? static_cast<__m512i*>(p.down) + 16 * (g * 2 * panels + half) : nullptr;
      auto* up = p.up ? static_cast<__m512i*>(p.up) + 32 * (half / 2 * groups + g) + half % 2 * 2 : nullptr;
      if (p.rank_rows) {
        pack_rank_rows<dtype>(p, kLoraGroup * g, kPanelFeatures / 2 * half, down, up);
      } else {
        pack_rank_columns<dtype>(p, kLoraGroup * g, kPanelFeatures / 2 * half, down, up);
      }
    }
  }
}

void lora_pack(const LoraPacking& p, int64_t begin, int64_t end) {
  p.dtype == DType::f32 ? pack_panels<DType::f32>(p, begin, end) : pack_panels<DType::bf16>(p, begin, end);
}
