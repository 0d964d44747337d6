// Quantize with both levels of double quantization in one kernel, for a mean that is known (reference: quantize_blockwise
// followed by double_quantize). Class EXACT. Compile with --fmad=false; never with fast-math.
//
//   bytes     n * sizeof(T) in, n/2 + n/64 + n/4096 out: the absmax (4 bytes a block, written and read again) never
//             leave shared memory, and a launch is saved
//   floor     4096 x 14336 from bf16: 117.4 + 30.3 MB = 34.4 us at 4.3 TB/s (H200 copy)
//   predicted as blockwise.cu's quantize and 10 % for the second level: 45-52 us; 3584 groups fill 132 multiprocessors
//             6.8 times at 4 blocks each
//   sm_90a    64 registers (blocks of 1024 and more: 80), 17.4 KB of shared memory, no spills
//   measured  never: no card was at hand
//
// How: a thread block takes one nested group (256 blocks of 64 weights), its warps a tile or long block each in turn, as
// in quantize.cuh; then all of them quantize the group's absmax, as in double_quant.cuh.
#include "../cpp/kernels.h"
#include "double_quant.cuh"
#include "quantize.cuh"

namespace qlora::cuda {
namespace {

static_assert(kQuantizeThreads == kGroupThreads, "one thread block does both levels");
constexpr int kLargestGroup = 4096;

template <class T, bool BINS, bool LONG>
__global__ void __launch_bounds__(kQuantizeThreads, LONG ? 3 : 4)
    quantize_nested_kernel(const T* __restrict__ x, const __grid_constant__ Input in,
                           const __grid_constant__ Codebook codebook, const __grid_constant__ BinTable bins,
                           const float* __restrict__ mean, int group_size, const __grid_constant__ Map8 map,
                           uint8_t* __restrict__ packed, uint8_t* __restrict__ absmax_codes,
                           float* __restrict__ nested_absmax) {
  __shared__ float absmax[kLargestGroup];
  __shared__ GroupShared shared;
  const int lane = int(threadIdx.x) % kLanes, warp = int(threadIdx.x) / kLanes;
  const int64_t first_block = int64_t(blockIdx.x) * group_size, start = first_block << in.block_shift;
  const int64_t left = in.n - start, whole = int64_t(group_size) << in.block_shift, size = left < whole ? left : whole;

  const LaneTable table = lane_table<BINS>(codebook, bins, lane);
  const int part = LONG ? 1 << in.block_shift : kQuantizeTile;
  for (int64_t offset = int64_t(warp) * part; offset < size; offset += kQuantizeWarps * part) {
    quantize_part<T, BINS, LONG>(x, start + offset, in, codebook, table, packed, absmax + (offset >> in.block_shift));
  }
  __syncthreads();
  const int blocks = int((size + (1 << in.block_shift) - 1) >> in.block_shift);
  double_quantize_group(absmax, blocks, *mean, map, shared, absmax_codes + first_block, nested_absmax + blockIdx.x);
}

}  // namespace

void quantize_4bit_nested(const void* x, DType dtype, int64_t n, int64_t block_size, const Codebook& codebook,
                          const float* mean, int64_t nested_block_size, const Map8& map, uint8_t* packed,
                          uint8_t* absmax_codes, float* nested_absmax, void* stream) {
  const Input in = input_of(x, n, block_size, packed);
  const BinTable bins = make_bins(codebook);
  if (!is_power_of_two(nested_block_size) || nested_block_size < 32 || nested_block_size > kLargestGroup) {
    throw std::runtime_error("nested_block_size must be a power of two in 32..4096");
  }
  const int64_t groups = ceil_div(n, block_size * nested_block_size);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    with_variant(bins.usable, block_size > kQuantizeTile, [&](auto with_bins, auto with_long) {
      launch("quantize_4bit_nested", quantize_nested_kernel<T, with_bins.value, with_long.value>, groups, 1,
             kQuantizeThreads, stream, static_cast<const T*>(x), in, codebook, bins, mean, int(nested_block_size), map,
             packed, absmax_codes, nested_absmax);
    });
  });
}

}  // namespace qlora::cuda
