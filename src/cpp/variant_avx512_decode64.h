// 32 packed bytes -> 64 values with AVX-512 VBMI. Include in an unnamed namespace of a variant file.
//
// vpermb gives every qword four bytes, two of the first 16 and two of the last; vpmultishiftqb makes eight bytes of them,
// one a nibble: each word has an index of the first 32 values in its lower byte and one of the last 32 in its upper. Four
// shuffles and a shift for 64 weights, where decode32 takes four shuffles and two shifts.
#include "variant_avx512_dequantize.h"

alignas(64) constexpr uint8_t kBytesOfQword[64] = {
    0, 1, 16, 17, 0, 0, 0, 0, 2,  3,  18, 19, 0, 0, 0, 0, 4,  5,  20, 21, 0, 0, 0, 0, 6,  7,  22, 23, 0, 0, 0, 0,
    8, 9, 24, 25, 0, 0, 0, 0, 10, 11, 26, 27, 0, 0, 0, 0, 12, 13, 28, 29, 0, 0, 0, 0, 14, 15, 30, 31, 0, 0, 0, 0};

QLORA_INLINE void decode64(const uint8_t* packed, __m512i table, uint16_t* out) {
  const __m512i first_bits = _mm512_set1_epi64(0x18081c0c10001404);  // 4, 20, 0, 16, 12, 28, 8, 24
  __m512i bytes = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
  __m512i four = _mm512_permutexvar_epi8(_mm512_load_si512(kBytesOfQword), bytes);
  __m512i index = _mm512_multishift_epi64_epi8(first_bits, four);
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table));
  _mm512_storeu_si512(out + 32, _mm512_permutexvar_epi16(_mm512_srli_epi16(index, 8), table));
}

QLORA_INLINE void decode_words(const uint8_t* packed, __m512i table, int64_t whole, uint16_t* out) {
  int64_t i = 0;
  for (; i + 64 <= whole; i += 64) decode64(packed + i / 2, table, out + i);
  if (i < whole) decode32(packed + i / 2, table, out + i);
}
