// The blocks of a quantization: absmax of each, and what needs no arithmetic on its elements. A variant brings, above
// the include, largest_magnitude and contains, and the encoder of a block.
//
// Include in an unnamed namespace of a variant file (see variant.h about inlining).

// The exact sum of positive numbers that lie within 16 octaves, the first one in the middle, in integers: the loop over
// the blocks waits for vectors, and an addition of floats would be one more of those.
struct ExactSum {
  static constexpr int64_t kMost = int64_t(1) << 25;  // numbers: of 24 + 15 bits
  uint64_t sum = 0;                                   // in units of 2^(lowest - 150)
  int lowest = 0;
  uint32_t shifts = 0;  // all bits that occurred; at most 15 if all numbers fitted

  QLORA_INLINE void add(uint32_t bits) {  // of a normal number, or Inf and NaN, which never fit
    const int exponent = int(bits >> 23);
    if (!sum) lowest = exponent < 246 ? exponent - 8 : 238;
    const uint32_t shift = uint32_t(exponent - lowest);
    shifts |= shift;
    sum += uint64_t((bits & 0x7fffff) | 0x800000) << (shift & 15);
  }
  // What `last`, of some more numbers, makes of it
  QLORA_INLINE AbsmaxSum with(const AbsmaxSum& last) const {
    if (!sum) return last;
    const uint64_t bits = uint64_t(lowest - 150 + 1023) << 52;
    double unit;
    memcpy(&unit, &bits, sizeof unit);
    const double smallest = unit * 0x1p23;
    return {double(sum) * unit + last.sum, last.smallest < smallest ? last.smallest : smallest};
  }
};

// encode(x, 1 / absmax, packed) writes the codes of one block.
template <DType dtype, class Encode>
QLORA_INLINE AbsmaxSum quantize_each_block(const typename Element<dtype>::type* x, int64_t n, int64_t block_size,
                                           const Codebook& codebook, uint8_t* packed, float* absmax,
                                           const Encode& encode) {
  ExactSum sum;
  bool known = !codebook.signed_absmax && n / block_size < ExactSum::kMost;
  for (; n >= block_size; n -= block_size, x += block_size, packed += block_size / 2, ++absmax) {
    uint32_t largest = largest_magnitude<dtype>(x, block_size);
    float scale = largest >= kInfinityBits ? kNaN : bits_to_float(largest);
    if (scale < kSmallestNormal) {
      *absmax = 0.0f;
      memset(packed, codebook.zero_code * 0x11, size_t(block_size / 2));
      continue;
    }
    if (scale > kLargestInvertible) {
      scalar_variant.quantize[int(dtype)](x, block_size, block_size, codebook, packed, absmax);
      known = false;
      continue;
    }
    if (codebook.signed_absmax && largest < kInfinityBits && !contains<dtype>(x, block_size, scale)) scale = -scale;
    *absmax = scale;
    sum.add(largest);
    encode(x, 1.0f / scale, packed);
  }
  AbsmaxSum last = {0, bits_to_float(kInfinityBits)};
  if (n) last = scalar_variant.quantize[int(dtype)](x, n, block_size, codebook, packed, absmax);
  return known && sum.shifts <= 15 ? sum.with(last) : AbsmaxSum{kNaN, kNaN};
}
