// AVX2, FMA, F16C: quantize, dequantize, linear, AdamW. Double quantization and the rests are variant_scalar.cpp's.
#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "element.h"
#include "variant.h"

namespace qlora {
namespace {

constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr float kNaN = __builtin_nanf("");

QLORA_INLINE __m256i load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
QLORA_INLINE __m128i load_bytes16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

template <DType dtype>
QLORA_INLINE __m256 load8(const typename Element<dtype>::type* x) {
  if constexpr (dtype == DType::f32) return _mm256_loadu_ps(x);
  if constexpr (dtype == DType::f16) return _mm256_cvtph_ps(load_bytes16(x));
  if constexpr (dtype == DType::bf16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_bytes16(x)), 16));
  }
}

// --- quantize ----------------------------------------------------------------------------------------------------------

QLORA_INLINE uint32_t largest_of(__m256i largest) {
  __m128i half = _mm_max_epu32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4e));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0xb1));
  return uint32_t(_mm_cvtsi128_si32(half));
}

template <DType dtype>
uint32_t largest_magnitude(const typename Element<dtype>::type* x, int64_t size) {
  __m256i largest = _mm256_setzero_si256();
  for (int64_t i = 0; i < size; i += 8) {
    __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(load8<dtype>(x + i)), _mm256_set1_epi32(0x7fffffff));
    largest = _mm256_max_epu32(largest, magnitude);
  }
  return largest_of(largest);
}

template <DType dtype>
bool contains(const typename Element<dtype>::type* x, int64_t size, float value) {
  for (int64_t i = 0; i < size; i += 8) {
    if (_mm256_movemask_ps(_mm256_cmp_ps(load8<dtype>(x + i), _mm256_set1_ps(value), _CMP_EQ_OQ))) return true;
  }
  return false;
}

#include "quantize_tile.h"

template <DType dtype>
AbsmaxSum quantize(const void* x_, int64_t n, int64_t block_size, const Codebook& codebook, uint8_t* packed,
                   float* absmax) {
  using T = typename Element<dtype>::type;
  auto* x = static_cast<const T*>(x_);
  const __m256i code_of = _mm256_broadcastsi128_si256(load_bytes16(codebook.order));
  return quantize_each_block<dtype>(
      x, n, block_size, codebook, packed, absmax,
      [&](const T* x, float inverse, uint8_t* packed) __attribute__((always_inline)) {
        for (int64_t i = 0; i < block_size; i += 8) {
          __m256 s = _mm256_mul_ps(load8<dtype>(x + i), _mm256_set1_ps(inverse));
          __m256i count = _mm256_setzero_si256();
#pragma GCC unroll 15
          for (int t = 0; t < 15; ++t) {
            __m256 above = _mm256_cmp_ps(_mm256_set1_ps(codebook.thresholds[t]), s, _CMP_LT_OQ);
            count = _mm256_sub_epi32(count, _mm256_castps_si256(above));
          }
          __m256i code = _mm256_shuffle_epi8(code_of, count);  // in the low byte of a dword
          // even elements to the high nibble: byte 0 of each qword = code0 << 4 | code1
          __m256i pair = _mm256_or_si256(_mm256_slli_epi64(_mm256_and_si256(code, _mm256_set1_epi64x(15)), 4),
                                         _mm256_and_si256(_mm256_srli_epi64(code, 32), _mm256_set1_epi64x(15)));
          const __m256i gather = _mm256_setr_epi8(0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                                  -1, -1, 0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
          __m256i bytes = _mm256_shuffle_epi8(pair, gather);
          int32_t four =
              _mm_cvtsi128_si32(_mm_or_si128(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
          memcpy(packed + i / 2, &four, 4);
        }
      });
}

// --- dequantize --------------------------------------------------------------------------------------------------------

// Round to nearest even by integer arithmetic; the bfloat16 is the upper half of each dword, the lower half is noise.
QLORA_INLINE __m256i round_bf16(__m256 x) {
  __m256i bits = _mm256_castps_si256(x);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}

// The 16 values of a block.
struct Levels {
  __m256 low, high;

  Levels() = default;
  explicit Levels(const Codebook& codebook)
      : low(_mm256_loadu_ps(codebook.levels)), high(_mm256_loadu_ps(codebook.levels + 8)) {}
  QLORA_INLINE Levels(__m256 low, __m256 high) : low(low), high(high) {}

  QLORA_INLINE Levels scaled(float absmax) const {
    __m256 scale = _mm256_set1_ps(absmax);
    return {_mm256_mul_ps(low, scale), _mm256_mul_ps(high, scale)};
  }
  // Every NaN the one that rounds to bfloat16's 0x7fc0.
  Levels with_one_nan() const {
    const __m256 nan = _mm256_set1_ps(kNaN);
    return {_mm256_blendv_ps(low, nan, _mm256_cmp_ps(low, low, _CMP_UNORD_Q)),
            _mm256_blendv_ps(high, nan, _mm256_cmp_ps(high, high, _CMP_UNORD_Q))};
  }
  // Each dword of `index` chooses by its lowest 4 bits.
  QLORA_INLINE __m256 operator[](__m256i index) const {
    __m256 chosen = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 becomes the sign
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), chosen);
  }
};

// The 16 values as 16-bit words, lower bytes in one register and upper bytes in the other, in both lanes.
template <DType dtype>
QLORA_INLINE void byte_tables(const Levels& levels, float absmax, __m256i& lower, __m256i& upper) {
  Levels scaled = levels.scaled(absmax);
  __m128i words[2];
  if constexpr (dtype == DType::f16) {
    words[0] = _mm256_cvtps_ph(scaled.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    words[1] = _mm256_cvtps_ph(scaled.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
    if (!is_finite(absmax)) scaled = scaled.with_one_nan();
    __m256i low = _mm256_srli_epi32(round_bf16(scaled.low), 16), high = _mm256_srli_epi32(round_bf16(scaled.high), 16);
    words[0] = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    words[1] = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
  const __m128i mask = _mm_set1_epi16(0xff);
  lower = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(words[0], mask), _mm_and_si128(words[1], mask)));
  upper = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(words[0], 8), _mm_srli_epi16(words[1], 8)));
}

