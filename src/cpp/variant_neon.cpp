// AArch64 with what every such processor has (Advanced SIMD, fused multiply-add): quantize, dequantize, double
// quantization, linear. Bits as variant_scalar.cpp, which also gets the rests.
//
// The one table look-up of this instruction set, `tbl`, chooses bytes: 16 of them by 16 indices, or 32. So a table of
// floats is four tables of bytes (two for 16-bit numbers), looked up by the same index and zipped together again.
#include <arm_neon.h>

#include <cstring>
#include <type_traits>

#include "element.h"
#include "variant.h"

namespace qlora {
namespace {

constexpr uint32_t kInfinityBits = 0x7f800000u;
const float kNaN = bits_to_float(0x7fc00000u);

// 16 floats in order.
struct Floats {
  float32x4_t part[4];
};

QLORA_INLINE Floats load16(const float* x) {
  return {{vld1q_f32(x), vld1q_f32(x + 4), vld1q_f32(x + 8), vld1q_f32(x + 12)}};
}

QLORA_INLINE Floats times(const Floats& x, float factor) {
  return {{vmulq_n_f32(x.part[0], factor), vmulq_n_f32(x.part[1], factor), vmulq_n_f32(x.part[2], factor),
           vmulq_n_f32(x.part[3], factor)}};
}

// The lowest byte of each of 16 dwords.
QLORA_INLINE uint8x16_t low_bytes(uint32x4_t a, uint32x4_t b, uint32x4_t c, uint32x4_t d) {
  uint16x8_t ab = vuzp1q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b));
  uint16x8_t cd = vuzp1q_u16(vreinterpretq_u16_u32(c), vreinterpretq_u16_u32(d));
  return vuzp1q_u8(vreinterpretq_u8_u16(ab), vreinterpretq_u8_u16(cd));
}

// 0xff where a < b.
QLORA_INLINE uint8x16_t below(const Floats& a, const Floats& b) {
  return low_bytes(vcltq_f32(a.part[0], b.part[0]), vcltq_f32(a.part[1], b.part[1]), vcltq_f32(a.part[2], b.part[2]),
                   vcltq_f32(a.part[3], b.part[3]));
}

// 16 words from their lower and their upper bytes.
QLORA_INLINE uint16x8x2_t zip_words(uint8x16_t lower, uint8x16_t upper) {
  return {{vreinterpretq_u16_u8(vzip1q_u8(lower, upper)), vreinterpretq_u16_u8(vzip2q_u8(lower, upper))}};
}

// 4 floats from their lower and their upper words: the first 4 of 8, or the last.
QLORA_INLINE float32x4_t zip_first(uint16x8_t lower, uint16x8_t upper) {
  return vreinterpretq_f32_u16(vzip1q_u16(lower, upper));
}
QLORA_INLINE float32x4_t zip_last(uint16x8_t lower, uint16x8_t upper) {
  return vreinterpretq_f32_u16(vzip2q_u16(lower, upper));
}

QLORA_INLINE Floats zip_floats(uint16x8x2_t lower, uint16x8x2_t upper) {
  return {{zip_first(lower.val[0], upper.val[0]), zip_last(lower.val[0], upper.val[0]),
           zip_first(lower.val[1], upper.val[1]), zip_last(lower.val[1], upper.val[1])}};
}

// --- quantize ----------------------------------------------------------------------------------------------------------

template <DType dtype>
QLORA_INLINE Floats load16_as_float(const typename Element<dtype>::type* x) {
  if constexpr (dtype == DType::f32) {
    return load16(x);
  } else if constexpr (dtype == DType::bf16) {
    const uint16x8_t zero = vdupq_n_u16(0);
    return zip_floats({{zero, zero}}, {{vld1q_u16(x), vld1q_u16(x + 8)}});
  } else {
    float16x8_t a = vreinterpretq_f16_u16(vld1q_u16(x)), b = vreinterpretq_f16_u16(vld1q_u16(x + 8));
    return {{vcvt_f32_f16(vget_low_f16(a)), vcvt_high_f32_f16(a), vcvt_f32_f16(vget_low_f16(b)), vcvt_high_f32_f16(b)}};
  }
}

