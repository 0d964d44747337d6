// The blocks of a quantization: absmax of each, and what needs no arithmetic on its elements. A variant brings, above
// the include, largest_magnitude and contains, and the encoder of a block.
//
// Include in an unnamed namespace of a variant file (see variant.h about inlining).

// encode(x, 1 / absmax, packed) writes the codes of one block.
template <DType dtype, class Encode>
QLORA_INLINE void quantize_each_block(const typename Element<dtype>::type* x, int64_t n, int64_t block_size,
                                      const Codebook& codebook, uint8_t* packed, float* absmax, const Encode& encode) {
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
      continue;
    }
    if (codebook.signed_absmax && largest < kInfinityBits && !contains<dtype>(x, block_size, scale)) scale = -scale;
    *absmax = scale;
    encode(x, 1.0f / scale, packed);
  }
  if (n) scalar_variant.quantize[int(dtype)](x, n, block_size, codebook, packed, absmax);
}
