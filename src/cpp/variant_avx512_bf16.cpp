// AVX512-BF16: products of bfloat16 pairs added in float32 (vdpbf16ps), and dequantize to bfloat16. The rest is
// variant_avx512_vbmi.cpp's: every processor with BF16 has VBMI too, but for one (Cooper Lake), which runs avx512.
//
// vdpbf16ps and vcvtne2ps2bf16 take subnormals as zero: a weight or product below 2^-126 counts as 0 here, in the linear
// layer only (class BOUND). oneDNN's bfloat16 product, torch's, does the same.
#include <immintrin.h>

#include <cstring>

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

#include "linear_tile.h"

// 32 weights a register, as words of 4 nibbles: lower half shifted by 8v, upper half by 8v + 4.
struct BF16Lanes {
  using X = uint16_t;
  using Bytes = __m512i;
  using Table = __m512i;
  using Weights = __m512bh;
  using Sum = __m512;
  static constexpr int kRows = 4, kTokens = 6, kVectors = 2, kVectorBytes = 64, kGroupBytes = 128;

  __m512 levels;
  __m512i shift[2];

  inline __attribute__((always_inline)) explicit BF16Lanes(const Codebook& codebook) {
    levels = _mm512_loadu_ps(codebook.levels);
    for (int v = 0; v < 2; ++v) {
      shift[v] = _mm512_inserti64x4(_mm512_set1_epi16(short(8 * v)), _mm256_set1_epi16(short(8 * v + 4)), 1);
    }
  }
  inline __attribute__((always_inline)) Table table(float absmax) const {
    __m512 scaled = _mm512_mul_ps(levels, _mm512_set1_ps(absmax));
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(scaled, scaled));
  }
  static inline __attribute__((always_inline)) Bytes load(const uint8_t* packed) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
  }
  inline __attribute__((always_inline)) Weights weights(Bytes bytes, Table table, int v) const {
    return reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(_mm512_srlv_epi16(bytes, shift[v]), table));
  }
  static inline __attribute__((always_inline)) __m512bh load_x(const char* x) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(x));
  }
  static inline __attribute__((always_inline)) void store(char* out, Weights w) {
    _mm512_store_si512(out, reinterpret_cast<__m512i>(w));
  }
  static inline __attribute__((always_inline)) Sum zero() { return _mm512_setzero_ps(); }
  static inline __attribute__((always_inline)) Sum add(Sum sum, Weights w, __m512bh x) {
    return _mm512_dpbf16_ps(sum, w, x);
  }
  static inline __attribute__((always_inline)) float reduce(Sum sum) { return _mm512_reduce_add_ps(sum); }

  static inline __attribute__((always_inline)) uint16_t convert(uint16_t x) { return x; }
  // Which element of 64 belongs to lane j: word j % 16 of 16, nibble 2v (+ 1: the low nibble is the second element).
  static inline __attribute__((always_inline)) int source(int j) {
    int v = j / 32, upper = j / 16 % 2;
    return 4 * (j % 16) + 2 * v + (upper ? 0 : 1);
  }
};

bool supported() { return avx512_vbmi.supported() && __builtin_cpu_supports("avx512bf16"); }

void extend(Variant& variant) {
  variant.dequantize[int(DType::bf16)] = dequantize<DType::bf16, Decoder>;
  variant.linear_rows[int(DType::bf16)] = linear_rows<BF16Lanes, DType::bf16>;
  variant.linear_prepare[int(DType::bf16)] = linear_prepare<BF16Lanes, DType::bf16>;
  variant.linear_x_bytes[int(DType::bf16)] = 2;
}

}  // namespace

const InstructionSet avx512_bf16 = {"avx512_bf16", supported, extend};

}  // namespace qlora