// Bits of the largest magnitude of a block (size a multiple of 32), widened to float32's.
template <DType dtype>
uint32_t largest_magnitude(const typename Element<dtype>::type* x, int64_t size) {
  if constexpr (dtype == DType::f32) {
    uint32x4_t a = vdupq_n_u32(0), b = a;
    for (int64_t i = 0; i < size; i += 8) {
      a = vmaxq_u32(a, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(x + i))));
      b = vmaxq_u32(b, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(x + i + 4))));
    }
    return vmaxvq_u32(vmaxq_u32(a, b));
  } else {
    const uint16x8_t magnitude = vdupq_n_u16(0x7fff);
    uint16x8_t a = vdupq_n_u16(0), b = a;
    for (int64_t i = 0; i < size; i += 16) {
      a = vmaxq_u16(a, vandq_u16(vld1q_u16(x + i), magnitude));
      b = vmaxq_u16(b, vandq_u16(vld1q_u16(x + i + 8), magnitude));
    }
    return float_to_bits(Element<dtype>::load(vmaxvq_u16(vmaxq_u16(a, b))));
  }
}

template <DType dtype>
bool contains(const typename Element<dtype>::type* x, int64_t size, float value) {
  const float32x4_t wanted = vdupq_n_f32(value);
  uint32x4_t found = vdupq_n_u32(0);
  for (int64_t i = 0; i < size; i += 16) {
    for (float32x4_t part : load16_as_float<dtype>(x + i).part) found = vorrq_u32(found, vceqq_f32(part, wanted));
  }
  return vmaxvq_u32(found);
}

// Number of 15 thresholds below s, by a table of 32 equal bins of [-1, 1] with at most one threshold each
// (variant_avx512.cpp has the same): the thresholds of lower bins, and the bin's own if it is below s.
struct Bins {
  uint8x16x2_t threshold[4];  // its bytes
  uint8x16x2_t in_lower_bins;
  bool usable = true;

  static QLORA_INLINE uint32x4_t bin(float32x4_t s) {  // 0 for NaN
    return vcvtq_u32_f32(vfmaq_f32(vdupq_n_f32(16.0f), s, vdupq_n_f32(15.99f)));
  }

  explicit Bins(const float* thresholds) {
    float threshold_of[32], ordered[16];
    uint32_t bin_of[16];
    uint8_t lower[32];
    memcpy(ordered, thresholds, 15 * sizeof(float));
    ordered[15] = bits_to_float(kInfinityBits);
    for (int t = 0; t < 16; t += 4) vst1q_u32(bin_of + t, bin(vld1q_f32(ordered + t)));
    for (uint32_t i = 0; i < 32; ++i) {
      threshold_of[i] = ordered[15];
      lower[i] = 0;
      for (int t = 0; t < 15 && is_finite(ordered[t]); ++t) {
        lower[i] += bin_of[t] < i;
        if (bin_of[t] != i) continue;
        usable = usable && !is_finite(threshold_of[i]);
        threshold_of[i] = ordered[t];
      }
    }
    auto* bytes = reinterpret_cast<const uint8_t*>(threshold_of);
    const uint8x16x4_t first = vld4q_u8(bytes), last = vld4q_u8(bytes + 64);
    for (int b = 0; b < 4; ++b) threshold[b] = {{first.val[b], last.val[b]}};
    in_lower_bins = {{vld1q_u8(lower), vld1q_u8(lower + 16)}};
  }

  QLORA_INLINE uint8x16_t operator()(const Floats& s) const {
    uint8x16_t index = low_bytes(bin(s.part[0]), bin(s.part[1]), bin(s.part[2]), bin(s.part[3]));
    uint16x8x2_t lower = zip_words(vqtbl2q_u8(threshold[0], index), vqtbl2q_u8(threshold[1], index));
    uint16x8x2_t upper = zip_words(vqtbl2q_u8(threshold[2], index), vqtbl2q_u8(threshold[3], index));
    return vsubq_u8(vqtbl2q_u8(in_lower_bins, index), below(zip_floats(lower, upper), s));  // - 0xff adds one
  }
};

// The same count by bisection, for tables with two thresholds in one bin (fp4_e3m0) and the coarse half of 255.
struct Bisection {
  uint8x16x4_t threshold;  // its bytes

  explicit Bisection(const float* thresholds15) {
    float all[16];
    memcpy(all, thresholds15, 15 * sizeof(float));
    all[15] = bits_to_float(kInfinityBits);
    threshold = vld4q_u8(reinterpret_cast<const uint8_t*>(all));
  }

