// Shuffles between registers that several variants use. Include in an unnamed namespace of an AVX-512 variant file.
#pragma once

// The low n bits: none if n <= 0, all of them if n is larger than 31.
QLORA_INLINE uint32_t first_bits(int64_t n) { return n >= 32 ? ~0u : n > 0 ? (1u << n) - 1 : 0; }

// 16 x 16 dwords
QLORA_INLINE void transpose16(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {  // halves of pairs of quarters: columns i % 4 and i % 4 + 8, or + 4 and + 12
    const int a = i / 8 * 8 + i % 4, odd = i / 4 % 2;
    t[i] = odd ? _mm512_shuffle_i32x4(r[a], r[a + 4], 0xdd) : _mm512_shuffle_i32x4(r[a], r[a + 4], 0x88);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// The pairs (low[i], high[i]) of words, i from 16 * half on.
QLORA_INLINE __m512i pairs_of_words(__m512i low, __m512i high, int half) {
  alignas(64) static constexpr uint16_t kPairs[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i index = _mm512_add_epi16(_mm512_load_si512(kPairs), _mm512_set1_epi16(short(16 * half)));
  return _mm512_permutex2var_epi16(low, index, high);
}
