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
#include "double_quant.cuh"

namespace qlora::cuda {
namespace {

constexpr int kThreads = kGroupThreads;

// One group of `size` absmax a block.
__global__ void __launch_bounds__(kThreads)
    double_quantize_kernel(const float* __restrict__ absmax, int64_t n, const float* __restrict__ mean, int size,
                           const __grid_constant__ Map8 map, uint8_t* __restrict__ codes,
                           float* __restrict__ nested_absmax) {
  __shared__ GroupShared shared;
  const int64_t start = int64_t(blockIdx.x) * size, left = n - start;
  double_quantize_group(absmax + start, left < size ? int(left) : size, *mean, map, shared, codes + start,
                        nested_absmax + blockIdx.x);
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
         mean, int(nested_block_size), map, codes, nested_absmax);
}

void double_dequantize(const Absmax& absmax, int64_t n, float* out, void* stream) {
  launch("double_dequantize", double_dequantize_kernel, ceil_div(n, kThreads), 1, kThreads, stream, prepare(absmax), n,
         out);
}

}  // namespace qlora::cuda
