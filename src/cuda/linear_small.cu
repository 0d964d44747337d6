// The linear layer for few tokens: y (m, rows) = x (m, cols) W'^T + bias, the weight decoded inside the product.
// Class BOUND; W' has the very bits dequantize gives (round(level * absmax') to the dtype of x), for every m.
// Sums are float32 in a fixed order: the same input gives the same bits on every run.
//
//   bytes     rows * cols * 0.5159 (double quantization) + x + y;  flops 2 m rows cols
//   floor     4096 x 14336 (30.3 MB): 7.1 us at 4.3 TB/s for m = 1..32; 8192 x 8192: 8.1 us
//   predicted mma kernel, m <= 8: 60-70 % of the floor from 8192 x 8192 on. The loop is about 5.2 issue slots a weight
//             (SASS: SHFL, SHF, FMUL, half F2FP, a quarter for loads, x and HMMA), so issue allows 25 weights/clock/SM,
//             77 % of what memory delivers. Below 20 MB of weights launch and tail (2-3 us) dominate. m = 32: x comes
//             from L2 once per 32-128 rows and takes as long as the weights, 40-55 %
//   sm_90a    mma: 80 to 128 registers (m > 16: 157, 194), simt: 64, 96; no spills
//   measured  never: no card was at hand
//
// Two kernels. linear_mma (bf16, f16; sm_80 and later): W rows are the 16-row operand of mma.m16n8k16, tokens the
// 8-column operand, so one decoded weight serves 8 tokens a product and m = 1 wastes tensor cores, not memory. No
// repacking: a product may sum over k in any order, so a lane takes 32 *consecutive* weights of a row (one 16-byte
// load, one absmax) and calls four at a time "its" k of a product; x is read with the same permutation. linear_simt:
// float32, and any dtype on older cards. In both, the warps of a block split k; partial sums meet in shared memory.
#include "../cpp/kernels.h"
#include "common.cuh"

namespace qlora::cuda {
namespace {

constexpr int kWarps = kLinearWarps, kThreads = kWarps * kLanes;

struct Shape {
  int64_t rows;
  int cols, m, block_shift;
};

// --- tensor cores ----------------------------------------------------------------------------------------------------

// c (16 x 8) += a (16 x 16) b (16 x 8). With g = lane / 4, t = lane % 4 (PTX ISA, "mma.m16n8k16"):
//   a[0], a[1]: rows g, g + 8 at k = 2t, 2t + 1;  a[2], a[3]: the same rows at k + 8
//   b0, b1: column g at k = 2t, 2t + 1 and at k + 8;  c[0], c[1]: row g, columns 2t, 2t + 1;  c[2], c[3]: row g + 8
template <class T>
__device__ __forceinline__ void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define QLORA_MMA(type)                                                               \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, bf16>) {
    QLORA_MMA("bf16");
  } else {
    QLORA_MMA("f16");
  }
#undef QLORA_MMA
#elif !defined(__CUDACC__)
  emulator::mma_16816(c, a, b0, b1, [](uint16_t bits) { return to_float(T{bits}); });
#endif
}

// What one lane needs for 128 columns of 16 R rows: 32 weights of row g and of row g + 8 of each of R row tiles.
template <int R>
struct Step {
  uint4 codes[R][2];
  float absmax[R][2];          // the block's absmax, or under double quantization the nested one,
  uint32_t absmax_code[R][2];  // with the 8-bit code
};

