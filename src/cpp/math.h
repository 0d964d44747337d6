// Scalar semantics, shared by host and device code: what one element does. The definition is
// python/qlora_ref/reference/; these are its lines in C++. Compile without FMA contraction and without fast-math.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "types.h"

// Always inlined on the host too: a copy compiled for AVX-512 must never be the one the linker keeps for everybody.
#if defined(__CUDACC__)
#define QLORA_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define QLORA_HD static __forceinline
#else
#define QLORA_HD static inline __attribute__((always_inline, unused))
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

QLORA_HD float f16_to_float(uint16_t x) {
  uint32_t sign = uint32_t(x & 0x8000u) << 16, magnitude = x & 0x7fffu;
  if (magnitude < 0x0400u) return bits_to_float(sign | float_to_bits(float(magnitude) * 0x1p-24f));  // subnormal, 0
  uint32_t exponent = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;  // Inf and NaN keep the largest exponent
  return bits_to_float(sign | ((magnitude << 13) + exponent));
}

// Round to nearest even, subnormals kept, overflow to Inf; NaN becomes a quiet NaN.
QLORA_HD uint16_t float_to_f16(float x) {
  uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and above
  if (bits < 0x38800000u) {  // below 2^-14: 0.5 has the ulp of a subnormal f16, so this addition rounds
    return uint16_t(sign | (float_to_bits(bits_to_float(bits) + 0.5f) - 0x3f000000u));
  }
  return uint16_t(sign | ((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13));
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
