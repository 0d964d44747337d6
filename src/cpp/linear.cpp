// y = x W'^T + bias: few tokens here, which cuts the rows into pieces, one thread each; many in product.cpp. The loops are
// the variant's.
#include "dequantize_run.h"
#include "kept_memory.h"
#include "parallel.h"
#include "product.h"

namespace qlora {
namespace {

constexpr int64_t kStepMax = 128;  // weights that a variant may take at once: x is padded to as many

// Up to here decoding in registers is faster than panels (product.cpp), by DType; where a variant has no panels, than
// decoding for torch's product, which for float16 is slow where it was tried.
constexpr int64_t kFewTokens = 32, kFewWithoutPanels[3] = {128, 128, 512};

bool few(DType dtype, int64_t m, int64_t cols, int64_t block_size) {
  const Variant& isa = variant();
  const bool can = isa.linear_rows[int(dtype)] && block_size >= 64 && cols % block_size == 0;
  return can && m <= (isa.product[int(dtype)].multiply ? kFewTokens : kFewWithoutPanels[int(dtype)]);
}

void linear_of_few(const void* x, DType dtype, int64_t m, const Weight4bit& weight, const Codebook& codebook,
                   const void* bias, void* y) {
  const Variant& isa = variant();
  const int64_t stride = (weight.cols + kStepMax - 1) / kStepMax * kStepMax * isa.linear_x_bytes[int(dtype)];
  static thread_local KeptMemory memory;
  char* prepared = memory.reserve(m * stride);  // what no step reads is not written
  isa.linear_prepare[int(dtype)](x, m, weight.cols, stride, prepared);
  LinearRows call{&weight, &codebook, prepared, stride, m, bias, y, log2_of(weight.block_size / 64)};
  const int64_t at_once = m > kManyTokens ? kLinearRows : kTileRows;
  const int64_t blocks = at_once * weight.cols / weight.block_size;
  int64_t slots = 1;  // no more than needed: they are used by turns and should stay in the first-level cache
  while (slots < blocks / weight.absmax.nested_block_size + 3) slots *= 2;
  parallel_for(weight.rows, 4 * kLinearRows, [&](int64_t begin, int64_t end) {
    static thread_local KeptMemory values, sums, chunk;
    const int64_t value_bytes = weight.absmax.codes ? slots * 256 * int64_t(sizeof(float)) : 0;
    LinearScratch scratch{reinterpret_cast<float*>(values.reserve(value_bytes)), slots - 1, 0,
                          sums.reserve(at_once * m * 64), chunk.reserve(kLinearChunkBytes)};
    isa.linear_rows[int(dtype)](call, scratch, begin, end);
  });
}

}  // namespace

bool can_linear_4bit_forward(DType dtype, int64_t m, int64_t cols, int64_t block_size) {
  return few(dtype, m, cols, block_size) || can_product(dtype, cols);
}

void linear_4bit_forward(const void* x, DType dtype, int64_t m, const Weight4bit& weight, const Codebook& codebook,
                         const void* bias, void* y, const ProductMore& more) {
  if (!few(dtype, m, weight.cols, weight.block_size)) {
    product(x, dtype, m, weight, codebook, bias, y, true, more);
    return;
  }
  linear_of_few(x, dtype, m, weight, codebook, bias, y);
  if (more.depth) add_product(dtype, m, weight.rows, y, more);
}
void linear_4bit_forward(const void* x, DType dtype, int64_t m, const Weight4bit& weight, const Codebook& codebook,
                         const void* bias, void* y) {
  linear_4bit_forward(x, dtype, m, weight, codebook, bias, y, {});
}

}  // namespace qlora
