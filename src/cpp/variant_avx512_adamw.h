// AdamW, 16 elements at a time. Include in the unnamed namespace of variant_avx512.cpp, after Search256.
#include "adamw_tile.h"

// map[code] for 16 codes by shuffles, cheaper here than a gather: the map lies in 16 registers; the low 5 bits of a code
// choose in each pair of them, then each of the high 3 bits halves the number of candidates.
struct Map256 {
  __m512 part[16];

  QLORA_INLINE explicit Map256(const float* map) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) part[i] = _mm512_loadu_ps(map + 16 * i);
  }

  QLORA_INLINE __m512 operator()(__m512i code) const {
    __mmask16 bit5 = _mm512_test_epi32_mask(code, _mm512_set1_epi32(32));
    __mmask16 bit6 = _mm512_test_epi32_mask(code, _mm512_set1_epi32(64));
    __mmask16 bit7 = _mm512_test_epi32_mask(code, _mm512_set1_epi32(128));
    auto in32 = [&](int i) { return _mm512_permutex2var_ps(part[2 * i], code, part[2 * i + 1]); };
    auto in64 = [&](int i) { return _mm512_mask_blend_ps(bit5, in32(i), in32(i + 1)); };
    auto in128 = [&](int i) { return _mm512_mask_blend_ps(bit6, in64(i), in64(i + 2)); };
    return _mm512_mask_blend_ps(bit7, in128(0), in128(4));
  }
};

struct AdamWLanes {
  using F = __m512;
  using Key = __m512i;
  using Code = __m512i;
  using Search = Search256;
  static constexpr int kCount = 16, kTogether = 4;

  static QLORA_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static QLORA_INLINE F fma(float a, F b, F c) { return fma(_mm512_set1_ps(a), b, c); }
  static QLORA_INLINE F sqrt(F x) { return _mm512_sqrt_ps(x); }

  template <DType dtype>
  static QLORA_INLINE F load(const typename Element<dtype>::type* x) {
    if constexpr (dtype == DType::f32) return _mm512_loadu_ps(x);
    __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  }
  template <DType dtype>
  static QLORA_INLINE void store(typename Element<dtype>::type* out, F x) {
    if constexpr (dtype == DType::f32) {
      _mm512_storeu_ps(out, x);
    } else {  // as float_to_bf16; vcvtneps2bf16 would flush subnormals
      __m512i bits = _mm512_castps_si512(x);
      __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
      up = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
      __m256i words = _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), words);
    }
  }

  static QLORA_INLINE Key larger(Key key, F x) {
    return _mm512_max_epu32(key, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
  }
  static QLORA_INLINE uint32_t largest(Key key) { return _mm512_reduce_max_epu32(key); }

  template <int lowest>
  static QLORA_INLINE void store_codes(uint8_t* codes, __m512i code, F x) {
    if constexpr (lowest > 0) {
      __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
      code = _mm512_mask_max_epi32(code, positive, code, _mm512_set1_epi32(lowest));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(code));
  }

  struct Levels {
    Map256 map;
    QLORA_INLINE explicit Levels(const float* levels) : map(levels) {}
    QLORA_INLINE F operator()(const uint8_t* codes) const {
      return map(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
    }
  };
};
