// Quantize and dequantize in blocks (reference/blockwise.py). Class EXACT: equal bits to the reference.
// Compile with --fmad=false; never with fast-math.
//
// dequantize  x' = round(level[code] * absmax')          absmax' flat, or decoded here from its own 8-bit codes
//   bytes     n/2 codes + n/64 absmax codes (or n/16 absmax) in, n * sizeof(T) out       flops n
//   floor     4096 x 14336 to bf16 with double quantization: 30.3 MB in + 117.4 MB out = 34.4 us at 4.3 TB/s (H200 copy)
//   predicted 88-95 % of it (36-39 us): 4.2 issue slots a weight (SHFL, SHF, FMUL, half F2FP, stores) of the 18 that
//             6.9 weights/clock/SM leave; vector width and bytes in flight decide, not the table
//   measured  never: no card was at hand
//
// quantize    absmax = max |x| of a block; s = x / absmax; code = order[thresholds below s]
//   bytes     n * sizeof(T) in, n/2 + n/16 out                                             flops 3n
//   floor     4096 x 14336 from bf16: 117.4 + 33.0 MB = 35.0 us
//   predicted 85-95 % (37-41 us): about 12 issue slots a weight of the 20 that 6.4 weights/clock/SM leave
//   measured  never
//
// How: a warp owns a tile. Each lane loads 16 bytes and stores 16 bytes, both contiguous over the warp. Tables live in
// registers, one entry a lane, and are read by shuffles. The absmax of a tile's blocks is computed by as many lanes as
// there are blocks and handed out by shuffles.
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
  bool strided;   // rows further apart than `cols`
  bool vectors;   // 16-byte stores are possible
  bool words;     // the codes of one store can be loaded at once
};

// The codes of PER consecutive elements in the low bits: one load where aligned and inside the tensor.
template <int PER>
__device__ __forceinline__ uint32_t load_codes(const uint8_t* packed, int64_t first, int64_t n, bool words) {
  using Word = std::conditional_t<PER == 8, uint32_t, uint16_t>;
  if (words && first + PER <= n) return __ldg(reinterpret_cast<const Word*>(packed + (first >> 1)));
  int64_t left = n - first;
  return left <= 0 ? 0u : load_codes_slowly(packed, first, int(left < PER ? left : PER));
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    dequantize_kernel(const uint8_t* __restrict__ packed, int64_t n, const __grid_constant__ Scales scales,
                      int block_shift, const __grid_constant__ Codebook codebook, T* __restrict__ out, Output output) {
  constexpr int kPer = kPerStore<T>, kStores = kDequantizeTile / kLanes / kPer;
  const int lane = lane_id();
  const int64_t start = warp_id() * kDequantizeTile;
  if (start >= n) return;

  // Loads first: the codes, then the absmax of block `lane` of this tile (a tile has 1 to 32 blocks).
  uint32_t words[kStores];
#pragma unroll
  for (int s = 0; s < kStores; ++s) {
    words[s] = load_codes<kPer>(packed, start + (s * kLanes + lane) * kPer, n, output.words);
  }
  const int64_t block = (start >> block_shift) + lane;
  const bool has_block = (block << block_shift) < n && (lane << block_shift) < kDequantizeTile;
  const float lane_absmax = has_block ? decoding_absmax(scales, block) : 0.0f;
  const float lane_level = codebook.levels[lane % 16];

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

    const int64_t i = start + offset;
    if (output.vectors && i + kPer <= n) {
      const int64_t at = output.strided ? strided_position(row, col, offset, output.cols.divisor, output.row_stride) : i;
      store16(out + at, values);
    } else {
#pragma unroll
      for (int e = 0; e < kPer; ++e) {
        if (i + e >= n) break;
        const int64_t at =
            output.strided ? strided_position(row, col, offset + e, output.cols.divisor, output.row_stride) : i + e;
        out[at] = round_to(T{}, values[e]);
      }
    }
  }
}

// --- quantize --------------------------------------------------------------------------------------------------------

// One entry a lane of the bin table (BINS) or of the sorted thresholds.
struct LaneTable {
  float threshold;
  uint32_t codes;
};

template <bool BINS>
__device__ __forceinline__ LaneTable lane_table(const Codebook& codebook, const BinTable& bins, int lane) {
  if (BINS) return {bins.threshold[lane], bins.codes[lane]};
  return {lane % 16 < 15 ? codebook.thresholds[lane % 16] : INFINITY, codebook.order[lane % 16]};
}