  QLORA_INLINE uint8x16_t operator()(const Floats& s) const {
    uint8x16_t count = vdupq_n_u8(0);
    for (uint8_t step = 8; step; step /= 2) {
      uint8x16_t next = vaddq_u8(count, vdupq_n_u8(uint8_t(step - 1)));
      uint16x8x2_t lower = zip_words(vqtbl1q_u8(threshold.val[0], next), vqtbl1q_u8(threshold.val[1], next));
      uint16x8x2_t upper = zip_words(vqtbl1q_u8(threshold.val[2], next), vqtbl1q_u8(threshold.val[3], next));
      count = vaddq_u8(count, vandq_u8(below(zip_floats(lower, upper), s), vdupq_n_u8(step)));
    }
    return count;
  }
};

#include "quantize_tile.h"

template <DType dtype, class Count>
AbsmaxSum quantize_blocks(const void* x_, int64_t n, int64_t block_size, const Codebook& codebook, uint8_t* packed,
                          float* absmax, const Count& count_below_all) {
  using T = typename Element<dtype>::type;
  auto* x = static_cast<const T*>(x_);
  const uint8x16_t code_of = vld1q_u8(codebook.order);
  return quantize_each_block<dtype>(
      x, n, block_size, codebook, packed, absmax,
      [&](const T* x, float inverse, uint8_t* packed) __attribute__((always_inline)) {
        for (int64_t i = 0; i < block_size; i += 32) {
          uint8x16_t a = vqtbl1q_u8(code_of, count_below_all(times(load16_as_float<dtype>(x + i), inverse)));
          uint8x16_t b = vqtbl1q_u8(code_of, count_below_all(times(load16_as_float<dtype>(x + i + 16), inverse)));
          vst1q_u8(packed + i / 2, vsliq_n_u8(vuzp2q_u8(a, b), vuzp1q_u8(a, b), 4));  // even elements above odd ones
        }
      });
}

template <DType dtype>
AbsmaxSum quantize(const void* x, int64_t n, int64_t block_size, const Codebook& codebook, uint8_t* packed,
                   float* absmax) {
  Bins bins(codebook.thresholds);
  if (bins.usable) {
    return quantize_blocks<dtype>(x, n, block_size, codebook, packed, absmax, bins);
  } else {
    return quantize_blocks<dtype>(x, n, block_size, codebook, packed, absmax, Bisection(codebook.thresholds));
  }
}

// --- dequantize --------------------------------------------------------------------------------------------------------

// Round to nearest even by integer arithmetic (bfcvt is not in the base); the bfloat16 is the upper half of each dword.
QLORA_INLINE uint16x8_t round_bf16(float32x4_t x) {
  uint32x4_t bits = vreinterpretq_u32_f32(x);
  uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  return vreinterpretq_u16_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd));
}

// The 16 values of a block in `dtype`, as tables of their bytes.
template <DType dtype>
struct Values {
  uint8x16_t byte[dtype == DType::f32 ? 4 : 2];

  Values() = default;
  QLORA_INLINE Values(const Floats& levels, float absmax) {
    Floats x = times(levels, absmax);
    if constexpr (dtype == DType::f32) {
      uint16x8_t a = vreinterpretq_u16_f32(x.part[0]), b = vreinterpretq_u16_f32(x.part[1]);
      uint16x8_t c = vreinterpretq_u16_f32(x.part[2]), d = vreinterpretq_u16_f32(x.part[3]);
      split(vuzp1q_u16(a, b), vuzp1q_u16(c, d), byte);
      split(vuzp2q_u16(a, b), vuzp2q_u16(c, d), byte + 2);
    } else if constexpr (dtype == DType::bf16) {
      if (absmax != absmax) x = {{vdupq_n_f32(kNaN), vdupq_n_f32(kNaN), vdupq_n_f32(kNaN), vdupq_n_f32(kNaN)}};
      split(vuzp2q_u16(round_bf16(x.part[0]), round_bf16(x.part[1])),
            vuzp2q_u16(round_bf16(x.part[2]), round_bf16(x.part[3])), byte);
    } else {
      split(vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.part[0]), x.part[1])),
            vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.part[2]), x.part[3])), byte);
    }
  }

  static QLORA_INLINE void split(uint16x8_t a, uint16x8_t b, uint8x16_t* bytes) {
    bytes[0] = vuzp1q_u8(vreinterpretq_u8_u16(a), vreinterpretq_u8_u16(b));
    bytes[1] = vuzp2q_u8(vreinterpretq_u8_u16(a), vreinterpretq_u8_u16(b));
  }

  // Bytes b and b + 1 of the values that 16 codes choose.
  QLORA_INLINE uint16x8x2_t words(uint8x16_t codes, int b = 0) const {
    return zip_words(vqtbl1q_u8(byte[b], codes), vqtbl1q_u8(byte[b + 1], codes));
  }

  QLORA_INLINE void decode16(uint8x16_t codes, typename Element<dtype>::type* out) const {
    if constexpr (dtype == DType::f32) {
      Floats values = zip_floats(words(codes), words(codes, 2));
      for (int i = 0; i < 4; ++i) vst1q_f32(out + 4 * i, values.part[i]);
    } else {
      uint16x8x2_t values = words(codes);
      vst1q_u16(out, values.val[0]);
      vst1q_u16(out + 8, values.val[1]);
    }
  }
};