// `flat`: position of (row g of the first tile, `col`) in the weight; `rows_left` counts from that row.
template <int R>
__device__ __forceinline__ Step<R> load_step(const uint8_t* packed, const Scales& scales, const Shape& shape,
                                             int64_t flat, int rows_left, int col) {
  Step<R> step;
#pragma unroll
  for (int tile = 0; tile < R; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int below = tile * 16 + half * 8;
      step.codes[tile][half] = make_uint4(0, 0, 0, 0);
      step.absmax[tile][half] = 0.0f;
      step.absmax_code[tile][half] = 0;
      if (below >= rows_left || col >= shape.cols) continue;
      const int64_t first = flat + int64_t(below) * shape.cols, block = first >> shape.block_shift;
      step.codes[tile][half] = load_once(packed + (first >> 1));
      if (scales.absmax.codes == nullptr) {
        step.absmax[tile][half] = __ldg(scales.absmax.absmax + block);
      } else {
        step.absmax_code[tile][half] = __ldg(scales.absmax.codes + block);
        step.absmax[tile][half] = __ldg(scales.absmax.nested_absmax + (block >> scales.nested_shift));
      }
    }
  }
  return step;
}

__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Four weights, elements 4 * part .. + 3 of `word`, as two words of the dtype.
template <class T>
__device__ __forceinline__ void decode4(float lane_level, uint32_t word, int part, float absmax, uint32_t (&out)[2]) {
  float w[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) w[e] = product(level_of(lane_level, word, 4 * part + e), absmax);
  out[0] = pack2(T{}, w[0], w[1]);
  out[1] = pack2(T{}, w[2], w[3]);
}

// R row tiles of 16 a warp, N token tiles of 8. `row_warps` of the 8 warps take different rows, the others split k.
template <class T, int R, int N>
__global__ void __launch_bounds__(kThreads, N == 4 ? 1 : 2)
    linear_mma_kernel(const T* __restrict__ x, const uint8_t* __restrict__ packed,
                      const __grid_constant__ Scales scales, const __grid_constant__ Codebook codebook,
                      const T* __restrict__ bias, T* __restrict__ y, const __grid_constant__ Shape shape,
                      int row_warps) {
  constexpr int kRows = 16 * R, kTokens = 8 * N;
  __shared__ float map[256];
  __shared__ float partial[kWarps][kRows][kTokens + 1];
  const int lane = int(threadIdx.x) % kLanes, warp = int(threadIdx.x) / kLanes, g = lane / 4, t = lane % 4;
  const int row_warp = warp % row_warps, k_warp = warp / row_warps, k_warps = kWarps / row_warps;
  const int64_t block_row = int64_t(blockIdx.x) * row_warps * kRows, row = block_row + row_warp * kRows + g;

  const bool nested = scales.absmax.codes != nullptr;
  const float mean = nested ? __ldg(scales.absmax.mean) : 0.0f;
  const float lane_level = codebook.levels[lane % 16];
  const int64_t rows_below = shape.rows - row;
  const int rows_left = rows_below < kRows ? int(rows_below) : kRows;  // may be negative
  int col = k_warp * kLinearStep + t * 32;                             // of this lane
  int64_t flat = row * shape.cols + col;
  const T* x_lane = x + int64_t(g) * shape.cols + col;  // token g
  Step<R> step = load_step<R>(packed, scales, shape, flat, rows_left, col);
  if (nested) map[threadIdx.x] = __ldg(scales.absmax.map + threadIdx.x);
  __syncthreads();

  float sums[R][N][4] = {};
  const int stride = k_warps * kLinearStep;
  for (int base = k_warp * kLinearStep; base < shape.cols; base += stride) {
    // The next step's weights are under way while this one is multiplied.
    flat += stride;
    const Step<R> ahead = load_step<R>(packed, scales, shape, flat, rows_left, col + stride);
    float absmax[R][2];
#pragma unroll
    for (int tile = 0; tile < R; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float a = step.absmax[tile][half];
        absmax[tile][half] = nested ? double_decode(map[step.absmax_code[tile][half]], a, mean) : a;
      }
    }
#pragma unroll
    for (int word = 0; word < 4; ++word) {  // 8 weights of every row, two products
      uint4 xs[N];
#pragma unroll
      for (int n = 0; n < N; ++n) {
        xs[n] = make_uint4(0, 0, 0, 0);
        if (n * 8 + g < shape.m && col < shape.cols) {
          xs[n] = __ldg(reinterpret_cast<const uint4*>(x_lane + int64_t(n) * 8 * shape.cols + word * 8));
        }
      }
#pragma unroll
      for (int part = 0; part < 2; ++part) {
#pragma unroll
        for (int tile = 0; tile < R; ++tile) {
          uint32_t upper[2], lower[2];
          decode4<T>(lane_level, word_of(step.codes[tile][0], word), part, absmax[tile][0], upper);
          decode4<T>(lane_level, word_of(step.codes[tile][1], word), part, absmax[tile][1], lower);
          const uint32_t a[4] = {upper[0], lower[0], upper[1], lower[1]};
#pragma unroll
          for (int n = 0; n < N; ++n) {
            mma_16816<T>(sums[tile][n], a, word_of(xs[n], 2 * part), word_of(xs[n], 2 * part + 1));
          }
        }
      }
    }
    step = ahead;
    col += stride;
    x_lane += stride;
  }

