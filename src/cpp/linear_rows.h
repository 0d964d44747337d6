// y = x W'^T for the rows that one thread owns: the loops for all instruction sets. A variant brings the Lanes: what a
// register holds and how packed bytes become weights.
//
// Include in an unnamed namespace of a variant file (see variant.h about inlining).
#include "linear_chunk.h"
#include "linear_tile.h"

template <class Lanes, DType dtype, int R, int G>
void linear_row_group(const LinearRows& call, LinearScratch& scratch, int64_t row) {
  const Weight4bit& weight = *call.weight;
  const int64_t blocks = weight.cols / weight.block_size;
  Scales from = scales(weight.absmax, row * blocks, (row + R * G) * blocks - 1, weight.rows * blocks, scratch);
  if constexpr (G == 1) {
    if (call.m <= Lanes::kFew) return few_tokens<Lanes, dtype, R>(call, from, row);
  }
  more_tokens<Lanes, dtype, R, G>(call, from, scratch, row);
}

template <class Lanes, DType dtype>
void linear_rows(const LinearRows& call, LinearScratch& scratch, int64_t begin, int64_t end) {
  constexpr int R = Lanes::kRows, G = kLinearRows / R;
  static_assert(R <= kTileRows && G * R == kLinearRows, "LinearScratch has room for them");
  if (call.m > kManyTokens) {
    for (; begin + R * G <= end; begin += R * G) linear_row_group<Lanes, dtype, R, G>(call, scratch, begin);
  }
  for (; begin + R <= end; begin += R) linear_row_group<Lanes, dtype, R, 1>(call, scratch, begin);
  for (; begin < end; ++begin) linear_row_group<Lanes, dtype, 1, 1>(call, scratch, begin);
}

// A step of x, one element after the other; `source` says which element belongs to lane j.
template <class Lanes, class T>
QLORA_INLINE void reorder_by_source(const T* x, typename Lanes::X* out) {
  for (int j = 0; j < 64 * Lanes::kSpan; ++j) out[j] = Lanes::convert(x[Lanes::source(j)]);
}

// x (m, cols) of `dtype` -> rows of `stride` bytes in the order of the weights, zeros where the last step is not full.
template <class Lanes, DType dtype>
void linear_prepare(const void* x_, int64_t m, int64_t cols, int64_t stride, void* out_) {
  using E = Element<dtype>;
  constexpr int kStep = 64 * Lanes::kSpan;
  auto* x = static_cast<const typename E::type*>(x_);
  for (int64_t row = 0; row < m; ++row, x += cols) {
    auto* out = reinterpret_cast<typename Lanes::X*>(static_cast<char*>(out_) + row * stride);
    int64_t i = 0;
    for (; i + kStep <= cols; i += kStep, out += kStep) Lanes::reorder(x + i, out);
    if (i < cols) {
      typename E::type last[kStep] = {};
      memcpy(last, x + i, size_t(cols - i) * sizeof *last);
      Lanes::reorder(last, out);
    }
  }
}