template <DType dtype>
void dequantize(const uint8_t* packed, const BlockAbsmax& absmax, int64_t n, int64_t block_size,
                const Codebook& codebook, void* out_) {
  auto* out = static_cast<typename Element<dtype>::type*>(out_);
  const Floats levels = load16(codebook.levels);
  for (int64_t block = 0; n > 0; n -= block_size, out += block_size, packed += block_size / 2, ++block) {
    const float* scale = absmax_of(absmax, block);
    const int64_t size = n < block_size ? n : block_size, whole = size & ~int64_t(31);
    const Values<dtype> values(levels, *scale);
    for (int64_t i = 0; i < whole; i += 32) {
      uint8x16_t bytes = vld1q_u8(packed + i / 2);
      uint8x16_t first = vshrq_n_u8(bytes, 4), second = vandq_u8(bytes, vdupq_n_u8(15));
      values.decode16(vzip1q_u8(first, second), out + i);
      values.decode16(vzip2q_u8(first, second), out + i + 16);
    }
    if (whole < size) {
      scalar_variant.dequantize[int(dtype)](packed + whole / 2, {scale, nullptr}, size - whole, block_size, codebook,
                                            out + whole);
    }
  }
}

// --- double quantization -------------------------------------------------------------------------------------------------

// The upper half of the bisection in registers, the lower half, without a gather, one element at a time.
void double_quantize_group(const float* absmax, int64_t n, float mean, const Map8& map, uint8_t* codes,
                           float* nested_absmax) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t magnitude = float_to_bits(absmax[i] - mean) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  float scale = largest >= kInfinityBits ? kNaN : bits_to_float(largest);
  if (!(scale >= kSmallestNormal && scale <= kLargestInvertible)) {  // rare: zero, NaN, huge
    scalar_variant.double_quantize(absmax, n, n, mean, map, codes, nested_absmax);
    return;
  }
  *nested_absmax = scale;
  int lowest = 0;
  while (lowest < 255 && !(double_decode(map.levels[lowest], scale, mean) >= 0.0f)) ++lowest;
  if (!(double_decode(map.levels[lowest], scale, mean) >= 0.0f)) lowest = 0;

  float every16th[15];
  for (int k = 0; k < 15; ++k) every16th[k] = map.thresholds[16 * k + 15];
  const Bisection coarse(every16th);
  const float inverse = 1.0f / scale;
  for (int64_t i = 0; i < n; i += 16) {
    const int size = n - i < 16 ? int(n - i) : 16;
    float s[16] = {};
    for (int j = 0; j < size; ++j) s[j] = (absmax[i + j] - mean) * inverse;
    uint8_t below16[16];
    vst1q_u8(below16, coarse(load16(s)));
    for (int j = 0; j < size; ++j) {
      int count = 16 * below16[j];
      for (int step = 8; step; step /= 2) count += map.thresholds[count + step - 1] < s[j] ? step : 0;
      codes[i + j] = uint8_t(count > lowest ? count : lowest);
    }
  }
}

void double_quantize(const float* absmax, int64_t n, int64_t nested_block_size, float mean, const Map8& map,
                     uint8_t* codes, float* nested_absmax) {
  for (int64_t first = 0; first < n; first += nested_block_size) {
    int64_t size = n - first < nested_block_size ? n - first : nested_block_size;
    double_quantize_group(absmax + first, size, mean, map, codes + first, nested_absmax++);
  }
}

// --- linear --------------------------------------------------------------------------------------------------------------

#include "linear_rows.h"

// A "register" of weights is two of 4 float32, added to the same sum.
struct Eight {
  float32x4_t a, b;
};

