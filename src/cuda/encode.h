// Scalar semantics of the GPU quantizer that src/cpp/math.h does not have: the absmax as an integer key, and the bin
// table that finds a code with one comparison. Host and device; tests/test_cuda_emulated.py holds it to the reference.
#pragma once
#include <cmath>

#include "../cpp/math.h"
#include "../cpp/types.h"

namespace qlora::cuda {

// A block's absmax is the maximum of these keys: |x| in the upper 31 bits (float order is integer order there; NaN and
// Inf come out on top, so nothing can hide them), and under a signed absmax the lowest bit prefers +m over -m.
QLORA_HD uint32_t absmax_key(float x, bool keep_sign) {
  uint32_t bits = float_to_bits(x);
  uint32_t key = bits << 1;
  return keep_sign ? key | (~bits >> 31) : key;
}

// NaN for a block that is not finite, 0 for a zero or subnormal block (reference: block_absmax).
QLORA_HD float absmax_from_key(uint32_t key, bool keep_sign) {
  uint32_t magnitude = key >> 1;
  if (magnitude >= 0x7f800000u) return bits_to_float(0x7fc00000u);
  if (magnitude < 0x00800000u) return 0.0f;
  bool negative = keep_sign && (key & 1u) == 0;
  return bits_to_float(magnitude | (negative ? 0x80000000u : 0u));
}

constexpr int kBins = 32;  // one a lane
constexpr float kBinScale = 15.999f;

// Bin of s in [-1, 1]: floor(s * 15.999) + 16, which is 0..31. Zero is a bin edge. One FFMA.RZ on the device: 2^23 + 16
// plus the product, truncated, has the integer in its lowest bits. The product is exact in float64: both sides agree.
QLORA_HD int bin_of(float s) {
#ifdef __CUDA_ARCH__
  return int(float_to_bits(__fmaf_rz(s, kBinScale, 0x1p23f + 16.0f)) & 31u);
#else
  return (int(std::floor(double(s) * double(kBinScale))) + 16) & 31;
#endif
}

// code(s) = s > threshold[bin] ? codes[bin] >> 4 : codes[bin] & 15
//
// Exact for *any* non-decreasing bin_of, if no bin holds two thresholds: a threshold in a lower bin than s lies below
// s, one in a higher bin does not, and the one in the same bin is compared with. Of our types only fp4_e3m0, whose
// thresholds crowd around zero, has such a bin; it takes the search (`usable` false).
struct BinTable {
  float threshold[kBins];
  uint8_t codes[kBins];
  bool usable;
};

inline BinTable make_bins(const Codebook& codebook) {
  BinTable table;
  table.usable = true;
  int below = 0;  // thresholds in lower bins
  for (int bin = 0; bin < kBins; ++bin) {
    int inside = 0;
    table.threshold[bin] = INFINITY;
    for (float t : codebook.thresholds) {
      if (t > 1.0f || bin_of(t) != bin) continue;  // +inf marks an unused position
      table.threshold[bin] = t;
      ++inside;
    }
    uint8_t low = codebook.order[below];
    uint8_t high = inside ? codebook.order[below + 1] : low;
    table.codes[bin] = uint8_t(high << 4 | low);
    table.usable = table.usable && inside <= 1;
    below += inside;
  }
  return table;
}

}  // namespace qlora::cuda
