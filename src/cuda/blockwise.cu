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
#include "encode.h"

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

// --- quantize --------------------------------------------------------------------------------------------------------

// One entry a lane of the bin table (BINS) or of the sorted thresholds. The byte of codes is repeated four times, so
// that a code is already (or one shift of 4 away from) where it belongs in the word of eight.
struct LaneTable {
  float threshold;
  uint32_t codes;
};

template <bool BINS>
__device__ __forceinline__ LaneTable lane_table(const Codebook& codebook, const BinTable& bins, int lane) {
  if (BINS) return {bins.threshold[lane], bins.codes[lane] * 0x01010101u};
  return {lane % 16 < 15 ? codebook.thresholds[lane % 16] : INFINITY, codebook.order[lane % 16] * 0x11111111u};
}

// The code of s in the nibble at `shift`, a multiple of 4 (garbage elsewhere).
template <bool BINS>
__device__ __forceinline__ uint32_t encode(float s, LaneTable table, int shift) {
  if (BINS) {
    const int bin = bin_of(s);
    const float threshold = __shfl_sync(kFullWarp, table.threshold, bin);
    const uint32_t codes = __shfl_sync(kFullWarp, table.codes, bin);
    if (shift % 8 == 0) return s > threshold ? codes >> 4 : codes;
    return s > threshold ? codes : codes << 4;
  }
  int below = 0;  // binary search for the number of thresholds strictly below s
#pragma unroll
  for (int step = 8; step > 0; step /= 2) {
    const float threshold = __shfl_sync(kFullWarp, table.threshold, below + step - 1, 16);
    below += threshold < s ? step : 0;
  }
  return __shfl_sync(kFullWarp, table.codes, below, 16);
}

// A lane's sixteen elements. One absmax and one reciprocal serve all of them: a block has at least 32.
constexpr int kPerLane = 16;
struct Sixteen {
  float half[2][8];
};

// Their codes as two little-endian words of four bytes.
template <bool BINS>
__device__ __forceinline__ uint2 encode16(Sixteen v, float absmax, uint8_t order0, uint8_t zero_code, LaneTable table) {
  if (fabsf(absmax) > kLargestInvertible) {  // the reciprocal would be subnormal
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) v.half[e / 8][e % 8] /= absmax;
  } else {
    const float inverse = reciprocal(absmax);
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) v.half[e / 8][e % 8] *= inverse;
  }
  uint32_t words[2] = {};
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) {
    const int shift = nibble_shift(e % 8);
    words[e / 8] |= encode<BINS>(v.half[e / 8][e % 8], table, shift) & (15u << shift);
  }
  if (absmax == 0.0f) words[0] = words[1] = zero_code * 0x11111111u;  // a zero block
  if (absmax != absmax) words[0] = words[1] = order0 * 0x11111111u;   // not finite: no threshold lies below NaN
  return {words[0], words[1]};
}

template <class T>
__device__ __forceinline__ Sixteen load_input(const T* x, int64_t i, int64_t n, bool vectors) {
  Sixteen v;
  if (vectors && i + kPerLane <= n) {
    load8(x + i, v.half[0]);
    load8(x + i + 8, v.half[1]);
  } else {
#pragma unroll
    for (int e = 0; e < kPerLane; ++e)
      v.half[e / 8][e % 8] = i + e < n ? to_float(x[i + e]) : 0.0f;  // changes no absmax
  }
  return v;
}

__device__ __forceinline__ void store_codes(uint8_t* packed, int64_t i, int64_t n, bool words, uint2 codes,
                                            uint8_t zero_code) {
  if (words && i + kPerLane <= n) {
    *reinterpret_cast<uint2*>(packed + (i >> 1)) = codes;
    return;
  }
  for (int64_t e = 0; e < kPerLane && i + e < n; e += 2) {
    const uint32_t word = e < 8 ? codes.x : codes.y;
    uint32_t byte = (word >> (e % 8 * 4)) & 0xffu;
    if (i + e + 1 == n) byte = (byte & 0xf0u) | zero_code;  // the padding nibble of an odd count
    packed[(i + e) >> 1] = uint8_t(byte);
  }
}

struct Input {
  int64_t n;
  int block_shift;
  bool vectors;  // 16-byte loads of x are possible
  bool words;    // packed is 8-byte aligned
};

__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

