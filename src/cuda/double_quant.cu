// Double quantization (reference/double_quant.py): the absmax of every block in 8 bits. Class EXACT.
// Compile with --fmad=false; never with fast-math.
//
//   d = absmax - mean;  nested = max |d| per group;  code = number of map thresholds below d / nested, guarded
//   absmax' = map[code] * nested + mean: two roundings
//
//   bytes     4 a block in, 1 out (or the reverse); 0.92 M blocks of a 4096 x 14336 weight: 4.6 MB = 1.1 us at 4.3 TB/s
//   predicted launch-bound, 3-4 us; run once a weight when it is quantized. Decoding is fused into blockwise.cu and
//             linear_small.cu, so double_dequantize is for inspection only
//   sm_90a    32 registers, no spills
//   measured  never: no card was at hand
#include "../cpp/kernels.h"
#include "common.cuh"
#include "encode.h"

namespace qlora::cuda {
namespace {

constexpr int kThreads = 256;

// Number of the 255 ascending thresholds strictly below s (0 for NaN): eight steps.
__device__ __forceinline__ int search(const float* thresholds, float s) {
  int below = 0;
#pragma unroll
  for (int step = 128; step > 0; step /= 2) below += thresholds[below + step - 1] < s ? step : 0;
  return below;
}

// One group of `size` absmax a block.
__global__ void __launch_bounds__(kThreads)
    double_quantize_kernel(const float* __restrict__ absmax, int64_t n, const float* __restrict__ mean_pointer,
                           int64_t size, const __grid_constant__ Map8 map, uint8_t* __restrict__ codes,
                           float* __restrict__ nested_absmax) {
  __shared__ float thresholds[256];
  __shared__ uint32_t warp_keys[kThreads / kLanes];
  const int thread = int(threadIdx.x);
  const int64_t start = int64_t(blockIdx.x) * size, end = start + size < n ? start + size : n;
  const float mean = *mean_pointer;

  uint32_t key = 0;
  for (int64_t i = start + thread; i < end; i += kThreads) {
    const uint32_t k = absmax_key(absmax[i] - mean, false);
    key = key > k ? key : k;
  }
  for (int step = 1; step < kLanes; step *= 2) {
    const uint32_t other = __shfl_xor_sync(kFullWarp, key, step);
    key = key > other ? key : other;
  }
  thresholds[thread] = thread < 255 ? map.thresholds[thread] : INFINITY;
  if (thread % kLanes == 0) warp_keys[thread / kLanes] = key;
  __syncthreads();
  for (int w = 0; w < kThreads / kLanes; ++w) key = key > warp_keys[w] ? key : warp_keys[w];
  const float nested = absmax_from_key(key, false);

  // The guard: entries ascend, so the lowest that reconstructs to >= 0 is found by counting those that do. None does
  // only in a group that is not finite (or under a negative mean); the reference then takes entry 0.
  const int not_negative = __syncthreads_count(double_decode(map.levels[thread], nested, mean) >= 0.0f);
  const int lowest = not_negative == 0 ? 0 : 256 - not_negative;

  const float inverse = reciprocal(nested);
  for (int64_t i = start + thread; i < end; i += kThreads) {
    const int nearest =
        nested == 0.0f ? map.zero_code : search(thresholds, normalize(absmax[i] - mean, nested, inverse));
    codes[i] = uint8_t(nearest > lowest ? nearest : lowest);
  }
  if (thread == 0) nested_absmax[blockIdx.x] = nested;
}

__global__ void __launch_bounds__(kThreads)
    double_dequantize_kernel(const __grid_constant__ Scales scales, int64_t n, float* __restrict__ out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) out[i] = decoding_absmax(scales, i);
}

}  // namespace

void double_quantize(const float* absmax, int64_t n, const float* mean, int64_t nested_block_size, const Map8& map,
                     uint8_t* codes, float* nested_absmax, void* stream) {
  launch("double_quantize", double_quantize_kernel, ceil_div(n, nested_block_size), 1, kThreads, stream, absmax, n,
         mean, nested_block_size, map, codes, nested_absmax);
}

void double_dequantize(const Absmax& absmax, int64_t n, float* out, void* stream) {
  launch("double_dequantize", double_dequantize_kernel, ceil_div(n, kThreads), 1, kThreads, stream, prepare(absmax), n,
         out);
}

}  // namespace qlora::cuda
