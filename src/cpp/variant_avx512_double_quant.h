// Double quantization with AVX-512: the groups, and what a search of the table is not needed for.
//
// Include in an unnamed namespace of an AVX-512 variant file.
QLORA_INLINE __mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xffff : n > 0 ? __mmask16((1 << n) - 1) : 0; }

// Bits of the largest |absmax - mean|.
QLORA_INLINE uint32_t largest_deviation(const float* absmax, int64_t n, float mean) {
  const __m512 means = _mm512_set1_ps(mean);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 16) {
    __m512 x = _mm512_mask_loadu_ps(means, first_lanes(n - i), absmax + i);
    __m512i bits = _mm512_castps_si512(_mm512_sub_ps(x, means));
    largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
  }
  return uint32_t(_mm512_reduce_max_epu32(largest));
}

// The lowest entry that reconstructs to >= 0, by bisection as they ascend; 0 if none does.
QLORA_INLINE int lowest_positive(const Map8& map, float scale, float mean) {
  if (double_decode(map.levels[0], scale, mean) >= 0.0f) return 0;  // usual
  int below = 0;
  for (int step = 128; step; step /= 2) {
    below += double_decode(map.levels[below + step - 1], scale, mean) >= 0.0f ? 0 : step;
  }
  return double_decode(map.levels[below], scale, mean) >= 0.0f ? below : 0;
}

struct NestedGroup {
  float mean, inverse;  // 1 / nested_absmax
  int lowest;           // code

  QLORA_INLINE __m512 normalized(const float* absmax) const {
    return _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(absmax), _mm512_set1_ps(mean)), _mm512_set1_ps(inverse));
  }
};

// encode(group, absmax, size, codes) for every group whose values are ordinary numbers: then |s| <= 1 + 2^-22.
template <class Encode>
QLORA_INLINE void double_quantize_groups(const float* absmax, int64_t n, int64_t nested_block_size, float mean,
                                         const Map8& map, uint8_t* codes, float* nested_absmax, const Encode& encode) {
  for (; n > 0; n -= nested_block_size, absmax += nested_block_size, codes += nested_block_size, ++nested_absmax) {
    const int64_t size = n < nested_block_size ? n : nested_block_size;
    const float scale = bits_to_float(largest_deviation(absmax, size, mean));
    if (scale >= kSmallestNormal && scale <= kLargestInvertible) {
      *nested_absmax = scale;
      encode(NestedGroup{mean, 1.0f / scale, lowest_positive(map, scale, mean)}, absmax, size, codes);
    } else {  // rare: zero, NaN, huge
      scalar_variant.double_quantize(absmax, size, nested_block_size, mean, map, codes, nested_absmax);
    }
  }
}

// encode(absmax, codes) for the rest of a group, fewer than the `step` values that it takes.
template <int step, class Encode>
QLORA_INLINE void padded(const float* absmax, int64_t size, uint8_t* codes, const Encode& encode) {
  if (!size) return;
  float all[step] = {};
  uint8_t all_codes[step];
  memcpy(all, absmax, size_t(size) * sizeof(float));
  encode(all, all_codes);
  memcpy(codes, all_codes, size_t(size));
}