#pragma unroll
  for (int tile = 0; tile < R; ++tile) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) partial[warp][tile * 16 + g + i / 2 * 8][n * 8 + 2 * t + i % 2] = sums[tile][n][i];
    }
  }
  __syncthreads();
  const int block_rows = row_warps * kRows;
  for (int i = int(threadIdx.x); i < block_rows * shape.m; i += kThreads) {
    const int token = i / block_rows, local = i % block_rows;
    const int64_t r = block_row + local;
    if (r >= shape.rows) continue;
    float sum = 0.0f;
    for (int k = 0; k < k_warps; ++k) sum += partial[k * row_warps + local / kRows][local % kRows][token];
    if (bias != nullptr) sum += to_float(bias[r]);
    y[token * shape.rows + r] = round_to(T{}, sum);
  }
}

// --- plain float32 arithmetic ----------------------------------------------------------------------------------------

constexpr int kSimtRows = 4;  // rows a block: x is read once for all of them

// M tokens at blockIdx.y * M; every warp takes its share of the chunks of 256 columns, 8 a lane.
template <class T, int M>
__global__ void __launch_bounds__(kThreads, M == 1 ? 4 : 2)
    linear_simt_kernel(const T* __restrict__ x, const uint8_t* __restrict__ packed,
                       const __grid_constant__ Scales scales, const __grid_constant__ Codebook codebook,
                       const T* __restrict__ bias, T* __restrict__ y, const __grid_constant__ Shape shape) {
  __shared__ float partial[kWarps][kSimtRows * M];
  const int lane = int(threadIdx.x) % kLanes, warp = int(threadIdx.x) / kLanes;
  const int64_t row = int64_t(blockIdx.x) * kSimtRows;
  const int token = int(blockIdx.y) * M;
  const float lane_level = codebook.levels[lane % 16];

  float sums[kSimtRows][M] = {};
  for (int base = warp * kLanes * 8; base < shape.cols; base += kThreads * 8) {
    const int col = base + lane * 8;
    const bool inside = col < shape.cols;
    uint32_t words[kSimtRows] = {};
    float absmax[kSimtRows] = {};
#pragma unroll
    for (int r = 0; r < kSimtRows; ++r) {
      if (!inside || row + r >= shape.rows) continue;
      const int64_t flat = (row + r) * shape.cols + col;
      words[r] = __ldg(reinterpret_cast<const uint32_t*>(packed + (flat >> 1)));
      absmax[r] = decoding_absmax(scales, flat >> shape.block_shift);
    }
    float xs[M][8] = {};
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if (inside && token + m < shape.m) load8(x + int64_t(token + m) * shape.cols + col, xs[m]);
    }
#pragma unroll
    for (int r = 0; r < kSimtRows; ++r) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float w = to_float(round_to(T{}, product(level_of(lane_level, words[r], e), absmax[r])));
#pragma unroll
        for (int m = 0; m < M; ++m) sums[r][m] = fmaf(w, xs[m][e], sums[r][m]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kSimtRows; ++r) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float sum = sums[r][m];
      for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
      if (lane == 0) partial[warp][r * M + m] = sum;
    }
  }
  __syncthreads();
  const int i = int(threadIdx.x), m = i % M;
  const int64_t r = row + i / M;
  if (i >= kSimtRows * M || r >= shape.rows || token + m >= shape.m) return;
  float sum = 0.0f;
  for (int w = 0; w < kWarps; ++w) sum += partial[w][i];
  if (bias != nullptr) sum += to_float(bias[r]);
  y[(token + m) * shape.rows + r] = round_to(T{}, sum);
}

