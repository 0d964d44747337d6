// Quantize and dequantize in blocks (reference/blockwise.py). Class EXACT: equal bits to the reference.
// Compile with --fmad=false; never with fast-math.
//
// dequantize  x' = round(level[code] * absmax')          absmax' flat, or decoded here from its own 8-bit codes
//   bytes     n/2 codes + n/64 absmax codes (or n/16 absmax) in, n * sizeof(T) out;  flops n
//   floor     4096 x 14336 to bf16, double quantization: 30.3 MB in + 117.4 MB out = 34.4 us at 4.3 TB/s (H200 copy)
//   predicted 88-95 % of it (36-39 us): about 10 issue slots a weight (SASS: 5.5 in the stores' loop, the rest once a
//             tile), 17 us of issue; vector width and bytes in flight decide, not the table
//   sm_90a    40 registers (float32: 48), no spills
//   measured  never: no card was at hand
//
// quantize    absmax = max |x| of a block; s = x / absmax; code = order[thresholds below s]
//   bytes     n * sizeof(T) in, n/2 + n/16 out;  flops 3n
//   floor     4096 x 14336 from bf16: 117.4 + 33.0 MB = 35.0 us
//   predicted 75-85 % (41-47 us): about 20 issue slots a weight (SASS), 35 us of issue, as long as the memory takes.
//             With 8 elements a lane it was 28: absmax, reciprocal and branches are paid once a lane, hence 16
//   sm_90a    56 registers with the bin table, 64 with the search, no spills
//   measured  never
//
// How: a warp owns a tile, a lane 8 (dequantize, stored as 16 bytes) or 16 (quantize) neighbouring elements of it.
// Tables live in registers, one entry a lane, and are read by shuffles. The absmax of a tile's blocks is computed by as
// many lanes as there are blocks and handed out by shuffles.
#include "../cpp/kernels.h"
#include "common.cuh"
#include "quantize.cuh"

namespace qlora::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kLanes;

__device__ __forceinline__ int lane_id() { return int(threadIdx.x) % kLanes; }
__device__ __forceinline__ int64_t warp_id() { return int64_t(blockIdx.x) * kWarps + threadIdx.x / kLanes; }

// --- dequantize ------------------------------------------------------------------------------------------------------

constexpr int kDequantizeTile = 32 * kLanes;  // weights a warp

struct Output {
  Divider cols;
  int64_t row_stride;
  bool strided;  // rows further apart than `cols`
  bool vectors;  // 16-byte stores, and loads of the codes of one store, are possible
};

// A whole tile, aligned: 16 bytes of output a lane and store. The codes of one store are one word of 4 or 2 bytes.
template <class T>
__device__ __forceinline__ void dequantize_whole(const uint8_t* packed, int64_t start, float lane_absmax,
                                                 float lane_level, int block_shift, T* out, const Output& output) {
  constexpr int kPer = kPerStore<T>, kStores = kDequantizeTile / kLanes / kPer;
  using Word = std::conditional_t<kPer == 8, uint32_t, uint16_t>;
  const int lane = lane_id();
  uint32_t words[kStores];
#pragma unroll
  for (int s = 0; s < kStores; ++s) {
    words[s] = __ldg(reinterpret_cast<const Word*>(packed + ((start + (s * kLanes + lane) * kPer) >> 1)));
  }
  int64_t row = 0, col = start;
  if (output.strided) {
    row = divide(start, output.cols);
    col = start - row * output.cols.divisor;
  }
#pragma unroll
  for (int s = 0; s < kStores; ++s) {
    const int offset = (s * kLanes + lane) * kPer;
    const float absmax = __shfl_sync(kFullWarp, lane_absmax, offset >> block_shift);
    float values[kPer];
#pragma unroll
    for (int e = 0; e < kPer; ++e) values[e] = product(level_of(lane_level, words[s], e), absmax);
    const int64_t at =
        output.strided ? strided_position(row, col, offset, output.cols.divisor, output.row_stride) : start + offset;
    store16(out + at, values);
  }
}

