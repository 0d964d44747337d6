// The inner loops in portable C++: the reference, element by element. The other variants equal this one bit for bit.
#include <cstdint>
#include <cstring>

#include "element.h"
#include "variant.h"

namespace qlora {
namespace {

constexpr int64_t kLargestBlock = 4096;
constexpr uint32_t kInfinityBits = 0x7f800000u;
const float kNaN = bits_to_float(0x7fc00000u);

// reference block_absmax of x (n): NaN if an element is not finite, 0 below the smallest normal number.
float block_absmax(const float* x, int64_t n, bool with_sign) {
  uint32_t largest = 0;  // magnitudes order like their bits, and NaN above Inf
  for (int64_t i = 0; i < n; ++i) {
    uint32_t magnitude = float_to_bits(x[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  if (largest >= kInfinityBits) return kNaN;
  float absmax = bits_to_float(largest);
  if (absmax < kSmallestNormal) return 0.0f;
  if (!with_sign) return absmax;
  for (int64_t i = 0; i < n; ++i) {
    if (x[i] == absmax) return absmax;
  }
  return -absmax;
}

template <DType dtype>
AbsmaxSum quantize(const void* x_, int64_t n, int64_t block_size, const Codebook& codebook, uint8_t* packed,
                   float* absmax) {
  using E = Element<dtype>;
  auto* x = static_cast<const typename E::type*>(x_);
  float block[kLargestBlock];
  uint8_t codes[kLargestBlock];
  AbsmaxSum sum = {0, bits_to_float(kInfinityBits)};
  for (int64_t start = 0; start < n; start += block_size) {
    int64_t size = n - start < block_size ? n - start : block_size;
    for (int64_t i = 0; i < size; ++i) block[i] = E::load(x[start + i]);
    float scale = block_absmax(block, size, codebook.signed_absmax);
    *absmax++ = scale;
    sum.sum += scale;
    if (scale > 0.0f && scale < sum.smallest) sum.smallest = scale;
    if (scale == 0.0f) {
      for (int64_t i = 0; i < size; ++i) codes[i] = codebook.zero_code;
    } else {
      float inverse = 1.0f / scale;
      for (int64_t i = 0; i < size; ++i) {
        codes[i] = codebook.order[count_below(normalize(block[i], scale, inverse), codebook.thresholds, 15)];
      }
    }
    if (size % 2) codes[size] = codebook.zero_code;
    for (int64_t i = 0; i < size; i += 2) *packed++ = uint8_t(codes[i] << 4 | codes[i + 1]);
  }
  return codebook.signed_absmax ? AbsmaxSum{kNaN, kNaN} : sum;
}

template <DType dtype>
void dequantize(const uint8_t* packed, const BlockAbsmax& absmax, int64_t n, int64_t block_size,
                const Codebook& codebook, void* out_) {
  using E = Element<dtype>;
  auto* out = static_cast<typename E::type*>(out_);
  for (int64_t start = 0, block = 0; start < n; start += block_size, ++block) {
    int64_t size = n - start < block_size ? n - start : block_size;
    const float scale = *absmax_of(absmax, block);
    typename E::type table[16];  // a block has only 16 different values
    for (int code = 0; code < 16; ++code) table[code] = E::store(codebook.levels[code] * scale);
    for (int64_t i = 0; i < size / 2; ++i) {
      *out++ = table[packed[i] >> 4];
      *out++ = table[packed[i] & 15];
    }
    if (size % 2) *out++ = table[packed[size / 2] >> 4];
    packed += block_size / 2;
  }
}

void double_quantize_group(const float* absmax, int64_t n, float mean, const Map8& map, uint8_t* codes,
                           float* nested_absmax) {
  float d[kLargestBlock];
  for (int64_t i = 0; i < n; ++i) d[i] = absmax[i] - mean;
  float scale = block_absmax(d, n, false);
  *nested_absmax = scale;
  int lowest = 0;  // the lowest entry that reconstructs to >= 0; 0 if none does (NaN)
  while (lowest < 256 && !(double_decode(map.levels[lowest], scale, mean) >= 0.0f)) ++lowest;
  if (lowest == 256) lowest = 0;
  float inverse = 1.0f / scale;
  for (int64_t i = 0; i < n; ++i) {
    int code = scale == 0.0f ? map.zero_code : count_below_255(map.thresholds, normalize(d[i], scale, inverse));
    codes[i] = uint8_t(code > lowest ? code : lowest);
  }
}

void double_quantize(const float* absmax, int64_t n, int64_t nested_block_size, float mean, const Map8& map,
                     uint8_t* codes, float* nested_absmax) {
  for (int64_t first = 0; first < n; first += nested_block_size) {
    int64_t size = n - first < nested_block_size ? n - first : nested_block_size;
    double_quantize_group(absmax + first, size, mean, map, codes + first, nested_absmax++);
  }
}

void nested_values(const float* map, float nested_absmax, float mean, float* values) {
  for (int code = 0; code < 256; ++code) values[code] = double_decode(map[code], nested_absmax, mean);
}

// --- AdamW ---------------------------------------------------------------------------------------------------------------

#include "adamw_tile.h"

struct AdamWLanes : OneFloat {
  using Key = uint32_t;
  using Code = int;
  static constexpr int kCount = 1, kTogether = 4;

  template <DType dtype>
  QLORA_HD float load(const typename Element<dtype>::type* x) {
    return Element<dtype>::load(*x);
  }
  template <DType dtype>
  QLORA_HD void store(typename Element<dtype>::type* out, float x) {
    *out = Element<dtype>::store(x);
  }
  QLORA_HD Key larger(Key key, float x) { return magnitude_key(x) > key ? magnitude_key(x) : key; }
  QLORA_HD uint32_t largest(Key key) { return key; }
  template <int lowest>
  QLORA_HD void store_codes(uint8_t* codes, int code, float x) {
    *codes = uint8_t(x > 0.0f && code < lowest ? lowest : code);
  }
  struct Levels {
    const float* levels;
    explicit Levels(const float* levels) : levels(levels) {}
    float operator()(const uint8_t* codes) const { return levels[*codes]; }
  };
  struct Search {
    const float* thresholds;
    explicit Search(const float* thresholds) : thresholds(thresholds) {}
    // One step of all, then the next: alone, a value would wait for its own comparisons (or branch).
    void operator()(const float (&s)[kTogether], int (&count)[kTogether]) const {
      for (int& each : count) each = 0;
      for (int step = 128; step > 0; step /= 2) {
        for (int k = 0; k < kTogether; ++k) count[k] += thresholds[count[k] + step - 1] < s[k] ? step : 0;
      }
    }
  };
};

}  // namespace

const Variant scalar_variant = {
    "scalar",
    {quantize<DType::f32>, quantize<DType::bf16>, quantize<DType::f16>},
    {dequantize<DType::f32>, dequantize<DType::bf16>, dequantize<DType::f16>},
    {},
    double_quantize,
    nested_values,
    {},
    {},
    {},
    {},
    adamw_loops<AdamWLanes>,
    {},
};

}  // namespace qlora
