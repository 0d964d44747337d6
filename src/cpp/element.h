// float32, bfloat16 and float16 in memory, float32 in registers.
#pragma once
#include "math.h"

namespace qlora {

template <DType dtype>
struct Element;

template <>
struct Element<DType::f32> {
  using type = float;
  QLORA_HD float load(float x) { return x; }
  QLORA_HD float store(float x) { return x; }
};

template <>
struct Element<DType::bf16> {
  using type = uint16_t;
  QLORA_HD float load(uint16_t x) { return bf16_to_float(x); }
  QLORA_HD uint16_t store(float x) { return float_to_bf16(x); }
};

template <>
struct Element<DType::f16> {
  using type = uint16_t;
  QLORA_HD float load(uint16_t x) { return f16_to_float(x); }
  QLORA_HD uint16_t store(float x) { return float_to_f16(x); }
};

}  // namespace qlora
