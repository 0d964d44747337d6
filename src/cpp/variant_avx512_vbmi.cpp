// AVX-512 VBMI: dequantize to 16-bit numbers. The rest is variant_avx512.cpp's.
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

bool supported() { return avx512.supported() && __builtin_cpu_supports("avx512vbmi"); }

void extend(Variant& variant) {
  variant.dequantize[int(DType::bf16)] = dequantize<DType::bf16, Decoder<DType::bf16>>;
  variant.dequantize[int(DType::f16)] = dequantize<DType::f16, Decoder<DType::f16>>;
}

}  // namespace

const InstructionSet avx512_vbmi = {"avx512_vbmi", supported, extend};

}  // namespace qlora