// The last tile, or storage that 16-byte accesses cannot reach: an element a lane and step.
template <class T>
__device__ __forceinline__ void dequantize_slowly(const uint8_t* packed, int64_t start, int64_t n, float lane_absmax,
                                                  float lane_level, int block_shift, T* out, const Output& output) {
#pragma unroll 1
  for (int offset = lane_id(); offset < kDequantizeTile; offset += kLanes) {
    const int64_t i = start + offset;
    const uint32_t code = i < n ? packed[i >> 1] >> (i & 1 ? 0 : 4) : 0;
    const float absmax = __shfl_sync(kFullWarp, lane_absmax, offset >> block_shift);
    const float value = product(__shfl_sync(kFullWarp, lane_level, int(code), 16), absmax);
    if (i >= n) continue;
    const int64_t row = output.strided ? divide(i, output.cols) : 0;
    out[i + row * (output.row_stride - output.cols.divisor)] = round_to(T{}, value);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    dequantize_kernel(const uint8_t* __restrict__ packed, int64_t n, const __grid_constant__ Scales scales,
                      int block_shift, const __grid_constant__ Codebook codebook, T* __restrict__ out,
                      const __grid_constant__ Output output) {
  const int lane = lane_id();
  const int64_t start = warp_id() * kDequantizeTile;
  if (start >= n) return;

  // The absmax of block `lane` of this tile, which has 1 to 32 blocks.
  const int64_t block = (start >> block_shift) + lane;
  const bool has_block = (block << block_shift) < n && (lane << block_shift) < kDequantizeTile;
  const float lane_absmax = has_block ? decoding_absmax(scales, block) : 0.0f;
  const float lane_level = codebook.levels[lane % 16];
  if (output.vectors && start + kDequantizeTile <= n) {
    dequantize_whole(packed, start, lane_absmax, lane_level, block_shift, out, output);
  } else {
    dequantize_slowly(packed, start, n, lane_absmax, lane_level, block_shift, out, output);
  }
}

// --- quantize: one warp a part (quantize.cuh) ---------------------------------------------------------------------------

template <class T, bool BINS, bool LONG>
__global__ void __launch_bounds__(kQuantizeThreads, 4)
    quantize_kernel(const T* __restrict__ x, const __grid_constant__ Input in,
                    const __grid_constant__ Codebook codebook, const __grid_constant__ BinTable bins,
                    uint8_t* __restrict__ packed, float* __restrict__ absmax) {
  const int64_t start = LONG ? warp_id() << in.block_shift : warp_id() * kQuantizeTile;
  if (start >= in.n) return;
  const LaneTable table = lane_table<BINS>(codebook, bins, lane_id());
  quantize_part<T, BINS, LONG>(x, start, in, codebook, table, packed, absmax + (start >> in.block_shift));
}

}  // namespace

void dequantize_4bit(const Weight4bit& weight, const Codebook& codebook, void* out, DType dtype, int64_t row_stride,
                     void* stream) {
  const int64_t n = weight.rows * weight.cols;
  if (n == 0) return;
  const int block_shift = block_shift_of(weight.block_size);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kPer = kPerStore<T>;
    Output output{make_divider(weight.cols), row_stride, row_stride != weight.cols && weight.rows > 1, false};
    output.vectors = aligned(out, 16) && aligned(weight.packed, kPer / 2) &&
                     (!output.strided || (weight.cols % kPer == 0 && row_stride % kPer == 0));
    launch("dequantize_4bit", dequantize_kernel<T>, ceil_div(n, kDequantizeTile * kWarps), 1, kThreads, stream,
           weight.packed, n, prepare(weight.absmax), block_shift, codebook, static_cast<T*>(out), output);
  });
}

void quantize_4bit(const void* x, DType dtype, int64_t n, int64_t block_size, const Codebook& codebook, uint8_t* packed,
                   float* absmax, void* stream) {
  const Input in = input_of(x, n, block_size, packed);
  const BinTable bins = make_bins(codebook);
  const bool is_long = block_size > kQuantizeTile;
  const int64_t warps = ceil_div(n, is_long ? block_size : int64_t(kQuantizeTile));
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    with_variant(bins.usable, is_long, [&](auto with_bins, auto with_long) {
      launch("quantize_4bit", quantize_kernel<T, with_bins.value, with_long.value>, ceil_div(warps, kQuantizeWarps), 1,
             kQuantizeThreads, stream, static_cast<const T*>(x), in, codebook, bins, packed, absmax);
    });
  });
}

}  // namespace qlora::cuda