// The code of s in the low nibble (garbage above).
template <bool BINS>
__device__ __forceinline__ uint32_t encode(float s, LaneTable table) {
  if (BINS) {
    const int bin = bin_of(s);
    const float threshold = __shfl_sync(kFullWarp, table.threshold, bin);
    const uint32_t codes = __shfl_sync(kFullWarp, table.codes, bin);
    return s > threshold ? codes >> 4 : codes;
  }
  int below = 0;  // binary search for the number of thresholds strictly below s
#pragma unroll
  for (int step = 8; step > 0; step /= 2) {
    const float threshold = __shfl_sync(kFullWarp, table.threshold, below + step - 1, 16);
    below += threshold < s ? step : 0;
  }
  return __shfl_sync(kFullWarp, table.codes, below, 16);
}

// Eight codes as the little-endian word of their four bytes.
template <bool BINS>
__device__ __forceinline__ uint32_t encode8(const float (&x)[8], float absmax, uint8_t order0, uint8_t zero_code,
                                            LaneTable table) {
  float s[8];
  if (fabsf(absmax) > kLargestInvertible) {  // the reciprocal would be subnormal
#pragma unroll
    for (int e = 0; e < 8; ++e) s[e] = x[e] / absmax;
  } else {
    const float inverse = reciprocal(absmax);
#pragma unroll
    for (int e = 0; e < 8; ++e) s[e] = x[e] * inverse;
  }
  uint32_t word = 0;
#pragma unroll
  for (int e = 0; e < 8; ++e) word |= (encode<BINS>(s[e], table) & 15u) << nibble_shift(e);
  if (absmax == 0.0f) return zero_code * 0x11111111u;  // a zero block
  if (absmax != absmax) return order0 * 0x11111111u;   // a block that is not finite: no threshold lies below NaN
  return word;
}

template <class T>
__device__ __forceinline__ void load_input(const T* x, int64_t i, int64_t n, bool vectors, float (&v)[8]) {
  if (vectors && i + 8 <= n) return load8(x + i, v);
#pragma unroll
  for (int e = 0; e < 8; ++e) v[e] = i + e < n ? to_float(x[i + e]) : 0.0f;  // zeros change no absmax
}

__device__ __forceinline__ void store_codes(uint8_t* packed, int64_t i, int64_t n, bool words, uint32_t word,
                                            uint8_t zero_code) {
  if (words && i + 8 <= n) {
    *reinterpret_cast<uint32_t*>(packed + (i >> 1)) = word;
    return;
  }
  for (int64_t e = 0; e < 8 && i + e < n; e += 2) {
    uint32_t byte = (word >> (e * 4)) & 0xffu;
    if (i + e + 1 == n) byte = (byte & 0xf0u) | zero_code;  // the padding nibble of an odd count
    packed[(i + e) >> 1] = uint8_t(byte);
  }
}

struct Input {
  int64_t n;
  int block_shift;
  bool vectors;  // 16-byte loads of x are possible
  bool words;    // packed is 4-byte aligned
};

__device__ __forceinline__ uint32_t key_of8(const float (&v)[8], bool keep_sign) {
  uint32_t key = 0;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const uint32_t k = absmax_key(v[e], keep_sign);
    key = key > k ? key : k;
  }
  return key;
}

__device__ __forceinline__ uint32_t max_over_lanes(uint32_t key, int lanes) {
  for (int step = 1; step < lanes; step *= 2) {
    const uint32_t other = __shfl_xor_sync(kFullWarp, key, step);
    key = key > other ? key : other;
  }
  return key;
}

// Blocks of at most 256: a warp's chunk of 256 elements holds whole blocks. `sink(block, absmax)` stores.
constexpr int kChunk = 8 * kLanes;

template <class T, bool BINS, int CHUNKS, class Sink>
__device__ __forceinline__ void quantize_chunks(const T* x, const Input& in, const Codebook& codebook, LaneTable table,
                                                int64_t start, int64_t end, uint8_t* packed, Sink sink) {
  const int lane = lane_id(), lanes_per_block = 1 << (in.block_shift - 3);
  float v[CHUNKS][8];
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) load_input(x, start + c * kChunk + lane * 8, end, in.vectors, v[c]);
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int64_t i = start + c * kChunk + lane * 8;
    const uint32_t key = max_over_lanes(key_of8(v[c], codebook.signed_absmax), lanes_per_block);
    const float absmax = absmax_from_key(key, codebook.signed_absmax);
    if (i < end && lane % lanes_per_block == 0) sink(i >> in.block_shift, absmax);
    const uint32_t word = encode8<BINS>(v[c], absmax, codebook.order[0], codebook.zero_code, table);
    if (i < end) store_codes(packed, i, end, in.words, word, codebook.zero_code);
  }
}

