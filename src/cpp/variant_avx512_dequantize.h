// Dequantize with 16 floats a register: the loop over blocks, and tables and look-ups that several variants use.
//
// A block has 16 different values: scale and round the table once, then look up. Only the low bits of an index count
// (5 of a word, 4 of a dword), so a nibble is never masked: the 16-bit table is stored twice.
//
// Include in an unnamed namespace of an AVX-512 variant file.
// The upper half of *x is read by itself. With a second use of the whole number in a general register the compiler
// would also broadcast it from there, by a shuffle, where the multiplication can broadcast from memory for nothing.
QLORA_INLINE uint16_t upper_half(const float* x) {
  uint16_t half;
  memcpy(&half, reinterpret_cast<const char*>(x) + 2, 2);
  return half;
}

// The 16 values of a block as 16-bit words, twice.
template <DType dtype>
QLORA_INLINE __m512i table16(__m512 levels, const float* absmax) {
  __m512 scaled = _mm512_mul_ps(levels, _mm512_set1_ps(*absmax));
  if constexpr (dtype == DType::bf16) {
    // To nearest even by integer arithmetic: vcvtneps2bf16 would flush subnormals. Then the upper words, twice.
    if ((upper_half(absmax) & 0x7f80) == 0x7f80) {  // Inf, NaN: every NaN becomes the one that rounds to 0x7fc0
      scaled = _mm512_mask_mov_ps(scaled, _mm512_cmp_ps_mask(scaled, scaled, _CMP_UNORD_Q), _mm512_set1_ps(kNaN));
    }
    __m512i bits = _mm512_castps_si512(scaled);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i upper_words = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1,  //
                                                 31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_permutexvar_epi16(upper_words, up);
  } else {
    return _mm512_broadcast_i64x4(_mm512_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}

// 16 bytes -> 32 values. Every lane gets the bytes, takes its four, each twice as words, the first one shifted by 4.
QLORA_INLINE void decode32(const uint8_t* packed, __m512i table, void* out) {
  const __m512i spread = _mm512_setr_epi32(int(0x80008000), int(0x80018001), int(0x80028002), int(0x80038003),
                                           int(0x80048004), int(0x80058005), int(0x80068006), int(0x80078007),
                                           int(0x80088008), int(0x80098009), int(0x800a800a), int(0x800b800b),
                                           int(0x800c800c), int(0x800d800d), int(0x800e800e), int(0x800f800f));
  const __m512i phase = _mm512_set1_epi32(0x00000004);
  __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
  __m512i index = _mm512_srlv_epi16(_mm512_shuffle_epi8(bytes, spread), phase);
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table));
}

// Decoder(codebook)(packed, absmax, whole, out) decodes `whole` elements of one block, a multiple of 32.
template <DType dtype, class Decoder, bool nested>
QLORA_INLINE void dequantize_blocks(const uint8_t* packed, const BlockAbsmax& absmax, int64_t n, int64_t block_size,
                                    const Codebook& codebook, void* out_) {
  auto* out = static_cast<typename Element<dtype>::type*>(out_);
  const Decoder decode(codebook);
  const float* values = absmax.values;
  const uint8_t* codes = absmax.codes;
  auto next = [&] { return nested ? values + *codes++ : values++; };
  if (block_size == 64) {  // the same, unrolled
    for (; n >= 64; n -= 64, out += 64, packed += 32) decode(packed, next(), 64, out);
  }
  for (; n > 0; n -= block_size, out += block_size, packed += block_size / 2) {
    int64_t size = n < block_size ? n : block_size, whole = size & ~int64_t(31);
    const float* scale = next();
    decode(packed, scale, whole, out);
    if (whole < size) {
      scalar_variant.dequantize[int(dtype)](packed + whole / 2, {scale, nullptr}, size - whole, block_size, codebook,
                                            out + whole);
    }
  }
}

template <DType dtype, class Decoder>
void dequantize(const uint8_t* packed, const BlockAbsmax& absmax, int64_t n, int64_t block_size,
                const Codebook& codebook, void* out) {
  if (absmax.codes) {
    dequantize_blocks<dtype, Decoder, true>(packed, absmax, n, block_size, codebook, out);
  } else {
    dequantize_blocks<dtype, Decoder, false>(packed, absmax, n, block_size, codebook, out);
  }
}

// 256 values of absmax', by code.
QLORA_INLINE void decode_map(const float* map, float nested_absmax, float mean, float* values) {
  const __m512 scale = _mm512_set1_ps(nested_absmax), means = _mm512_set1_ps(mean);
#pragma GCC unroll 4
  for (int code = 0; code < 256; code += 16) {
    __m512 product = _mm512_mul_ps(_mm512_loadu_ps(map + code), scale);
    _mm512_storeu_ps(values + code, _mm512_add_ps(product, means));
  }
}

template <DType dtype, class Decoder>
void dequantize_groups(const uint8_t* packed, const Absmax& absmax, int64_t group, int64_t groups, int64_t block_size,
                       const Codebook& codebook, void* out_) {
  auto* out = static_cast<typename Element<dtype>::type*>(out_);
  const Decoder decode(codebook);
  const float mean = *absmax.mean;
  const uint8_t* codes = absmax.codes + group * absmax.nested_block_size;
  alignas(64) float values[256];
  for (const int64_t end = group + groups; group < end; ++group) {
    decode_map(absmax.map, absmax.nested_absmax[group], mean, values);
    const auto decode_blocks = [&](int64_t size) {
      for (const uint8_t* last = codes + absmax.nested_block_size; codes < last; ++codes) {
        decode(packed, values + *codes, size, out);
        packed += size / 2;
        out += size;
      }
    };
    block_size == 64 ? decode_blocks(64) : decode_blocks(block_size);  // the same, unrolled
  }
}
