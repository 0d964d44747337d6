// y = x W'^T + bias for few tokens: cuts the rows into pieces, one thread each; the loop is the variant's.
#include "kernels.h"
#include "parallel.h"
#include "variant.h"

namespace qlora {

bool can_linear_4bit_forward(DType dtype, int64_t cols, int64_t block_size) {
  return variant().linear_rows[int(dtype)] && block_size >= 64 && cols % block_size == 0;
}

void linear_4bit_forward(const void* x, DType dtype, int64_t m, const Weight4bit& weight, const Codebook& codebook,
                         const void* bias, void* y) {
  const Variant& isa = variant();
  std::vector<char> prepared(size_t(m * weight.cols * isa.linear_x_bytes[int(dtype)]));
  isa.linear_prepare[int(dtype)](x, m, weight.cols, prepared.data());
  int block_shift = 0;
  while ((int64_t(64) << block_shift) < weight.block_size) ++block_shift;
  LinearRows call{&weight, &codebook, prepared.data(), m, bias, y, block_shift};
  parallel_for(weight.rows, 4 * kLinearRows, [&](int64_t begin, int64_t end) {
    int64_t blocks = kLinearRows * weight.cols / weight.block_size;
    std::vector<float> values(weight.absmax.codes ? size_t(256 * (blocks / weight.absmax.nested_block_size + 2)) : 0);
    struct alignas(64) Register {
      char bytes[64];
    };
    std::vector<Register> sums(size_t(kLinearRows * m));
    LinearScratch scratch{values.data(), 0, 0, sums.data()};
    isa.linear_rows[int(dtype)](call, scratch, begin, end);
  });
}

}  // namespace qlora
