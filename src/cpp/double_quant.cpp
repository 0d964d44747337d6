// Double quantization: one nested group (or a run of blocks) a piece; the loops are the variant's.
#include "kernels.h"
#include "parallel.h"
#include "variant.h"

namespace qlora {

void double_quantize(const float* absmax, int64_t n, float mean, int64_t nested_block_size, const Map8& map,
                     uint8_t* codes, float* nested_absmax) {
  const Variant& isa = variant();
  int64_t groups = (n + nested_block_size - 1) / nested_block_size;
  int64_t grain = std::max<int64_t>(1, 4096 / nested_block_size);
  parallel_for(groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      int64_t first = group * nested_block_size, size = std::min(nested_block_size, n - first);
      isa.double_quantize(absmax + first, size, mean, map, codes + first, nested_absmax + group);
    }
  });
}

void quantize_4bit_nested(const void* x, DType dtype, int64_t n, int64_t block_size, const Codebook& codebook,
                          float mean, int64_t nested_block_size, const Map8& map, uint8_t* packed,
                          uint8_t* absmax_codes, float* nested_absmax) {
  const Variant& isa = variant();
  const int64_t group_size = block_size * nested_block_size, element_size = dtype == DType::f32 ? 4 : 2;
  const int64_t groups = (n + group_size - 1) / group_size;
  parallel_for(groups, std::max<int64_t>(1, 32 * 1024 / group_size), [&](int64_t begin, int64_t end) {
    float absmax[4096];  // of one group, the largest nested_block_size
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * group_size, size = std::min(group_size, n - first);
      const int64_t blocks = (size + block_size - 1) / block_size;
      isa.quantize[int(dtype)](static_cast<const char*>(x) + first * element_size, size, block_size, codebook,
                               packed + first / 2, absmax);
      isa.double_quantize(absmax, blocks, mean, map, absmax_codes + group * nested_block_size, nested_absmax + group);
    }
  });
}

void double_dequantize(const Absmax& absmax, int64_t n, float* out) {
  const Variant& isa = variant();
  parallel_for(n, 16 * 1024,
               [&](int64_t begin, int64_t end) { isa.double_dequantize(absmax, begin, end - begin, out + begin); });
}

}  // namespace qlora