// `whole` elements of one block, a multiple of 32.
template <DType dtype>
QLORA_INLINE void dequantize_block(const uint8_t* packed, float absmax, int64_t whole, const Levels& levels,
                                   typename Element<dtype>::type* out) {
  if constexpr (dtype == DType::f32) {
    const __m256i nibble = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    Levels table = levels.scaled(absmax);
    for (int64_t i = 0; i < whole; i += 8) {
      int32_t four;
      memcpy(&four, packed + i / 2, 4);
      _mm256_storeu_ps(out + i, table[_mm256_srlv_epi32(_mm256_set1_epi32(four), nibble)]);
    }
  } else {
    __m256i lower, upper;
    byte_tables<dtype>(levels, absmax, lower, upper);
    const __m128i mask = _mm_set1_epi8(15);
    for (int64_t i = 0; i < whole; i += 32) {
      __m128i bytes = load_bytes16(packed + i / 2);
      __m128i first = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask), second = _mm_and_si128(bytes, mask);
      __m256i index = _mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second));
      __m256i l = _mm256_shuffle_epi8(lower, index), u = _mm256_shuffle_epi8(upper, index);
      __m256i a = _mm256_unpacklo_epi8(l, u), b = _mm256_unpackhi_epi8(l, u);  // elements 0-7 16-23, 8-15 24-31
      auto* to = reinterpret_cast<__m256i*>(out + i);
      _mm256_storeu_si256(to, _mm256_permute2x128_si256(a, b, 0x20));
      _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(a, b, 0x31));
    }
  }
}

template <DType dtype>
void dequantize(const uint8_t* packed, const BlockAbsmax& absmax, int64_t n, int64_t block_size,
                const Codebook& codebook, void* out_) {
  auto* out = static_cast<typename Element<dtype>::type*>(out_);
  const Levels levels(codebook);
  for (int64_t block = 0; n > 0; n -= block_size, out += block_size, packed += block_size / 2, ++block) {
    int64_t size = n < block_size ? n : block_size, whole = size & ~int64_t(31);
    const float* scale = absmax_of(absmax, block);
    dequantize_block<dtype>(packed, *scale, whole, levels, out);
    if (whole < size) {
      scalar_variant.dequantize[int(dtype)](packed + whole / 2, {scale, nullptr}, size - whole, block_size, codebook,
                                            out + whole);
    }
  }
}

