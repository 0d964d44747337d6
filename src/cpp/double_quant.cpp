// Double quantization: one nested group (or a run of blocks) a piece; the loops are the variant's.
#include <limits>
#include <mutex>

#include "dequantize_run.h"
#include "parallel.h"

namespace qlora {

namespace {

// Where the variant does not know.
AbsmaxSum sum_of(const float* absmax, int64_t n) {
  double lanes[8] = {};  // independent, so that additions overlap
  AbsmaxSum all = {0, std::numeric_limits<double>::infinity()};
  bool negative = false;
  for (int64_t i = 0; i < n; ++i) {
    const double x = absmax[i];
    lanes[i % 8] += x;
    negative |= x < 0;
    if (x > 0 && x < all.smallest) all.smallest = x;
  }
  for (double lane : lanes) all.sum += lane;
  if (negative) all.sum = std::numeric_limits<double>::quiet_NaN();
  return all;
}

// Whether every partial sum of these numbers is exact in float64, so that no order of adding can change it: those of 16-bit
// dtypes have at most 11 bits, so all are multiples of a power of two that is no less than 2^-11 of the smallest.
bool is_exact(const AbsmaxSum& all, DType dtype) { return dtype != DType::f32 && all.sum < all.smallest * 0x1p42; }

// quantize_4bit, and the mean of its absmax; whether that is certain.
bool quantize_with_mean(const void* x, DType dtype, int64_t n, int64_t block_size, const Codebook& codebook,
                        uint8_t* packed, float* absmax, float* mean) {
  const Variant& isa = variant();
  std::mutex adding;
  AbsmaxSum all = {0, std::numeric_limits<double>::infinity()};
  parallel_for(n, 32 * 1024, [&](int64_t begin, int64_t end) {
    float* of_blocks = absmax + begin / block_size;
    AbsmaxSum part = isa.quantize[int(dtype)](static_cast<const char*>(x) + begin * element_size(dtype), end - begin,
                                              block_size, codebook, packed + begin / 2, of_blocks);
    if (part.sum != part.sum) part = sum_of(of_blocks, parts(end - begin, block_size));  // not known, or NaN
    const std::lock_guard<std::mutex> lock(adding);
    all = {all.sum + part.sum, std::min(all.smallest, part.smallest)};
  });
  // Two orders of adding m positive numbers differ by at most 2 (m - 1) 2^-53 of the sum; the rest covers the divisions.
  const double m = double((n + block_size - 1) / block_size), error = (m + 8) * 0x1p-52;
  *mean = float(all.sum * (1 - error) / m);
  if (*mean == float(all.sum * (1 + error) / m)) return true;
  *mean = float(all.sum / m);  // numbers of few bits often have their mean right between two float32
  return n > 0 && is_exact(all, dtype);
}

}  // namespace

bool quantize_4bit_double(const void* x, DType dtype, int64_t n, int64_t block_size, const Codebook& codebook,
                          int64_t nested_block_size, const Map8& map, uint8_t* packed, float* absmax, float* mean,
                          uint8_t* absmax_codes, float* nested_absmax) {
  if (!quantize_with_mean(x, dtype, n, block_size, codebook, packed, absmax, mean)) return false;
  double_quantize(absmax, (n + block_size - 1) / block_size, *mean, nested_block_size, map, absmax_codes,
                  nested_absmax);
  return true;
}

void double_quantize(const float* absmax, int64_t n, float mean, int64_t nested_block_size, const Map8& map,
                     uint8_t* codes, float* nested_absmax) {
  const Variant& isa = variant();
  int64_t groups = (n + nested_block_size - 1) / nested_block_size;
  int64_t grain = std::max<int64_t>(1, 8192 / nested_block_size);
  parallel_for(groups, grain, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * nested_block_size, last = std::min(end * nested_block_size, n);
    isa.double_quantize(absmax + first, last - first, nested_block_size, mean, map, codes + first,
                        nested_absmax + begin);
  });
}

void quantize_4bit_nested(const void* x, DType dtype, int64_t n, int64_t block_size, const Codebook& codebook,
                          float mean, int64_t nested_block_size, const Map8& map, uint8_t* packed,
                          uint8_t* absmax_codes, float* nested_absmax) {
  const Variant& isa = variant();
  constexpr int64_t kBlocks = 4096;  // at a time: the largest nested_block_size
  const int64_t group_size = block_size * nested_block_size;
  const int64_t groups = (n + group_size - 1) / group_size, step = kBlocks / nested_block_size;
  parallel_for(groups, std::max<int64_t>(1, 32 * 1024 / group_size), [&](int64_t begin, int64_t end) {
    float absmax[kBlocks];
    for (int64_t group = begin; group < end; group += step) {
      const int64_t first = group * group_size, last = std::min(n, std::min(group + step, end) * group_size);
      const int64_t blocks = (last - first + block_size - 1) / block_size;
      isa.quantize[int(dtype)](static_cast<const char*>(x) + first * element_size(dtype), last - first, block_size,
                               codebook, packed + first / 2, absmax);
      isa.double_quantize(absmax, blocks, nested_block_size, mean, map, absmax_codes + group * nested_block_size,
                          nested_absmax + group);
    }
  });
}

void double_dequantize(const Absmax& absmax, int64_t n, float* out) {
  const Variant& isa = variant();
  const int64_t size = absmax.nested_block_size, groups = (n + size - 1) / size;
  parallel_for(groups, std::max<int64_t>(1, 16 * 1024 / size), [&](int64_t begin, int64_t end) {
    alignas(64) float values[256];
    for (int64_t group = begin; group < end; ++group) {
      isa.nested_values(absmax.map, absmax.nested_absmax[group], *absmax.mean, values);
      for (int64_t i = group * size; i < std::min(n, (group + 1) * size); ++i) out[i] = values[absmax.codes[i]];
    }
  });
}

}  // namespace qlora