// Blocks of 512 to 4096: a warp takes one block, reads it for the absmax and again (from L1 or L2) for the codes.
template <class T, bool BINS, class Sink>
__device__ __forceinline__ void quantize_long_block(const T* x, const Input& in, const Codebook& codebook,
                                                    LaneTable table, int64_t start, uint8_t* packed, Sink sink) {
  const int lane = lane_id();
  const int64_t block_end = start + (int64_t(1) << in.block_shift), end = block_end < in.n ? block_end : in.n;
  uint32_t key = 0;
  float v[8];
  for (int64_t i = start + lane * 8; i < end; i += kChunk) {
    load_input(x, i, end, in.vectors, v);
    const uint32_t k = key_of8(v, codebook.signed_absmax);
    key = key > k ? key : k;
  }
  const float absmax = absmax_from_key(max_over_lanes(key, kLanes), codebook.signed_absmax);
  if (lane == 0) sink(start >> in.block_shift, absmax);
  for (int64_t chunk = start; chunk < end; chunk += kChunk) {  // all lanes together: encode shuffles
    const int64_t i = chunk + lane * 8;
    load_input(x, i, end, in.vectors, v);
    const uint32_t word = encode8<BINS>(v, absmax, codebook.order[0], codebook.zero_code, table);
    if (i < end) store_codes(packed, i, end, in.words, word, codebook.zero_code);
  }
}

constexpr int kQuantizeChunks = 2, kQuantizeTile = kQuantizeChunks * kChunk;  // 512 elements a warp

template <class T, bool BINS>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const T* __restrict__ x, const __grid_constant__ Input in, const __grid_constant__ Codebook codebook,
                    const __grid_constant__ BinTable bins, uint8_t* __restrict__ packed, float* __restrict__ absmax) {
  const int64_t start = warp_id() * kQuantizeTile;
  if (start >= in.n) return;
  const LaneTable table = lane_table<BINS>(codebook, bins, lane_id());
  quantize_chunks<T, BINS, kQuantizeChunks>(x, in, codebook, table, start, in.n, packed,
                                            [&](int64_t block, float value) { absmax[block] = value; });
}

template <class T, bool BINS>
__global__ void __launch_bounds__(kThreads)
    quantize_long_kernel(const T* __restrict__ x, const __grid_constant__ Input in,
                         const __grid_constant__ Codebook codebook, const __grid_constant__ BinTable bins,
                         uint8_t* __restrict__ packed, float* __restrict__ absmax) {
  const int64_t start = warp_id() << in.block_shift;
  if (start >= in.n) return;
  const LaneTable table = lane_table<BINS>(codebook, bins, lane_id());
  quantize_long_block<T, BINS>(x, in, codebook, table, start, packed,
                               [&](int64_t block, float value) { absmax[block] = value; });
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
    Output output{make_divider(weight.cols), row_stride, row_stride != weight.cols && weight.rows > 1, false, false};
    output.vectors = aligned(out, 16) && (!output.strided || (weight.cols % kPer == 0 && row_stride % kPer == 0));
    output.words = aligned(weight.packed, kPer / 2);
    launch("dequantize_4bit", dequantize_kernel<T>, ceil_div(n, kDequantizeTile * kWarps), 1, kThreads, stream,
           weight.packed, n, prepare(weight.absmax), block_shift, codebook, static_cast<T*>(out), output);
  });
}

void quantize_4bit(const void* x, DType dtype, int64_t n, int64_t block_size, const Codebook& codebook,
                   uint8_t* packed, float* absmax, void* stream) {
  const Input in{n, block_shift_of(block_size), aligned(x, 16), aligned(packed, 4)};
  const BinTable bins = make_bins(codebook);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const bool is_long = block_size > kChunk;
    auto kernel = is_long ? (bins.usable ? quantize_long_kernel<T, true> : quantize_long_kernel<T, false>)
                          : (bins.usable ? quantize_kernel<T, true> : quantize_kernel<T, false>);
    launch("quantize_4bit", kernel, ceil_div(n, kWarps * (is_long ? block_size : int64_t(kQuantizeTile))), 1, kThreads,
           stream, static_cast<const T*>(x), in, codebook, bins, packed, absmax);
  });
}

}  // namespace qlora::cuda
