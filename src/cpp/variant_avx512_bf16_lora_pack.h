// An adapter in the order of the thin products of LoRA (variant_avx512_bf16_lora.h), padded with zeros.
//
//   down  lanes are 16 ranks, a pair is two features; [group of ranks][pair of features][16]
//   up    lanes are 16 features of a strip, the even ones and then the odd ones, a pair is two ranks;
//         [strip][pair of ranks][even, odd][16]
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

// The pairs (low[i], high[i]) of the even and of the odd i.
QLORA_INLINE __m512i even_pairs(__m512i low, __m512i high) {
  return _mm512_mask_blend_epi16(0xaaaaaaaau, low, _mm512_slli_epi32(high, 16));
}
QLORA_INLINE __m512i odd_pairs(__m512i low, __m512i high) {
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(low, 16), high);
}

// 16 ranks of a strip, from (rank, features)
template <DType dtype>
QLORA_INLINE void pack_rank_rows(const LoraPacking& p, int64_t rank, int64_t feature, __m512i* down, __m512i* up) {
  __m512i row[16];
  for (int i = 0; i < 16; ++i) {
    int64_t n = rank + i < p.rank ? p.features - feature : 0;
    row[i] = load_rounded<dtype>(p.matrix, (rank + i) * p.features + feature, n);
  }
  if (up) {
    for (int i = 0; i < 8; ++i) {
      up[2 * i] = even_pairs(row[2 * i], row[2 * i + 1]);
      up[2 * i + 1] = odd_pairs(row[2 * i], row[2 * i + 1]);
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
  __m512i row[16];  // an even feature's 16 ranks, then the odd one's
  for (int i = 0; i < 16; ++i) {
    __m512i half[2];
    for (int odd = 0; odd < 2; ++odd) {
      int64_t f = feature + 2 * i + odd;
      half[odd] = load_rounded<dtype>(p.matrix, f * p.rank + rank, f < p.features ? ranks : 0);
    }
    if (down) {
      __m512i even = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(half[0]));
      __m512i odd = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(half[1]));
      down[i] = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
    }
    row[i] = _mm512_inserti64x4(half[0], _mm512_castsi512_si256(half[1]), 1);
  }
  if (up) {
    transpose16(row);
    for (int i = 0; i < 8; ++i) {
      up[2 * i] = row[i];
      up[2 * i + 1] = row[8 + i];
    }
  }
}

template <DType dtype>
void pack_strips(const LoraPacking& p, int64_t begin, int64_t end) {
  const int64_t groups = (p.rank + kLoraGroup - 1) / kLoraGroup, strips = (p.features + kLoraStrip - 1) / kLoraStrip;
  for (int64_t s = begin; s < end; ++s) {
    for (int64_t g = 0; g < groups; ++g) {
      auto* down = p.down ? static_cast<__m512i*>(p.down) + 16 * (g * strips + s) : nullptr;
      auto* up = p.up ? static_cast<__m512i*>(p.up) + 16 * (s * groups + g) : nullptr;
      if (p.rank_rows) {
        pack_rank_rows<dtype>(p, kLoraGroup * g, kLoraStrip * s, down, up);
      } else {
        pack_rank_columns<dtype>(p, kLoraGroup * g, kLoraStrip * s, down, up);
      }
    }
  }
}

void lora_pack(const LoraPacking& p, int64_t begin, int64_t end) {
  p.dtype == DType::f32 ? pack_strips<DType::f32>(p, begin, end) : pack_strips<DType::bf16>(p, begin, end);
}