__device__ __forceinline__ uint32_t key_of(const Sixteen& v, bool keep_sign) {
  uint32_t key = 0;
  if (keep_sign) {  // one branch, not sixteen selections
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) key = larger(key, absmax_key(v.half[e / 8][e % 8], true));
  } else {
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) key = larger(key, absmax_key(v.half[e / 8][e % 8], false));
  }
  return key;
}

__device__ __forceinline__ uint32_t max_over_lanes(uint32_t key, int lanes) {
  for (int step = 1; step < lanes; step *= 2) key = larger(key, __shfl_xor_sync(kFullWarp, key, step));
  return key;
}

constexpr int kQuantizeTile = kPerLane * kLanes;  // 512 elements a warp

// Blocks of at most 512: a tile holds whole blocks.
template <class T, bool BINS>
__global__ void __launch_bounds__(kThreads, 4)
    quantize_kernel(const T* __restrict__ x, const __grid_constant__ Input in,
                    const __grid_constant__ Codebook codebook, const __grid_constant__ BinTable bins,
                    uint8_t* __restrict__ packed, float* __restrict__ absmax) {
  const int64_t start = warp_id() * kQuantizeTile;
  if (start >= in.n) return;
  const int lane = lane_id(), lanes_per_block = (1 << in.block_shift) / kPerLane;
  const int64_t i = start + lane * kPerLane;
  const Sixteen v = load_input(x, i, in.n, in.vectors);
  const LaneTable table = lane_table<BINS>(codebook, bins, lane);
  const uint32_t key = max_over_lanes(key_of(v, codebook.signed_absmax), lanes_per_block);
  const float m = absmax_from_key(key, codebook.signed_absmax);
  const uint2 codes = encode16<BINS>(v, m, codebook.order[0], codebook.zero_code, table);
  if (i >= in.n) return;
  if ((lane & (lanes_per_block - 1)) == 0) absmax[i >> in.block_shift] = m;
  store_codes(packed, i, in.n, in.words, codes, codebook.zero_code);
}

// Blocks of 1024 to 4096: a warp takes one block, reads it for the absmax and again (from L1 or L2) for the codes.
template <class T, bool BINS>
__global__ void __launch_bounds__(kThreads, 4)
    quantize_long_kernel(const T* __restrict__ x, const __grid_constant__ Input in,
                         const __grid_constant__ Codebook codebook, const __grid_constant__ BinTable bins,
                         uint8_t* __restrict__ packed, float* __restrict__ absmax) {
  const int64_t start = warp_id() << in.block_shift;
  if (start >= in.n) return;
  const int64_t block_end = start + (int64_t(1) << in.block_shift), end = block_end < in.n ? block_end : in.n;
  const int lane = lane_id();
  const LaneTable table = lane_table<BINS>(codebook, bins, lane);
  uint32_t key = 0;
  for (int64_t i = start + lane * kPerLane; i < end; i += kQuantizeTile) {
    key = larger(key, key_of(load_input(x, i, end, in.vectors), codebook.signed_absmax));
  }
  const float m = absmax_from_key(max_over_lanes(key, kLanes), codebook.signed_absmax);
  if (lane == 0) absmax[start >> in.block_shift] = m;
  for (int64_t tile = start; tile < end; tile += kQuantizeTile) {  // all lanes together: encode shuffles
    const int64_t i = tile + lane * kPerLane;
    const Sixteen v = load_input(x, i, end, in.vectors);
    const uint2 codes = encode16<BINS>(v, m, codebook.order[0], codebook.zero_code, table);
    if (i < end) store_codes(packed, i, end, in.words, codes, codebook.zero_code);
  }
}

int block_shift_of(int64_t block_size) {
  const int shift = log2_or_minus_one(block_size);
  if (shift < 5 || shift > 12) throw std::runtime_error("block_size must be a power of two in 32..4096");
  return shift;
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
  const Input in{n, block_shift_of(block_size), aligned(x, 16), aligned(packed, 8)};
  const BinTable bins = make_bins(codebook);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const bool is_long = block_size > kQuantizeTile;
    auto kernel = is_long ? (bins.usable ? quantize_long_kernel<T, true> : quantize_long_kernel<T, false>)
                          : (bins.usable ? quantize_kernel<T, true> : quantize_kernel<T, false>);
    launch("quantize_4bit", kernel, ceil_div(n, kWarps * (is_long ? block_size : int64_t(kQuantizeTile))), 1, kThreads,
           stream, static_cast<const T*>(x), in, codebook, bins, packed, absmax);
  });
}

}  // namespace qlora::cuda
