// The search of a 256-entry table for 32 values a register: number of the 255 ascending thresholds strictly below s.
//
// Numbers of [-1, 1] become keys of 16 bits that order as they do: a threshold with a lower key is below s for certain.
// Only where a threshold has the very key of s must the numbers themselves say: `tied` names those, and
// count_from finishes them.
//
// Bisection as in variant_avx512_search.h, with half its instructions. A threshold minus the key of s has its sign bit set
// if it is lower, and a shift (VBMI2) takes that bit into the count: comparisons into mask registers cost twice as much
// here. Any bisection meets the lowest threshold that is not below, so a tie is a difference of zero on the way.
//
// Include in an unnamed namespace of an AVX-512 variant file.
struct KeySearch {
  __m512 scale;
  __m512i few[6];  // keys of levels 0 to 5, 1 to 32 of them; the shorter ones repeat
  __m512i level6[2], level7[4];

  // Monotonic: one rounding, to multiples of 2^-15, whose number is then the low half of the bits. |s| <= kLimit.
  static constexpr float kLimit = 1.0f + 0x1p-16f;
  QLORA_INLINE __m512i key(__m512 s) const {
    return _mm512_castps_si512(_mm512_fmadd_ps(s, scale, _mm512_set1_ps(384.0f)));
  }
  // Of 32, in their order.
  QLORA_INLINE __m512i keys(__m512 first, __m512 second) const {
    const __m512i low_halves = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32,  //
                                                30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_permutex2var_epi16(key(first), low_halves, key(second));
  }

  // Differences of keys must fit in 16 bits: of the middle threshold, and of two numbers on the same side of it, as the
  // first comparison leaves no others.
  QLORA_INLINE explicit KeySearch(const float* thresholds)
      : scale(_mm512_div_ps(_mm512_set1_ps(1.0f - 0x1p-13f),
                            _mm512_add_ps(_mm512_set1_ps(1.0f), _mm512_abs_ps(_mm512_set1_ps(thresholds[127]))))) {
    alignas(64) int16_t ascending[256], level[128];
    const auto clamped = [&](int from) {  // what is beyond the limit is above, or below, every s
      const __m512 t = _mm512_maskz_loadu_ps(from < 240 ? 0xffff : 0x7fff, thresholds + from);
      return _mm512_max_ps(_mm512_min_ps(t, _mm512_set1_ps(kLimit)), _mm512_set1_ps(-kLimit));
    };
    for (int i = 0; i < 256; i += 32) _mm512_store_si512(ascending + i, keys(clamped(i), clamped(i + 16)));
    for (int k = 0; k < 8; ++k) {
      const int words = k < 5 ? 32 : 1 << k, step = 128 >> k;
      for (int i = 0; i < words; ++i) level[i] = ascending[2 * step * (i & ((1 << k) - 1)) + step - 1];
      __m512i* to = k < 6 ? few + k : k == 6 ? level6 : level7;
      for (int i = 0; i < words; i += 32) *to++ = _mm512_load_si512(level + i);
    }
  }

  // Several registers at a time: one alone would wait for its own comparisons.
  template <int N>
  QLORA_INLINE void operator()(const __m512i (&key)[N], __m512i (&count)[N], __mmask32 (&tied)[N]) const {
    __m512i closest[N], upper[N];
    const auto compare = [&](const auto& threshold) {
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        const __m512i difference = _mm512_sub_epi16(threshold(i), key[i]);
        closest[i] = _mm512_min_epu16(closest[i], difference);
        count[i] = _mm512_shldi_epi16(count[i], difference, 1);
      }
    };
    const auto of64 = [&](int i, const __m512i* level) {
      return _mm512_permutex2var_epi16(level[0], count[i], level[1]);
    };
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      closest[i] = _mm512_sub_epi16(few[0], key[i]);
      count[i] = _mm512_srli_epi16(closest[i], 15);
      upper[i] = _mm512_srai_epi16(closest[i], 15);
    }
#pragma GCC unroll 5
    for (int level = 1; level < 6; ++level) {
      compare([&](int i) { return _mm512_permutexvar_epi16(count[i], few[level]); });
    }
    compare([&](int i) { return of64(i, level6); });
    compare([&](int i) {  // of 128: bits of the upper half where `upper` is set
      return _mm512_ternarylogic_epi32(upper[i], of64(i, level7), of64(i, level7 + 2), 0xac);
    });
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) tied[i] = _mm512_testn_epi16_mask(closest[i], closest[i]);
  }

  // The exact count, where it is `count` at least.
  static QLORA_INLINE int count_from(int count, const float* thresholds, float s) {
    while (count < 255 && thresholds[count] < s) ++count;
    return count;
  }
};
