// AVX512-BF16: products of bfloat16 pairs added in float32 (vdpbf16ps). The rest is variant_avx512.cpp's.
//
// vdpbf16ps and vcvtne2ps2bf16 take subnormals as zero: a weight or product below 2^-126 counts as 0 here, in the linear
// layer only (class BOUND). oneDNN's bfloat16 product, torch's, does the same.
#include <immintrin.h>

#include "element.h"
#include "variant.h"

namespace qlora {
namespace {

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

Variant make_variant() {
  Variant variant = avx512_variant;
  variant.name = "avx512_bf16";
  variant.supported = [] { return avx512_variant.supported() && __builtin_cpu_supports("avx512bf16"); };
  variant.linear_rows[int(DType::bf16)] = linear_rows<BF16Lanes, DType::bf16>;
  variant.linear_prepare[int(DType::bf16)] = linear_prepare<BF16Lanes, DType::bf16>;
  variant.linear_x_bytes[int(DType::bf16)] = 2;
  return variant;
}

}  // namespace

const Variant avx512_bf16_variant = make_variant();

}  // namespace qlora
