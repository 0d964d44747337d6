// How a warp quantizes: a tile of 512 elements, or one longer block. Shared by blockwise.cu (absmax to memory) and
// quantize_nested.cu (absmax stay in shared memory). Compile with --fmad=false; never with fast-math.
#pragma once
#include "common.cuh"
#include "encode.h"

namespace qlora::cuda {

constexpr int kQuantizeWarps = 8, kQuantizeThreads = kQuantizeWarps * kLanes;

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

// The tile at `start`, of whole blocks (at most 512 elements each); every lane must come. `absmax` is that of the tile's
// first block.
template <class T, bool BINS>
__device__ __forceinline__ void quantize_tile(const T* x, int64_t start, const Input& in, const Codebook& codebook,
                                              LaneTable table, uint8_t* packed, float* absmax) {
  const int lane = int(threadIdx.x) % kLanes, lanes_per_block = (1 << in.block_shift) / kPerLane;
  const int64_t i = start + lane * kPerLane;
  const Sixteen v = load_input(x, i, in.n, in.vectors);
  const uint32_t key = max_over_lanes(key_of(v, codebook.signed_absmax), lanes_per_block);
  const float m = absmax_from_key(key, codebook.signed_absmax);
  const uint2 codes = encode16<BINS>(v, m, codebook.order[0], codebook.zero_code, table);
  if (i >= in.n) return;
  if ((lane & (lanes_per_block - 1)) == 0) absmax[lane * kPerLane >> in.block_shift] = m;
  store_codes(packed, i, in.n, in.words, codes, codebook.zero_code);
}

// The block at `start`, of 1024 to 4096 elements: read for the absmax, and again (from L1 or L2) for the codes.
template <class T, bool BINS>
__device__ __forceinline__ void quantize_long_block(const T* x, int64_t start, const Input& in,
                                                    const Codebook& codebook, LaneTable table, uint8_t* packed,
                                                    float* absmax) {
  const int64_t block_end = start + (int64_t(1) << in.block_shift), end = block_end < in.n ? block_end : in.n;
  const int lane = int(threadIdx.x) % kLanes;
  uint32_t key = 0;
  for (int64_t i = start + lane * kPerLane; i < end; i += kQuantizeTile) {
    key = larger(key, key_of(load_input(x, i, end, in.vectors), codebook.signed_absmax));
  }
  const float m = absmax_from_key(max_over_lanes(key, kLanes), codebook.signed_absmax);
  if (lane == 0) *absmax = m;
  for (int64_t tile = start; tile < end; tile += kQuantizeTile) {  // all lanes together: encode shuffles
    const int64_t i = tile + lane * kPerLane;
    const Sixteen v = load_input(x, i, end, in.vectors);
    const uint2 codes = encode16<BINS>(v, m, codebook.order[0], codebook.zero_code, table);
    if (i < end) store_codes(packed, i, end, in.words, codes, codebook.zero_code);
  }
}

// What a warp takes at a time: a tile, or a block that is longer than one.
template <class T, bool BINS, bool LONG>
__device__ __forceinline__ void quantize_part(const T* x, int64_t start, const Input& in, const Codebook& codebook,
                                              LaneTable table, uint8_t* packed, float* absmax) {
  if constexpr (LONG) {
    quantize_long_block<T, BINS>(x, start, in, codebook, table, packed, absmax);
  } else {
    quantize_tile<T, BINS>(x, start, in, codebook, table, packed, absmax);
  }
}

inline int block_shift_of(int64_t block_size) {
  const int shift = log2_or_minus_one(block_size);
  if (shift < 5 || shift > 12) throw std::runtime_error("block_size must be a power of two in 32..4096");
  return shift;
}

inline Input input_of(const void* x, int64_t n, int64_t block_size, const uint8_t* packed) {
  return {n, block_shift_of(block_size), aligned(x, 16), aligned(packed, 8)};
}

// kernel(bins usable, blocks longer than a tile): calls f with the two as types.
template <class F>
void with_variant(bool bins, bool is_long, F&& f) {
  if (bins && is_long) f(std::true_type{}, std::true_type{});
  if (bins && !is_long) f(std::true_type{}, std::false_type{});
  if (!bins && is_long) f(std::false_type{}, std::true_type{});
  if (!bins && !is_long) f(std::false_type{}, std::false_type{});
}

}  // namespace qlora::cuda
