// Quantize and dequantize: cuts the tensor into runs of whole blocks, one thread each; the loops are the variant's.
#include "kernels.h"
#include "parallel.h"
#include "variant.h"

namespace qlora {
namespace {

// Elements worth a thread (parallel.h), multiples of every block size.
constexpr int64_t kDequantizeGrain = 128 * 1024, kQuantizeGrain = 32 * 1024;

int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// One element, for the head of a row that starts in the middle of a byte.
void dequantize_head(const Weight4bit& weight, const BlockAbsmax& absmax, const Codebook& codebook, int64_t i,
                     DType dtype, char* out) {
  uint8_t pair[1] = {uint8_t(weight.packed[i / 2] << 4)};  // the low nibble, as a first element
  variant().dequantize[int(dtype)](pair, absmax, 1, weight.block_size, codebook, out);
}

// Block sizes are powers of two, and a shift costs a twentieth of a division.
int log2_of(int64_t power) {
  int shift = 0;
  while ((int64_t(1) << shift) < power) ++shift;
  return shift;
}

// Where a thread finds absmax. Under double quantization absmax' takes only 256 values in a nested group: computed once,
// and looked up by code inside the loops.
class Scales {
 public:
  explicit Scales(const Absmax& absmax) : absmax_(absmax), isa_(variant()), shift_(log2_of(absmax.nested_block_size)) {}

  BlockAbsmax from(int64_t block) {
    if (!absmax_.codes) return {absmax_.absmax + block, nullptr};
    const int64_t group = block >> shift_;
    if (group != group_) isa_.nested_values(absmax_.map, absmax_.nested_absmax[group], *absmax_.mean, values_);
    group_ = group;
    return {values_, absmax_.codes + block};
  }
  // How many blocks from(block) covers.
  int64_t reach(int64_t block) const {
    constexpr int64_t kAll = INT64_MAX / 4096;  // times a block size is no overflow
    return absmax_.codes ? (((block >> shift_) + 1) << shift_) - block : kAll;
  }

 private:
  const Absmax& absmax_;
  const Variant& isa_;
  const int shift_;
  int64_t group_ = -1;  // whose values these are
  alignas(64) float values_[256];
};

// Elements first .. first + count of the flattened weight -> out (count) of `dtype`, on the calling thread.
void dequantize_run(const Weight4bit& weight, const Codebook& codebook, int64_t first, int64_t count, DType dtype,
                    void* out_) {
  const Variant& isa = variant();
  char* out = static_cast<char*>(out_);
  Scales scales(weight.absmax);
  const int shift = log2_of(weight.block_size);
  while (count > 0) {
    const int64_t block = first >> shift, offset = first & (weight.block_size - 1);
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

// Part of some rows, each `row_stride` elements after the one before.
void dequantize_rows(const Weight4bit& weight, const Codebook& codebook, int64_t first_row, int64_t rows,
                     int64_t first_col, int64_t cols, char* out, DType dtype, int64_t row_stride) {
  if (cols == weight.cols && row_stride == cols) {  // then the rows are one run
    parallel_for(rows * cols, kDequantizeGrain, [&](int64_t begin, int64_t end) {
      dequantize_run(weight, codebook, first_row * cols + begin, end - begin, dtype, out + begin * element_size(dtype));
    });
    return;
  }
  int64_t grain = std::max<int64_t>(1, kDequantizeGrain / std::max<int64_t>(1, cols));
  parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      dequantize_run(weight, codebook, (first_row + row) * weight.cols + first_col, cols, dtype,
                     out + row * row_stride * element_size(dtype));
    }
  });
}

}  // namespace

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
