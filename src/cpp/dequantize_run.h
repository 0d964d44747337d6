// Part of a weight on the calling thread: what the parallel loops of blockwise.cpp and product.cpp cut the work into.
#pragma once
#include "kernels.h"
#include "variant.h"

namespace qlora {

// Block sizes are powers of two, and a shift costs a twentieth of a division.
inline int log2_of(int64_t power) {
  int shift = 0;
  while ((int64_t(1) << shift) < power) ++shift;
  return shift;
}

inline int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Where a thread finds absmax. Under double quantization absmax' takes only 256 values in a nested group: computed once,
// and looked up by code inside the loops.
class RunScales {
 public:
  explicit RunScales(const Weight4bit& weight)
      : block_shift(log2_of(weight.block_size)),
        group_shift(log2_of(weight.absmax.nested_block_size)),
        absmax_(weight.absmax),
        isa_(variant()) {}

  const int block_shift, group_shift;

  BlockAbsmax from(int64_t block) {
    if (!absmax_.codes) return {absmax_.absmax + block, nullptr};
    const int64_t group = block >> group_shift;
    if (group != group_) isa_.nested_values(absmax_.map, absmax_.nested_absmax[group], *absmax_.mean, values_);
    group_ = group;
    return {values_, absmax_.codes + block};
  }
  // How many blocks from(block) covers.
  int64_t reach(int64_t block) const {
    constexpr int64_t kAll = INT64_MAX / 4096;  // times a block size is no overflow
    return absmax_.codes ? (((block >> group_shift) + 1) << group_shift) - block : kAll;
  }
  // How many nested groups begin at `block` and lie within `blocks`.
  int64_t whole_groups(int64_t block, int64_t blocks) const {
    const bool begins = absmax_.codes && !(block & ((int64_t(1) << group_shift) - 1));
    return begins ? blocks >> group_shift : 0;
  }

 private:
  const Absmax& absmax_;
  const Variant& isa_;
  int64_t group_ = -1;  // whose values these are
  alignas(64) float values_[256];
};

// Elements first .. first + count of the flattened weight -> out (count) of `dtype`.
void dequantize_run(const Weight4bit& weight, const Codebook& codebook, RunScales& scales, int64_t first, int64_t count,
                    DType dtype, void* out);

}  // namespace qlora
