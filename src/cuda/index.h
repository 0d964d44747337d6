// Index arithmetic of the CUDA kernels, as host/device constexpr functions: a card is not needed to test them at sizes
// past 2^31 (tests/test_cuda_emulated.py). Flat positions, block numbers and byte offsets are 64-bit everywhere; only
// offsets inside one tile are 32-bit.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define QLORA_INDEX __host__ __device__ constexpr
#define QLORA_INDEX_INLINE __host__ __device__ inline
#else
#define QLORA_INDEX constexpr
#define QLORA_INDEX_INLINE inline
#endif

namespace qlora::cuda {

constexpr int kLanes = 32;

QLORA_INDEX int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

QLORA_INDEX bool is_power_of_two(int64_t x) { return x > 0 && (x & (x - 1)) == 0; }

// log2 of a power of two; -1 for any other number.
QLORA_INDEX int log2_or_minus_one(int64_t x) {
  if (!is_power_of_two(x)) return -1;
  int shift = 0;
  while ((int64_t(1) << shift) < x) ++shift;
  return shift;
}

// Division of 64-bit numbers by one divisor, without the function call that a 64-bit division is on a GPU.
// With magic = ceil(2^64 / d), n * magic / 2^64 exceeds n / d by less than n / 2^64 < 1/2: at most one too large.
struct Divider {
  int64_t divisor;
  uint64_t magic;
};

QLORA_INDEX Divider make_divider(int64_t divisor) {
  return {divisor, divisor == 1 ? ~uint64_t(0) : ~uint64_t(0) / uint64_t(divisor) + 1};
}

QLORA_INDEX_INLINE int64_t divide(int64_t n, const Divider& by) {
#ifdef __CUDA_ARCH__
  int64_t q = int64_t(__umul64hi(uint64_t(n), by.magic));
#else
  int64_t q = int64_t((unsigned __int128)uint64_t(n) * by.magic >> 64);
#endif
  const int64_t rest = n - q * by.divisor;
  q -= rest < 0;
  q += rest >= by.divisor;  // only for divisor 1, whose magic 2^64 does not fit
  return q;
}

// Bytes that hold elements [0, n): two codes a byte, an odd count padded.
QLORA_INDEX int64_t packed_bytes(int64_t n) { return (n + 1) / 2; }

// Shift of element e (0..7) inside the little-endian word of its 8 codes: bytes ascend, the high nibble comes first.
QLORA_INDEX int nibble_shift(int e) { return (e / 2) * 8 + (e % 2 == 0 ? 4 : 0); }

// Where element `i` of a row-major (rows, cols) matrix lies when rows are `row_stride` apart.
QLORA_INDEX int64_t strided_position(int64_t i, int64_t cols, int64_t row_stride) {
  return i / cols * row_stride + i % cols;
}

// The same for `row`, `col` of the first element of a tile already known and `offset` < 2^31 inside it.
QLORA_INDEX int64_t strided_position(int64_t row, int64_t col, uint32_t offset, int64_t cols, int64_t row_stride) {
  int64_t local = col + offset;
  if (local >= cols) {  // no 64-bit division, which is a function call and costs registers
    const uint32_t rows = cols > int64_t(offset) ? 1u : uint32_t(local) / uint32_t(cols);
    row += rows;
    local -= rows * cols;
  }
  return row * row_stride + local;
}

// --- the linear layer for few tokens (linear_small.cu) ---------------------------------------------------------------

constexpr int kLinearWarps = 8;       // of a block
constexpr int kLinearStep = 128;      // columns a warp decodes between two loads: 4 lanes a row, 32 weights a lane
constexpr int kLinearMaxTokens = 32;  // accumulators for more would not fit the registers

// A warp holds `row_tiles` tiles of 16 rows by `token_tiles` tiles of 8 tokens; `row_warps` of a block's 8 warps take
// different rows, the rest split the columns.
struct LinearTiling {
  int row_tiles, token_tiles, row_warps;
};

// More rows a block read x less often; fewer rows make more blocks. Grow the rows while every multiprocessor still gets
// two blocks, or one where x weighs more than the weights (m > 8). Start values: not yet measured.
QLORA_INDEX LinearTiling linear_tiling(int64_t rows, int m, int multiprocessors) {
  LinearTiling tiling{1, m <= 8 ? 1 : m <= 16 ? 2 : 4, 1};
  const int64_t blocks_wanted = int64_t(multiprocessors) * (m <= 8 ? 2 : 1);
  if (ceil_div(rows, 32) >= blocks_wanted) tiling.row_tiles = 2;
  const int most = m <= 8 ? 1 : 4;
  while (tiling.row_warps < most && ceil_div(rows, 16 * tiling.row_tiles * tiling.row_warps * 2) >= blocks_wanted) {
    tiling.row_warps *= 2;
  }
  return tiling;
}

static_assert(packed_bytes((int64_t(1) << 33) + 1) == (int64_t(1) << 32) + 1);
static_assert(strided_position(int64_t(3) << 31, 1 << 20, (1 << 20) + 64) == (int64_t(3) << 11) * ((1 << 20) + 64));
static_assert(strided_position(int64_t(6000), 5, 1020, 1024, 1088) == 6001 * int64_t(1088) + 1);
static_assert(strided_position(6000, 2, 1020, 3, 8) == 6340 * int64_t(8) + 2);
static_assert(log2_or_minus_one(4096) == 12 && log2_or_minus_one(96) == -1);

}  // namespace qlora::cuda