// The 32 bytes are four times 16 codes, upper nibbles and lower nibbles of each half; each makes two registers.
template <DType dtype>
struct F32Lanes {
  using X = float;
  using Bytes = uint8x16x2_t;
  using Table = Values<dtype>;
  using Weights = Eight;
  using Sum = float32x4_t;
  static constexpr int kSpan = 1, kRows = 2, kTokens = 6, kFew = 4, kVectors = 8, kVectorBytes = 32, kStepBytes = 256;

  Floats levels;

  QLORA_INLINE explicit F32Lanes(const Codebook& codebook) : levels(load16(codebook.levels)) {}
  QLORA_INLINE Table table(float absmax) const { return Table(levels, absmax); }
  static QLORA_INLINE Bytes load(const uint8_t* packed) { return {{vld1q_u8(packed), vld1q_u8(packed + 16)}}; }
  // The compiler sees that an even v and the next share their look-ups.
  static QLORA_INLINE Weights weights(Bytes bytes, const Table& table, int v) {
    uint8x16_t half = bytes.val[v / 4];
    uint8x16_t codes = v % 4 < 2 ? vshrq_n_u8(half, 4) : vandq_u8(half, vdupq_n_u8(15));
    uint16x8_t lower = table.words(codes).val[v % 2];
    if constexpr (dtype == DType::f32) {
      uint16x8_t upper = table.words(codes, 2).val[v % 2];
      return {zip_first(lower, upper), zip_last(lower, upper)};
    } else if constexpr (dtype == DType::bf16) {
      const uint16x8_t zero = vdupq_n_u16(0);
      return {zip_first(zero, lower), zip_last(zero, lower)};
    } else {
      float16x8_t values = vreinterpretq_f16_u16(lower);
      return {vcvt_f32_f16(vget_low_f16(values)), vcvt_high_f32_f16(values)};
    }
  }
  static QLORA_INLINE Weights load_x(const char* x) {
    auto* p = reinterpret_cast<const float*>(x);
    return {vld1q_f32(p), vld1q_f32(p + 4)};
  }
  static QLORA_INLINE void store(char* out, Weights w) {
    auto* p = reinterpret_cast<float*>(out);
    vst1q_f32(p, w.a);
    vst1q_f32(p + 4, w.b);
  }
  static QLORA_INLINE Sum zero() { return vdupq_n_f32(0.0f); }
  static QLORA_INLINE Sum add(Sum sum, Weights w, Weights x) { return vfmaq_f32(vfmaq_f32(sum, w.a, x.a), w.b, x.b); }
  static QLORA_INLINE float reduce(Sum sum) { return vaddvq_f32(sum); }
  static QLORA_INLINE float convert(typename Element<dtype>::type x) { return Element<dtype>::load(x); }
  static QLORA_INLINE void reorder(const typename Element<dtype>::type* x, float* out) {
    reorder_by_source<F32Lanes>(x, out);
  }
  // Which element of 64 belongs to lane j: 8 of the 16 codes in nibbles 1 or 0 of 16 bytes.
  static QLORA_INLINE int source(int j) {
    int v = j / 8, byte = 16 * (v / 4) + 8 * (v % 2) + j % 8;
    return 2 * byte + (v % 4 < 2 ? 0 : 1);
  }
};

void extend(Variant& variant) {
  variant.quantize[0] = quantize<DType::f32>;
  variant.quantize[1] = quantize<DType::bf16>;
  variant.quantize[2] = quantize<DType::f16>;
  variant.dequantize[0] = dequantize<DType::f32>;
  variant.dequantize[1] = dequantize<DType::bf16>;
  variant.dequantize[2] = dequantize<DType::f16>;
  variant.double_quantize = double_quantize;
  variant.linear_rows[0] = linear_rows<F32Lanes<DType::f32>, DType::f32>;
  variant.linear_rows[1] = linear_rows<F32Lanes<DType::bf16>, DType::bf16>;
  variant.linear_rows[2] = linear_rows<F32Lanes<DType::f16>, DType::f16>;
  variant.linear_prepare[0] = linear_prepare<F32Lanes<DType::f32>, DType::f32>;
  variant.linear_prepare[1] = linear_prepare<F32Lanes<DType::bf16>, DType::bf16>;
  variant.linear_prepare[2] = linear_prepare<F32Lanes<DType::f16>, DType::f16>;
  for (int& bytes : variant.linear_x_bytes) bytes = 4;
}

}  // namespace

// Supported wherever this file can be compiled.
const InstructionSet neon = {"neon", [] { return true; }, extend};

}  // namespace qlora
