// AdamW, 8 elements at a time. Include in the unnamed namespace of variant_avx2.cpp, after load8 and round_bf16.
#include "adamw_tile.h"

struct AdamWLanes {
  using F = __m256;
  using Key = __m256i;
  using Code = __m256i;
  static constexpr int kCount = 8, kTogether = 4;

  static QLORA_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static QLORA_INLINE F fma(float a, F b, F c) { return fma(_mm256_set1_ps(a), b, c); }
  static QLORA_INLINE F sqrt(F x) { return _mm256_sqrt_ps(x); }

  template <DType dtype>
  static QLORA_INLINE F load(const typename Element<dtype>::type* x) {
    return load8<dtype>(x);
  }
  template <DType dtype>
  static QLORA_INLINE void store(typename Element<dtype>::type* out, F x) {
    if constexpr (dtype == DType::f32) {
      _mm256_storeu_ps(out, x);
    } else {  // as float_to_bf16
      __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
      __m256i up = _mm256_blendv_epi8(round_bf16(x), _mm256_set1_epi32(0x7fc00000), nan);
      __m256i words = _mm256_srli_epi32(up, 16);
      __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), packed);
    }
  }

  static QLORA_INLINE Key larger(Key key, F x) {
    return _mm256_max_epu32(key, _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff)));
  }
  static QLORA_INLINE uint32_t largest(Key key) { return largest_of(key); }

  template <int lowest>
  static QLORA_INLINE void store_codes(uint8_t* codes, Code code, F x) {
    if constexpr (lowest > 0) {
      __m256i positive = _mm256_castps_si256(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ));
      code = _mm256_max_epi32(code, _mm256_and_si256(positive, _mm256_set1_epi32(lowest)));
    }
    __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes), _mm_packus_epi16(words, words));
  }

  struct Levels {
    const float* levels;
    QLORA_INLINE explicit Levels(const float* levels) : levels(levels) {}
    QLORA_INLINE F operator()(const uint8_t* codes) const {
      __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
      return _mm256_i32gather_ps(levels, code, 4);
    }
  };

  // As Search256 of variant_avx512_search.h, to six of the eight levels: the thresholds of the last two are gathered.
  struct Search {
    const float* thresholds;
    F few[4], level4[2], level5[4];

    // Thresholds 8 * part + lane of a level; the shorter ones repeat.
    static QLORA_INLINE F load(const float* thresholds, int level, int part) {
      const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
      const int step = 128 >> level, inside = (1 << level) - 1;
      __m256i index = _mm256_and_si256(lane, _mm256_set1_epi32(inside));
      index = _mm256_mullo_epi32(index, _mm256_set1_epi32(2 * step));
      return _mm256_i32gather_ps(thresholds + 16 * step * part + step - 1, index, 4);
    }

    QLORA_INLINE explicit Search(const float* thresholds) : thresholds(thresholds) {
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        few[part] = load(thresholds, part, 0);
        if (part < 2) level4[part] = load(thresholds, 4, part);
        level5[part] = load(thresholds, 5, part);
      }
    }

    template <int N>
    QLORA_INLINE void operator()(const F (&s)[N], Code (&count)[N]) const {
      F above[3][N];  // of the last level, and of the first two
      const auto compare = [&](int keep, const auto& threshold) {
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) {
          above[keep][i] = _mm256_cmp_ps(threshold(i), s[i], _CMP_LT_OQ);
          count[i] = _mm256_sub_epi32(_mm256_add_epi32(count[i], count[i]), _mm256_castps_si256(above[keep][i]));
        }
      };
      const auto of16 = [&](int i, const F* level, F upper) {
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(level[0], count[i]),
                                _mm256_permutevar8x32_ps(level[1], count[i]), upper);
      };
      const auto gathered = [&](int i, int step) {
        return _mm256_i32gather_ps(thresholds + step - 1, _mm256_mullo_epi32(count[i], _mm256_set1_epi32(2 * step)), 4);
      };
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) count[i] = _mm256_setzero_si256();
      compare(1, [&](int) { return few[0]; });
      compare(2, [&](int i) { return _mm256_permutevar8x32_ps(few[1], count[i]); });
      compare(0, [&](int i) { return _mm256_permutevar8x32_ps(few[2], count[i]); });
      compare(0, [&](int i) { return _mm256_permutevar8x32_ps(few[3], count[i]); });
      compare(0, [&](int i) { return of16(i, level4, above[1][i]); });
      compare(0, [&](int i) {
        return _mm256_blendv_ps(of16(i, level5, above[2][i]), of16(i, level5 + 2, above[2][i]), above[1][i]);
      });
      compare(0, [&](int i) { return gathered(i, 2); });
      compare(0, [&](int i) { return gathered(i, 1); });
    }
  };
};
