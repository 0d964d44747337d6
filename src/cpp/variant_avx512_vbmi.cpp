// AVX-512 VBMI and VBMI2: dequantize to 16-bit numbers, double quantization. The rest is variant_avx512.cpp's.
#include <immintrin.h>

#include <cstring>

#include "element.h"
#include "variant.h"

namespace qlora {
namespace {

constexpr float kNaN = __builtin_nanf("");

#include "variant_avx512_decode64.h"

template <DType dtype>
struct Decoder {
  __m512 levels;

  explicit Decoder(const Codebook& codebook) : levels(_mm512_loadu_ps(codebook.levels)) {}
  QLORA_INLINE void operator()(const uint8_t* packed, const float* absmax, int64_t whole, uint16_t* out) const {
    decode_words(packed, table16<dtype>(levels, absmax), whole, out);
  }
};

#include "variant_avx512_double_quant.h"
#include "variant_avx512_key_search.h"

template <int N>
QLORA_INLINE void encode(const KeySearch& search, const float* thresholds, const NestedGroup& group,
                         const float* absmax, uint8_t* codes) {
  __m512i key[N], count[N];
  __mmask32 tied[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    key[i] = search.keys(group.normalized(absmax + 32 * i), group.normalized(absmax + 32 * i + 16));
  }
  search(key, count, tied);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    const __m256i bytes = _mm256_max_epu8(_mm512_cvtepi16_epi8(count[i]), _mm256_set1_epi8(char(group.lowest)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + 32 * i), bytes);
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    for (uint32_t lanes = tied[i]; lanes; lanes &= lanes - 1) {
      const int at = 32 * i + __builtin_ctz(lanes);
      const float s = (absmax[at] - group.mean) * group.inverse;
      codes[at] = uint8_t(KeySearch::count_from(codes[at], thresholds, s));
    }
  }
}

void double_quantize(const float* absmax, int64_t n, int64_t nested_block_size, float mean, const Map8& map,
                     uint8_t* codes, float* nested_absmax) {
  const KeySearch search(map.thresholds);
  const auto few = [&](const NestedGroup& group, const float* from, uint8_t* to) {
    encode<1>(search, map.thresholds, group, from, to);
  };
  double_quantize_groups(absmax, n, nested_block_size, mean, map, codes, nested_absmax,
                         [&](const NestedGroup& group, const float* from, int64_t size, uint8_t* to) {
                           for (; size >= 256; size -= 256, from += 256, to += 256) {
                             encode<8>(search, map.thresholds, group, from, to);
                           }
                           for (; size >= 32; size -= 32, from += 32, to += 32) few(group, from, to);
                           padded<32>(from, size, to, [&](const float* x, uint8_t* codes) { few(group, x, codes); });
                         });
}

bool supported() {
  return avx512.supported() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
}

void extend(Variant& variant) {
  variant.dequantize[int(DType::bf16)] = dequantize<DType::bf16, Decoder<DType::bf16>>;
  variant.dequantize_groups[int(DType::bf16)] = dequantize_groups<DType::bf16, Decoder<DType::bf16>>;
  variant.dequantize[int(DType::f16)] = dequantize<DType::f16, Decoder<DType::f16>>;
  variant.dequantize_groups[int(DType::f16)] = dequantize_groups<DType::f16, Decoder<DType::f16>>;
  variant.double_quantize = double_quantize;
}

}  // namespace

const InstructionSet avx512_vbmi = {"avx512_vbmi", supported, extend};

}  // namespace qlora
