// Scalar semantics, shared by host and device code: what one element does. The definition is
// python/qlora_ref/reference/; these are its lines in C++. Compile without FMA contraction and without fast-math.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "types.h"

#ifdef __CUDACC__
#define QLORA_HD __host__ __device__ __forceinline__
#else
#define QLORA_HD inline
#endif

namespace qlora {

constexpr float kSmallestNormal = 0x1p-126f;
constexpr float kLargestInvertible = 0x1p126f;  // above it 1/x is subnormal

QLORA_HD float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

QLORA_HD uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

QLORA_HD bool is_finite(float x) { return (float_to_bits(x) & 0x7f800000u) != 0x7f800000u; }

QLORA_HD float bf16_to_float(uint16_t x) { return bits_to_float(uint32_t(x) << 16); }

// Round to nearest even; NaN becomes the quiet NaN 0x7fc0 (as torch on the CPU).
QLORA_HD uint16_t float_to_bf16(float x) {
  uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// s = x / absmax as the reference computes it: times the reciprocal, unless that would be subnormal.
// `inverse` is 1 / absmax, computed once a block.
QLORA_HD float normalize(float x, float absmax, float inverse) {
  return fabsf(absmax) > kLargestInvertible ? x / absmax : x * inverse;
}

// Number of thresholds strictly below s; 0 for NaN.
QLORA_HD int count_below(float s, const float* thresholds, int n) {
  int count = 0;
  for (int i = 0; i < n; ++i) count += thresholds[i] < s;
  return count;
}

// absmax' = map[code] * nested_absmax + mean: two roundings (the build switches contraction off).
QLORA_HD float double_decode(float map_level, float nested_absmax, float mean) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(__fmul_rn(map_level, nested_absmax), mean);
#else
  float product = map_level * nested_absmax;
  return product + mean;
#endif
}

}  // namespace qlora
