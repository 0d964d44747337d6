// Packed weights into panels of bf16 pairs, without a detour over decoded rows: the look-ups write the weights where the
// panel wants them.
//
// A register of 32 words looks up several rows at once: the tables of two rows lie in one register, those of four in two
// (vpermi2w), and the upper bits of an index say which. As in variant_avx512_decode64.h, vpermb gives every qword four
// bytes and vpmultishiftqb makes indices of their nibbles, those of one register in the lower bytes of the words and those
// of another in the upper.
//
// Include in an unnamed namespace of a variant file, after variant_avx512_product.h and BF16Lanes.
// `bytes` says where the four bytes of a qword come from, `nibbles` which bits of them become the eight bytes, `rows` what
// is added to choose the row.
QLORA_INLINE __m512i indices(__m512i packed, __m512i bytes, __m512i nibbles, __m512i rows) {
  const __m512i four = _mm512_permutexvar_epi8(bytes, packed);
  const __m512i shifted = _mm512_multishift_epi64_epi8(nibbles, four);
  return _mm512_ternarylogic_epi32(shifted, _mm512_set1_epi8(15), rows, 0xEA);  // (shifted & 15) | rows
}

// --- rows are features -----------------------------------------------------------------------------------------------------
// Register r of four rows: lane l holds the pair 4 r + l of each. The lanes of 16 rows then make whole rows of the panel.

struct FeatureBytes {  // of 4 rows of 16 bytes, for registers 2 half and 2 half + 1
  uint8_t at[64] = {};
  constexpr explicit FeatureBytes(int half) {
    for (int i = 0; i < 64; ++i) {
      const int lane = i / 16, rows = i / 8 % 2 * 2, byte = i % 8;
      if (byte < 4) at[i] = uint8_t(16 * (rows + byte % 2) + 4 * (2 * half + byte / 2) + lane);
    }
  }
};

QLORA_INLINE __m512i four_rows(const uint8_t* packed, int64_t stride) {
  const auto row = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i * stride)); };
  __m512i bytes = _mm512_castsi128_si512(row(0));
  bytes = _mm512_inserti32x4(bytes, row(1), 1);
  bytes = _mm512_inserti32x4(bytes, row(2), 2);
  return _mm512_inserti32x4(bytes, row(3), 3);
}

// Four registers, one of every four rows, to rows of a panel: lane l of each becomes row l.
QLORA_INLINE void store_lanes(__m512i a, __m512i b, __m512i c, __m512i d, char* panel) {
  const __m512i ab_low = _mm512_shuffle_i32x4(a, b, 0x44), ab_high = _mm512_shuffle_i32x4(a, b, 0xee);
  const __m512i cd_low = _mm512_shuffle_i32x4(c, d, 0x44), cd_high = _mm512_shuffle_i32x4(c, d, 0xee);
  _mm512_store_si512(panel, _mm512_shuffle_i32x4(ab_low, cd_low, 0x88));
  _mm512_store_si512(panel + kPanelBytes, _mm512_shuffle_i32x4(ab_low, cd_low, 0xdd));
  _mm512_store_si512(panel + 2 * kPanelBytes, _mm512_shuffle_i32x4(ab_high, cd_high, 0x88));
  _mm512_store_si512(panel + 3 * kPanelBytes, _mm512_shuffle_i32x4(ab_high, cd_high, 0xdd));
}

void decode_features(const PackedRows& rows, const Codebook& codebook, void* panel) {
  alignas(64) static constexpr FeatureBytes kBytes[2] = {FeatureBytes(0), FeatureBytes(1)};
  const BF16Lanes lanes(codebook);
  const __m512i nibbles = _mm512_set1_epi64(0x18081c0c10001404);  // 4, 20, 0, 16, 12, 28, 8, 24
  const __m512i row_of = _mm512_set4_epi32(0x30303030, 0x20202020, 0x10101010, 0);
  const __m512i bytes[2] = {_mm512_load_si512(kBytes[0].at), _mm512_load_si512(kBytes[1].at)};
  auto* out = static_cast<char*>(panel);
  for (int64_t part = 0; part < rows.parts; ++part) {
    const float* absmax = rows.absmax + part;
    __m512i table[4][2];
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const float* of = absmax + 4 * q * rows.parts;
      table[q][0] = lanes.table(of[0], of[rows.parts]);
      table[q][1] = lanes.table(of[2 * rows.parts], of[3 * rows.parts]);
    }
    for (const uint8_t *packed = rows.packed + 32 * part, *end = packed + 32; packed < end; packed += 16) {
      __m512i word[4][4];  // [register][rows]
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const __m512i four = four_rows(packed + 4 * q * rows.stride, rows.stride);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m512i index = indices(four, bytes[half], nibbles, row_of);
          word[2 * half][q] = _mm512_permutex2var_epi16(table[q][0], index, table[q][1]);
          word[2 * half + 1][q] = _mm512_permutex2var_epi16(table[q][0], _mm512_srli_epi16(index, 8), table[q][1]);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r, out += 4 * kPanelBytes)
        store_lanes(word[r][0], word[r][1], word[r][2], word[r][3], out);
    }
  }
}

// --- rows are elements of the sum ------------------------------------------------------------------------------------------
// Two rows alternate: register v holds the features from 16 v on.

struct SumBytes {  // of 2 rows of 32 bytes, for registers 2 half and 2 half + 1
  uint8_t at[64] = {};
  constexpr explicit SumBytes(int half) {
    for (int i = 0; i < 64; ++i) {
      const int byte = i % 8;
      if (byte < 4) at[i] = uint8_t(32 * (byte % 2) + 8 * (2 * half + byte / 2) + i / 8);
    }
  }
};

void decode_sum(const PackedRows& rows, const Codebook& codebook, void* panels, int64_t panel_bytes) {
  alignas(64) static constexpr SumBytes kBytes[2] = {SumBytes(0), SumBytes(1)};
  const BF16Lanes lanes(codebook);
  const __m512i nibbles = _mm512_set1_epi64(0x180810001c0c1404);  // 4, 20, 12, 28, 0, 16, 8, 24
  const __m512i row_of = _mm512_set1_epi32(0x10100000);
  const __m512i bytes[2] = {_mm512_load_si512(kBytes[0].at), _mm512_load_si512(kBytes[1].at)};
  for (int64_t row = 0; row < kPanelRows; row += 2) {
    const uint8_t* packed = rows.packed + row * rows.stride;
    const float* absmax = rows.absmax + row * rows.parts;
    char* out = static_cast<char*>(panels) + row / 2 * kPanelBytes;
    for (int64_t part = 0; part < rows.parts; ++part, packed += 32, ++absmax, out += panel_bytes) {
      const auto row_bytes = [&](int64_t offset) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed + offset));
      };
      const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(row_bytes(0)), row_bytes(rows.stride), 1);
      const __m512i table = lanes.table(absmax[0], absmax[rows.parts]);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m512i index = indices(both, bytes[half], nibbles, row_of);
        _mm512_store_si512(out + 128 * half, _mm512_permutexvar_epi16(index, table));
        _mm512_store_si512(out + 128 * half + 64, _mm512_permutexvar_epi16(_mm512_srli_epi16(index, 8), table));
      }
    }
  }
}
