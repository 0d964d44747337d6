// AVX512-BF16: products of bfloat16 pairs added in float32 (vdpbf16ps), and dequantize to bfloat16. The rest is
// variant_avx512_vbmi.cpp's: every processor with BF16 has VBMI too, but for one (Cooper Lake), which runs avx512.
//
// vdpbf16ps and vcvtne2ps2bf16 take subnormals as zero: a weight or product below 2^-126 counts as 0 here, in the linear
// layer only (class BOUND). oneDNN's bfloat16 product, torch's, does the same.
#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "element.h"
#include "variant.h"

namespace qlora {
namespace {

constexpr float kNaN = __builtin_nanf("");

// --- dequantize --------------------------------------------------------------------------------------------------------

#include "variant_avx512_decode64.h"

// The table by two instructions where none of its values is subnormal, Inf or NaN: vcvtne2ps2bf16 would not round those
// as the reference does. absmax >= 2^-100 and nonzero levels >= 2^-26 in magnitude make sure of it.
struct Decoder {
  __m512 levels;
  int exponents;  // how many, as upper halves of floats

  explicit Decoder(const Codebook& codebook) : levels(_mm512_loadu_ps(codebook.levels)) {
    __m512 magnitude = _mm512_abs_ps(levels);
    __mmask16 tiny = _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(0x1p-26f), _CMP_LT_OQ);
    exponents = tiny & _mm512_cmp_ps_mask(magnitude, _mm512_setzero_ps(), _CMP_NEQ_OQ) ? 0 : 0x7f80 - kLowest;
  }
  QLORA_INLINE void operator()(const uint8_t* packed, const float* absmax, int64_t whole, uint16_t* out) const {
    if (__builtin_expect(uint16_t((upper_half(absmax) & 0x7fff) - kLowest) < exponents, 1)) {
      __m512 scaled = _mm512_mul_ps(levels, _mm512_set1_ps(*absmax));
      decode_words(packed, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(scaled, scaled)), whole, out);
    } else {
      decode_words(packed, table16<DType::bf16>(levels, absmax), whole, out);
    }
  }
  static constexpr int kLowest = 0x0d80;  // of 2^-100
};

// --- linear --------------------------------------------------------------------------------------------------------------

#include "linear_rows.h"

// 128 weights a step, 32 a register, as words of 4 nibbles shifted by 4v. The words of the first 64 weights lie in the lower
// half, those of the next 64 in the upper half; vpermw reads five index bits, so one register holds the tables of both
// blocks and bit 4 says which.
struct BF16Lanes {
  using X = uint16_t;
  using Bytes = __m512i;
  using Table = __m512i;
  using Weights = __m512bh;
  using Sum = __m512;
  static constexpr int kSpan = 2, kRows = 4, kTokens = 6, kFew = 12, kVectors = 4, kVectorBytes = 64, kStepBytes = 256;

  __m512 levels;
  __m512i nibble, upper;

  QLORA_INLINE explicit BF16Lanes(const Codebook& codebook) {
    levels = _mm512_loadu_ps(codebook.levels);
    nibble = _mm512_set1_epi16(15);
    upper = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  }
  QLORA_INLINE Table table(float first, float second) const {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_mul_ps(levels, _mm512_set1_ps(second)),
                                                         _mm512_mul_ps(levels, _mm512_set1_ps(first))));
  }
  static QLORA_INLINE Bytes load(const uint8_t* packed) { return _mm512_loadu_si512(packed); }
  static QLORA_INLINE Bytes load_half(const uint8_t* packed) {
    return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
  }
  QLORA_INLINE Weights weights(Bytes bytes, Table table, int v) const {
    __m512i shifted = v ? _mm512_srli_epi16(bytes, 4 * v) : bytes;
    __m512i index = _mm512_ternarylogic_epi32(shifted, nibble, upper, 0xEA);  // (shifted & nibble) | upper
    return reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(index, table));
  }
  static QLORA_INLINE __m512bh load_x(const char* x) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(x)); }
  static QLORA_INLINE void store(char* out, Weights w) { _mm512_store_si512(out, reinterpret_cast<__m512i>(w)); }
  static QLORA_INLINE Sum zero() { return _mm512_setzero_ps(); }
  static QLORA_INLINE Sum add(Sum sum, Weights w, __m512bh x) { return _mm512_dpbf16_ps(sum, w, x); }
  static QLORA_INLINE float reduce(Sum sum) { return _mm512_reduce_add_ps(sum); }

  // Lane j of register v is word j, nibble v; the low nibble of a byte is its second element. So register v gathers the
  // elements 4j + (v ^ 1) of the step.
  static QLORA_INLINE void reorder(const uint16_t* x, uint16_t* out) {
    alignas(64) static constexpr uint16_t kEvery4th[32] = {0,  4,  8,  12, 16, 20, 24, 28,   //
                                                           32, 36, 40, 44, 48, 52, 56, 60};  // the upper half is unused
    const __m512i every4th = _mm512_load_si512(kEvery4th);
    __m512i in[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) in[i] = _mm512_loadu_si512(x + 32 * i);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      __m512i index = _mm512_add_epi16(every4th, _mm512_set1_epi16(short(v ^ 1)));
      __m512i low = _mm512_permutex2var_epi16(in[0], index, in[1]),
              high = _mm512_permutex2var_epi16(in[2], index, in[3]);
      _mm512_storeu_si512(out + 32 * v, _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1));
    }
  }
};

