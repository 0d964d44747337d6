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

void double_dequantize(const Absmax& absmax, int64_t n, float* out) {
  const Variant& isa = variant();
  parallel_for(n, 16 * 1024, [&](int64_t begin, int64_t end) {
    isa.double_dequantize(absmax, begin, end - begin, out + begin);
  });
}

}  // namespace qlora
