// Quantize and dequantize: cuts the tensor into runs of whole blocks, one thread each; the loops are the variant's.
#include "dequantize_run.h"
#include "parallel.h"

namespace qlora {
namespace {

// Elements worth a thread (parallel.h), multiples of every block size.
constexpr int64_t kDequantizeGrain = 128 * 1024, kQuantizeGrain = 32 * 1024;

// One element, for the head of a row that starts in the middle of a byte.
void dequantize_head(const Weight4bit& weight, const BlockAbsmax& absmax, const Codebook& codebook, int64_t i,
                     DType dtype, char* out) {
  uint8_t pair[1] = {uint8_t(weight.packed[i / 2] << 4)};  // the low nibble, as a first element
  variant().dequantize[int(dtype)](pair, absmax, 1, weight.block_size, codebook, out);
}

// Part of some rows, each `row_stride` elements after the one before.
void dequantize_rows(const Weight4bit& weight, const Codebook& codebook, int64_t first_row, int64_t rows,
                     int64_t first_col, int64_t cols, char* out, DType dtype, int64_t row_stride) {
  if (cols == weight.cols && row_stride == cols) {  // then the rows are one run
    parallel_for(rows * cols, kDequantizeGrain, [&](int64_t begin, int64_t end) {
      RunScales scales(weight);
      dequantize_run(weight, codebook, scales, first_row * cols + begin, end - begin, dtype,
                     out + begin * element_size(dtype));
    });
    return;
  }
  int64_t grain = std::max<int64_t>(1, kDequantizeGrain / std::max<int64_t>(1, cols));
  parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
    RunScales scales(weight);
    for (int64_t row = begin; row < end; ++row) {
      dequantize_run(weight, codebook, scales, (first_row + row) * weight.cols + first_col, cols, dtype,
                     out + row * row_stride * element_size(dtype));
    }
  });
}

}  // namespace

void dequantize_run(const Weight4bit& weight, const Codebook& codebook, RunScales& scales, int64_t first, int64_t count,
                    DType dtype, void* out_) {
  const Variant& isa = variant();
  char* out = static_cast<char*>(out_);
  const int shift = scales.block_shift;
  while (count > 0) {
    const int64_t block = first >> shift, offset = first & (weight.block_size - 1);
    const int64_t groups =
        offset || !isa.dequantize_groups[int(dtype)] ? 0 : scales.whole_groups(block, count >> shift);
    if (groups) {
      isa.dequantize_groups[int(dtype)](weight.packed + first / 2, weight.absmax, block >> scales.group_shift, groups,
                                        weight.block_size, codebook, out);
      const int64_t size = groups << scales.group_shift << shift;
      first += size;
      count -= size;
      out += size * element_size(dtype);
      continue;
    }
    const BlockAbsmax absmax = scales.from(block);
    int64_t size = offset ? weight.block_size - offset : scales.reach(block) << shift;
    size = first % 2 ? 1 : std::min(size, count);
    if (first % 2) {
      dequantize_head(weight, absmax, codebook, first, dtype, out);
    } else {
      isa.dequantize[int(dtype)](weight.packed + first / 2, absmax, size, weight.block_size, codebook, out);
    }
    first += size;
    count -= size;
    out += size * element_size(dtype);
  }
}

void quantize_4bit(const void* x, DType dtype, int64_t n, int64_t block_size, const Codebook& codebook, uint8_t* packed,
                   float* absmax) {
  const Variant& isa = variant();
  parallel_for(n, kQuantizeGrain, [&](int64_t begin, int64_t end) {
    auto* from = static_cast<const char*>(x) + begin * element_size(dtype);
    isa.quantize[int(dtype)](from, end - begin, block_size, codebook, packed + begin / 2, absmax + begin / block_size);
  });
}

void dequantize_4bit(const Weight4bit& weight, const Codebook& codebook, void* out, DType dtype, int64_t row_stride) {
  dequantize_rows(weight, codebook, 0, weight.rows, 0, weight.cols, static_cast<char*>(out), dtype, row_stride);
}

void dequantize_region(const Weight4bit& weight, const Codebook& codebook, int64_t first_row, int64_t rows,
                       int64_t first_col, int64_t cols, void* out, DType dtype) {
  dequantize_rows(weight, codebook, first_row, rows, first_col, cols, static_cast<char*>(out), dtype, cols);
}

}  // namespace qlora