// --- products with many tokens --------------------------------------------------------------------------------------------

#include "variant_avx512_product.h"

struct BF16Product {
  static constexpr int kElements = 2;  // a dword
  static constexpr int kOutputBytes = 2;
  static constexpr int64_t kRun = INT64_MAX;  // bfloat16 is coarser than any error of the sum

  static QLORA_INLINE __m512 add(__m512 sum, __m512i x, __m512i w) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
  }
  static QLORA_INLINE __m512i load_dwords(const char* rows, int64_t first) {
    return _mm512_loadu_si512(rows + 2 * first);
  }
  // 64 features of two rows, in pairs
  static QLORA_INLINE void interleave(const char* rows, int64_t first, int64_t stride, char* out) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512i a = _mm512_loadu_si512(rows + 2 * (first + 32 * half));
      __m512i b = _mm512_loadu_si512(rows + 2 * (first + stride + 32 * half));
      _mm512_store_si512(out + 128 * half, pairs_of_words(a, b, 0));
      _mm512_store_si512(out + 128 * half + 64, pairs_of_words(a, b, 1));
    }
  }
  static QLORA_INLINE void store(const ProductPiece& piece, int64_t token, const __m512* sum) {
    auto* y = static_cast<uint16_t*>(piece.y) + token * piece.y_stride;
    auto* bias = static_cast<const uint16_t*>(piece.bias);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __mmask32 mask = first_bits(piece.features - 32 * half);
      __m512 low = sum[2 * half], high = sum[2 * half + 1];
      if (bias) add_words(low, high, _mm512_maskz_loadu_epi16(mask, bias + 32 * half));
      if (piece.onto) add_words(low, high, _mm512_maskz_loadu_epi16(mask, y + 32 * half));
      _mm512_mask_storeu_epi16(y + 32 * half, mask, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    }
  }
  static QLORA_INLINE void add_words(__m512& low, __m512& high, __m512i words) {
    low = _mm512_add_ps(low, widen(_mm512_castsi512_si256(words)));
    high = _mm512_add_ps(high, widen(_mm512_extracti64x4_epi64(words, 1)));
  }
  static QLORA_INLINE __m512 widen(__m256i words) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
  }
};

#include "variant_avx512_bf16_panel.h"

// --- LoRA ----------------------------------------------------------------------------------------------------------------

#include "variant_avx512_bf16_lora.h"

bool supported() { return avx512_vbmi.supported() && __builtin_cpu_supports("avx512bf16"); }

void extend(Variant& variant) {
  variant.dequantize[int(DType::bf16)] = dequantize<DType::bf16, Decoder>;
  variant.dequantize_groups[int(DType::bf16)] = dequantize_groups<DType::bf16, Decoder>;
  variant.linear_rows[int(DType::bf16)] = linear_rows<BF16Lanes, DType::bf16>;
  variant.linear_prepare[int(DType::bf16)] = linear_prepare<BF16Lanes, DType::bf16>;
  variant.linear_x_bytes[int(DType::bf16)] = 2;
  variant.product[int(DType::bf16)] = {
      2,         pack_features<BF16Product>, pack_sum<BF16Product>, multiply<BF16Product>, nullptr, decode_features,
      decode_sum};
  variant.lora[int(DType::bf16)] = bf16_lora;
}

}  // namespace

const InstructionSet avx512_bf16 = {"avx512_bf16", supported, extend};

}  // namespace qlora