// --- launching -------------------------------------------------------------------------------------------------------

struct Call {
  const void *x, *bias;
  void *y, *stream;
  const Weight4bit& weight;
  const Codebook& codebook;
  Shape shape;
};

template <class T, int R, int N>
void launch_mma(const Call& c, int row_warps) {
  launch("linear_4bit_forward", linear_mma_kernel<T, R, N>, ceil_div(c.shape.rows, 16 * R * row_warps), 1, kThreads,
         c.stream, static_cast<const T*>(c.x), c.weight.packed, prepare(c.weight.absmax), c.codebook,
         static_cast<const T*>(c.bias), static_cast<T*>(c.y), c.shape, row_warps);
}

template <class T>
void pick_mma(const Call& c, const Device& device) {
  const LinearTiling tiling = linear_tiling(c.shape.rows, c.shape.m, device.multiprocessors);
  const int key = tiling.row_tiles * 10 + tiling.token_tiles;
  if (key == 11) launch_mma<T, 1, 1>(c, tiling.row_warps);
  if (key == 12) launch_mma<T, 1, 2>(c, tiling.row_warps);
  if (key == 14) launch_mma<T, 1, 4>(c, tiling.row_warps);
  if (key == 21) launch_mma<T, 2, 1>(c, tiling.row_warps);
  if (key == 22) launch_mma<T, 2, 2>(c, tiling.row_warps);
  if (key == 24) launch_mma<T, 2, 4>(c, tiling.row_warps);
}

template <class T, int M>
void launch_simt(const Call& c) {
  launch("linear_4bit_forward", linear_simt_kernel<T, M>, ceil_div(c.shape.rows, kSimtRows), ceil_div(c.shape.m, M),
         kThreads, c.stream, static_cast<const T*>(c.x), c.weight.packed, prepare(c.weight.absmax), c.codebook,
         static_cast<const T*>(c.bias), static_cast<T*>(c.y), c.shape);
}

}  // namespace

void linear_4bit_forward(const void* x, DType dtype, int64_t m, const Weight4bit& weight, const Codebook& codebook,
                         const void* bias, void* y, void* stream) {
  const bool shape_fits = m >= 0 && m <= kLinearMaxTokens && weight.cols % 8 == 0 && weight.cols <= INT32_MAX / 2;
  if (!shape_fits || !aligned(x, 16) || !aligned(weight.packed, 16)) {
    throw std::runtime_error("linear_4bit_forward takes at most " + std::to_string(kLinearMaxTokens) +
                             " tokens, a multiple of 8 columns and 16-byte aligned storage; dequantize for others");
  }
  const Call call{x,
                  bias,
                  y,
                  stream,
                  weight,
                  codebook,
                  {weight.rows, int(weight.cols), int(m), log2_or_minus_one(weight.block_size)}};
  if (m == 0) return;
  const Device device = current_device();
  const bool tensor_cores = device.major >= 8 && weight.cols % 32 == 0;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (!std::is_same_v<T, f32>) {
      if (tensor_cores) return pick_mma<T>(call, device);
    }
    m == 1 ? launch_simt<T, 1>(call) : launch_simt<T, 4>(call);
  });
}

}  // namespace qlora::cuda
