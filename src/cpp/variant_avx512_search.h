// The search of a 256-entry table in registers: number of the 255 ascending thresholds strictly below s, for 16 values.
//
// Bisection, with the thresholds in the order in which it meets them: level k has 2^k, one of which a value is compared
// with, the one that its k comparisons so far (a number of k bits) choose. Up to 16 lie in a register, and one shuffle
// finds each value's; a level of 2, 4, 8 registers takes a shuffle for every two of them, then the first comparisons,
// which are the highest bits, select. No gather.
//
// Include in an unnamed namespace of an AVX-512 variant file.
struct Search256 {
  __m512 few[5];  // levels 0 to 4; the shorter ones repeat
  __m512 level5[2], level6[4], level7[8];

  // Thresholds 16 * part + lane of a level. Comparison k adds 2^(7 - k) to the count.
  static QLORA_INLINE __m512 load(const float* thresholds, int level, int part) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const int step = 128 >> level, inside = (1 << level) - 1;
    const __m512i index =
        _mm512_mullo_epi32(_mm512_and_si512(lane, _mm512_set1_epi32(inside)), _mm512_set1_epi32(2 * step));
    return _mm512_i32gather_ps(index, thresholds + 32 * step * part + step - 1, 4);
  }

  QLORA_INLINE explicit Search256(const float* thresholds) {
#pragma GCC unroll 8
    for (int part = 0; part < 8; ++part) {
      if (part < 5) few[part] = load(thresholds, part, 0);
      if (part < 2) level5[part] = load(thresholds, 5, part);
      if (part < 4) level6[part] = load(thresholds, 6, part);
      level7[part] = load(thresholds, 7, part);
    }
  }

  // Several registers at a time: one alone would wait for its own comparisons. NaN is above no threshold: 0.
  template <int N>
  QLORA_INLINE void operator()(const __m512 (&s)[N], __m512i (&count)[N]) const {
    __mmask16 above[3][N];  // of the last level, and of the first two
    const auto compare = [&](int keep, const auto& threshold) {
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        above[keep][i] = _mm512_cmp_ps_mask(threshold(i), s[i], _CMP_LT_OQ);
        count[i] = _mm512_add_epi32(count[i], count[i]);
        count[i] = _mm512_mask_add_epi32(count[i], above[keep][i], count[i], _mm512_set1_epi32(1));
      }
    };
    const auto of32 = [&](int i, const __m512* level) { return _mm512_permutex2var_ps(level[0], count[i], level[1]); };
    const auto of64 = [&](int i, const __m512* level, __mmask16 upper) {
      return _mm512_mask_blend_ps(upper, of32(i, level), of32(i, level + 2));
    };
    const auto of128 = [&](int i, const __m512* level) {
      return _mm512_mask_blend_ps(above[1][i], of64(i, level, above[2][i]), of64(i, level + 4, above[2][i]));
    };
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) count[i] = _mm512_setzero_si512();
    compare(1, [&](int) { return few[0]; });
    compare(2, [&](int i) { return _mm512_permutexvar_ps(count[i], few[1]); });
#pragma GCC unroll 3
    for (int level = 2; level < 5; ++level) {
      compare(0, [&](int i) { return _mm512_permutexvar_ps(count[i], few[level]); });
    }
    compare(0, [&](int i) { return of32(i, level5); });
    compare(0, [&](int i) { return of64(i, level6, above[1][i]); });
    compare(0, [&](int i) { return of128(i, level7); });
  }
};