// --- AdamW ---------------------------------------------------------------------------------------------------------------

#include "variant_avx2_adamw.h"

// --- linear --------------------------------------------------------------------------------------------------------------

#include "linear_rows.h"

// 8 float32 weights a register, as dwords of 8 nibbles, shifted by 4v.
template <DType dtype>
struct F32Lanes {
  using X = float;
  using Bytes = __m256i;
  using Table = Levels;
  using Weights = __m256;
  using Sum = __m256;
  static constexpr int kSpan = 1, kRows = 2, kTokens = 4, kFew = 4, kVectors = 8, kVectorBytes = 32, kStepBytes = 256;

  Levels levels;

  QLORA_INLINE explicit F32Lanes(const Codebook& codebook) : levels(codebook) {}
  QLORA_INLINE Table table(float absmax) const {
    Levels scaled = levels.scaled(absmax);
    if constexpr (dtype == DType::f16) {
      constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
      return {_mm256_cvtph_ps(_mm256_cvtps_ph(scaled.low, mode)), _mm256_cvtph_ps(_mm256_cvtps_ph(scaled.high, mode))};
    } else if constexpr (dtype == DType::bf16) {
      if (!is_finite(absmax)) scaled = scaled.with_one_nan();
      const __m256i upper = _mm256_set1_epi32(int(0xffff0000u));
      return {_mm256_castsi256_ps(_mm256_and_si256(round_bf16(scaled.low), upper)),
              _mm256_castsi256_ps(_mm256_and_si256(round_bf16(scaled.high), upper))};
    } else {
      return scaled;
    }
  }
  static QLORA_INLINE Bytes load(const uint8_t* packed) { return load_bytes(packed); }
  QLORA_INLINE Weights weights(Bytes bytes, const Table& table, int v) const {
    return table[_mm256_srli_epi32(bytes, 4 * v)];
  }
  static QLORA_INLINE __m256 load_x(const char* x) { return _mm256_loadu_ps(reinterpret_cast<const float*>(x)); }
  static QLORA_INLINE void store(char* out, Weights w) { _mm256_store_ps(reinterpret_cast<float*>(out), w); }
  static QLORA_INLINE Sum zero() { return _mm256_setzero_ps(); }
  static QLORA_INLINE Sum add(Sum sum, Weights w, __m256 x) { return _mm256_fmadd_ps(w, x, sum); }
  static QLORA_INLINE float reduce(Sum sum) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
  }
  static QLORA_INLINE float convert(typename Element<dtype>::type x) { return Element<dtype>::load(x); }
  static QLORA_INLINE void reorder(const typename Element<dtype>::type* x, float* out) {
    reorder_by_source<F32Lanes>(x, out);
  }
  // Which element of 64 belongs to lane j: dword j % 8, nibble v = j / 8, where the low nibble is the second element.
  static QLORA_INLINE int source(int j) { return 8 * (j % 8) + (j / 8 ^ 1); }
};

template <DType dtype>
constexpr auto f32_rows = linear_rows<F32Lanes<dtype>, dtype>;
template <DType dtype>
constexpr auto f32_prepare = linear_prepare<F32Lanes<dtype>, dtype>;

bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

void extend(Variant& variant) {
  variant.quantize[0] = quantize<DType::f32>;
  variant.quantize[1] = quantize<DType::bf16>;
  variant.quantize[2] = quantize<DType::f16>;
  variant.dequantize[0] = dequantize<DType::f32>;
  variant.dequantize[1] = dequantize<DType::bf16>;
  variant.dequantize[2] = dequantize<DType::f16>;
  variant.linear_rows[0] = f32_rows<DType::f32>;
  variant.linear_rows[1] = f32_rows<DType::bf16>;
  variant.linear_rows[2] = f32_rows<DType::f16>;
  variant.linear_prepare[0] = f32_prepare<DType::f32>;
  variant.linear_prepare[1] = f32_prepare<DType::bf16>;
  variant.linear_prepare[2] = f32_prepare<DType::f16>;
  for (int& bytes : variant.linear_x_bytes) bytes = 4;
  variant.adamw = adamw_loops<AdamWLanes>;
}

}  // namespace

const InstructionSet avx2 = {"avx2", supported, extend};

}  // namespace qlora
