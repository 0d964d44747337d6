// How a thread block quantizes one nested group of absmax to 8 bits. Shared by double_quant.cu (absmax in memory) and
// quantize_nested.cu (absmax in shared memory). Compile with --fmad=false; never with fast-math.
#pragma once
#include "common.cuh"
#include "encode.h"

namespace qlora::cuda {

constexpr int kGroupThreads = 256;

struct GroupShared {
  float thresholds[256];
  uint32_t warp_keys[kGroupThreads / kLanes];
};

// Number of the 255 ascending thresholds strictly below s (0 for NaN): eight steps.
__device__ __forceinline__ int search(const float* thresholds, float s) {
  int below = 0;
#pragma unroll
  for (int step = 128; step > 0; step /= 2) below += thresholds[below + step - 1] < s ? step : 0;
  return below;
}

// `size` absmax, readable by all 256 threads, -> their codes and the one nested absmax. Every thread must come.
__device__ __forceinline__ void double_quantize_group(const float* absmax, int size, float mean, const Map8& map,
                                                      GroupShared& shared, uint8_t* codes, float* nested_absmax) {
  const int thread = int(threadIdx.x);
  uint32_t key = 0;
  for (int i = thread; i < size; i += kGroupThreads) {
    const uint32_t k = absmax_key(absmax[i] - mean, false);
    key = key > k ? key : k;
  }
  for (int step = 1; step < kLanes; step *= 2) {
    const uint32_t other = __shfl_xor_sync(kFullWarp, key, step);
    key = key > other ? key : other;
  }
  shared.thresholds[thread] = thread < 255 ? map.thresholds[thread] : INFINITY;
  if (thread % kLanes == 0) shared.warp_keys[thread / kLanes] = key;
  __syncthreads();
  for (uint32_t k : shared.warp_keys) key = key > k ? key : k;
  const float nested = absmax_from_key(key, false);

  // The guard: entries ascend, so the lowest that reconstructs to >= 0 is found by counting those that do. None does
  // only in a group that is not finite (or under a negative mean); the reference then takes entry 0.
  const int not_negative = __syncthreads_count(double_decode(map.levels[thread], nested, mean) >= 0.0f);
  const int lowest = not_negative == 0 ? 0 : 256 - not_negative;

  const float inverse = reciprocal(nested);
  for (int i = thread; i < size; i += kGroupThreads) {
    const int nearest =
        nested == 0.0f ? map.zero_code : search(shared.thresholds, normalize(absmax[i] - mean, nested, inverse));
    codes[i] = uint8_t(nearest > lowest ? nearest : lowest);
  }
  if (thread == 0) *nested_absmax = nested;
}

}  // namespace qlora::cuda
