// AdamW (reference/adamw.py) on many runs of elements at once: float32 or bf16 parameters, float32 or 8-bit moments.
// Class EXACT, but for the two powers of beta that CUDA computes to 2 ulp of float64: a different float32 once in 1e8
// steps. Order `fused` is that of torch's fused CUDA kernel for float32. Compile with --fmad=false; never with fast-math.
//
//   one launch for all runs that fit a kernel parameter (500, or 64 before CUDA 13); no table is copied to the device
//   steps are read from the device, so a captured graph goes on counting
//   bytes     an element: 28 float32 parameter and moments, 22 bf16 parameter, 10.06 bf16 with 8-bit moments, 16.06 float32
//   floor     0.8 G elements (65B, r = 64) at 4.3 TB/s (measured copy of an H200): 5.2, 4.1, 1.9, 3.0 ms
//   predicted 85-90 % of that with float32 moments (some 60 instructions an element: memory leads by 4). 8-bit: two
//             bisections are 16 loads from shared memory an element, some 1.2 cycles an element and SM with their bank
//             conflicts, which is 4.2 ms on an H100: twice the bf16 floor. Bins of the exponent would be next
//   measured  never: no card was at hand
#include "../cpp/adamw_math.h"
#include "../cpp/kernels.h"
#include "common.cuh"

namespace qlora::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kLanes;
constexpr int kVector = 4;         // elements a thread loads at once: 16 bytes of float32
constexpr int64_t kChunk = 16384;  // elements of one block

#if defined(CUDART_VERSION) && CUDART_VERSION >= 13000
constexpr int kParameterBytes = 32764;  // every driver that runs a CUDA 13 binary allows it
#else
constexpr int kParameterBytes = 4096;
#endif

// Runs of one launch. Block b works on run k with first_chunk[k] <= b < first_chunk[k + 1].
template <class Piece>
struct Batch {
  static constexpr int kMax = (kParameterBytes - 128) / int(sizeof(Piece) + sizeof(int64_t));
  AdamWScalars scalars;
  int64_t first_chunk[kMax + 1];
  Piece pieces[kMax];
  int count;
};

template <class Piece>
__device__ __forceinline__ int find(const Batch<Piece>& batch, int64_t block) {
  int low = 0, high = batch.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (batch.first_chunk[middle] <= block ? low : high) = middle;
  }
  return low;
}

// The run's coefficients, computed once a block: the powers are float64.
template <AdamWOrder order>
__device__ __forceinline__ AdamWCoefficients coefficients(const AdamWScalars& scalars, const float* step) {
  __shared__ AdamWCoefficients shared;
  if (threadIdx.x == 0) shared = adamw_coefficients(scalars, *step, order);
  __syncthreads();
  return shared;
}

__device__ __forceinline__ bool multiple(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

__device__ __forceinline__ void load4(const f32* x, float (&v)[kVector]) {
  const float4 a = *reinterpret_cast<const float4*>(x);
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
}
__device__ __forceinline__ void load4(const bf16* x, float (&v)[kVector]) {
  const uint2 words = *reinterpret_cast<const uint2*>(x);
  v[0] = bf16_to_float(uint16_t(words.x)), v[1] = bf16_to_float(uint16_t(words.x >> 16));
  v[2] = bf16_to_float(uint16_t(words.y)), v[3] = bf16_to_float(uint16_t(words.y >> 16));
}
__device__ __forceinline__ void load4(const float* x, float (&v)[kVector]) {
  load4(reinterpret_cast<const f32*>(x), v);
}
__device__ __forceinline__ void store4(f32* x, const float (&v)[kVector]) { store16(x, v); }
__device__ __forceinline__ void store4(bf16* x, const float (&v)[kVector]) {
  *reinterpret_cast<uint2*>(x) = uint2{pack2(bf16{}, v[0], v[1]), pack2(bf16{}, v[2], v[3])};
}
__device__ __forceinline__ void store4(float* x, const float (&v)[kVector]) { store4(reinterpret_cast<f32*>(x), v); }

template <class T, AdamWOrder order>
__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ Batch<AdamWPiece> batch) {
  const int64_t block = blockIdx.x;
  const int k = find(batch, block);
  const AdamWPiece& piece = batch.pieces[k];
  const AdamWCoefficients c = coefficients<order>(batch.scalars, piece.step);
  T* param = static_cast<T*>(piece.param);
  const T* grad = static_cast<const T*>(piece.grad);
  float *exp_avg = piece.exp_avg, *exp_avg_sq = piece.exp_avg_sq;

  const int64_t start = (block - batch.first_chunk[k]) * kChunk;
  const int64_t end = start + kChunk < piece.n ? start + kChunk : piece.n;
  const bool vectors = multiple(param, kVector * sizeof(T)) && multiple(grad, kVector * sizeof(T)) &&
                       multiple(exp_avg, 16) && multiple(exp_avg_sq, 16);
  const int64_t vector_end = vectors ? end - (end - start) % kVector : start;

  for (int64_t i = start + int64_t(threadIdx.x) * kVector; i < vector_end; i += kThreads * kVector) {
    float theta[kVector], g[kVector], m[kVector], v[kVector];
    load4(param + i, theta), load4(grad + i, g), load4(exp_avg + i, m), load4(exp_avg_sq + i, v);
#pragma unroll
    for (int e = 0; e < kVector; ++e) adamw_element<order>(theta[e], g[e], m[e], v[e], c);
    store4(param + i, theta), store4(exp_avg + i, m), store4(exp_avg_sq + i, v);
  }
  for (int64_t i = vector_end + threadIdx.x; i < end; i += kThreads) {
    float theta = to_float(param[i]), m = exp_avg[i], v = exp_avg_sq[i];
    adamw_element<order>(theta, to_float(grad[i]), m, v, c);
    param[i] = round_to(T{}, theta), exp_avg[i] = m, exp_avg_sq[i] = v;
  }
}

// --- 8-bit moments: a warp works on one block of 256, 8 elements a lane ------------------------------------------------

constexpr int kPerLane = kStateBlock / kLanes;

__device__ __forceinline__ void load_codes(const uint8_t* codes, int (&out)[kPerLane]) {
  const uint2 words = *reinterpret_cast<const uint2*>(codes);
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) out[e] = int((e < 4 ? words.x : words.y) >> (e % 4 * 8) & 255u);
}
__device__ __forceinline__ void store_codes(uint8_t* codes, const int (&in)[kPerLane]) {
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) words[e / 4] |= uint32_t(in[e]) << (e % 4 * 8);
  *reinterpret_cast<uint2*>(codes) = uint2{words[0], words[1]};
}
__device__ __forceinline__ void store8(f32* x, const float (&v)[8]) {
  store16(x, {v[0], v[1], v[2], v[3]}), store16(x + 4, {v[4], v[5], v[6], v[7]});
}
__device__ __forceinline__ void store8(bf16* x, const float (&v)[8]) { store16(x, v); }

__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

__device__ __forceinline__ float warp_absmax(const float (&x)[kPerLane]) {
  uint32_t key = 0;
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) key = larger(key, magnitude_key(x[e]));
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) key = larger(key, __shfl_xor_sync(kFullWarp, key, step));
  return absmax_of_key(key);
}

__device__ __forceinline__ void encode(const float (&x)[kPerLane], float absmax, const float* thresholds, int zero_code,
                                       int lowest, int (&codes)[kPerLane]) {
  const float inverse = reciprocal(absmax);
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) {
    const int below = count_below_255(thresholds, normalize(x[e], absmax, inverse));
    codes[e] = moment_code(below, x[e], absmax, zero_code, lowest);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    adamw_8bit_kernel(const __grid_constant__ Batch<AdamW8bitPiece> batch, const Map8* __restrict__ maps) {
  __shared__ float levels[2][256], thresholds[2][256];
  for (int i = int(threadIdx.x); i < 512; i += kThreads) {
    levels[i / 256][i % 256] = maps[i / 256].levels[i % 256];
    if (i % 256 < 255) thresholds[i / 256][i % 256] = maps[i / 256].thresholds[i % 256];
  }
  const int64_t block = blockIdx.x;
  const int k = find(batch, block), warp = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes;
  const AdamW8bitPiece& piece = batch.pieces[k];
  const AdamWCoefficients c = coefficients<AdamWOrder::loop>(batch.scalars, piece.step);  // synchronizes
  const bool vectors = multiple(piece.param, 16) && multiple(piece.grad, 16) && multiple(piece.m_codes, kPerLane) &&
                       multiple(piece.v_codes, kPerLane);

  const int64_t first = (block - batch.first_chunk[k]) * (kChunk / kStateBlock);
  for (int64_t b = first + warp; b < first + kChunk / kStateBlock && b * kStateBlock < piece.n; b += kWarps) {
    const int64_t i = b * kStateBlock + lane * kPerLane;
    const int inside = int(piece.n - i < 0 ? 0 : piece.n - i < kPerLane ? piece.n - i : kPerLane);  // of my 8
    const bool whole = vectors && inside == kPerLane;
    T* param = static_cast<T*>(piece.param) + i;
    const T* grad = static_cast<const T*>(piece.grad) + i;
    uint8_t *m_at = piece.m_codes + i, *v_at = piece.v_codes + i;

    float theta[kPerLane] = {}, g[kPerLane] = {}, m[kPerLane], v[kPerLane];
    int m_codes[kPerLane] = {}, v_codes[kPerLane] = {};
    if (whole) {
      load8(param, theta), load8(grad, g), load_codes(m_at, m_codes), load_codes(v_at, v_codes);
    } else {
#pragma unroll
      for (int e = 0; e < kPerLane; ++e) {
        if (e < inside)
          theta[e] = to_float(param[e]), g[e] = to_float(grad[e]), m_codes[e] = m_at[e], v_codes[e] = v_at[e];
      }
    }
    const float m_old = piece.m_absmax[b], v_old = piece.v_absmax[b];
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) {
      m[e] = levels[0][m_codes[e]] * m_old, v[e] = levels[1][v_codes[e]] * v_old;
      adamw_element<AdamWOrder::loop>(theta[e], g[e], m[e], v[e], c);
      if (e >= inside) m[e] = v[e] = 0.0f;  // no part in the absmax
    }
    const float m_absmax = warp_absmax(m), v_absmax = warp_absmax(v);
    encode(m, m_absmax, thresholds[0], maps[0].zero_code, 0, m_codes);
    encode(v, v_absmax, thresholds[1], maps[1].zero_code, 1, v_codes);
    if (whole) {
      store8(param, theta), store_codes(m_at, m_codes), store_codes(v_at, v_codes);
    } else {
#pragma unroll
      for (int e = 0; e < kPerLane; ++e) {
        if (e < inside)
          param[e] = round_to(T{}, theta[e]), m_at[e] = uint8_t(m_codes[e]), v_at[e] = uint8_t(v_codes[e]);
      }
    }
    if (lane == 0) piece.m_absmax[b] = m_absmax, piece.v_absmax[b] = v_absmax;
  }
}

// Fill batches with runs, cut at 2^31 - 1 blocks, and hand each to `start(batch, blocks)`.
template <class Piece, class Start>
void in_batches(const Piece* pieces, int64_t count, const AdamWScalars& scalars, Start&& start) {
  Batch<Piece> batch{};
  batch.scalars = scalars;
  auto flush = [&] {
    if (batch.count > 0) start(batch, batch.first_chunk[batch.count]);
    batch.count = 0;
  };
  for (int64_t k = 0; k < count; ++k) {
    const int64_t chunks = ceil_div(pieces[k].n, kChunk);
    if (chunks == 0) continue;
    if (batch.count == Batch<Piece>::kMax || batch.first_chunk[batch.count] + chunks > 0x7fffffff) flush();
    batch.first_chunk[0] = 0;
    batch.pieces[batch.count] = pieces[k];
    batch.first_chunk[batch.count + 1] = batch.first_chunk[batch.count] + chunks;
    ++batch.count;
  }
  flush();
}

template <class T>
void start_adamw(const Batch<AdamWPiece>& batch, int64_t blocks, AdamWOrder order, void* stream) {
  auto kernel = order == AdamWOrder::loop ? adamw_kernel<T, AdamWOrder::loop> : adamw_kernel<T, AdamWOrder::fused>;
  launch("adamw", kernel, blocks, 1, kThreads, stream, batch);
}

}  // namespace

void adamw(const AdamWPiece* pieces, int64_t count, DType dtype, const AdamWScalars& scalars, AdamWOrder order,
           void* stream) {
  in_batches(pieces, count, scalars, [&](const Batch<AdamWPiece>& batch, int64_t blocks) {
    if (dtype == DType::f32) start_adamw<f32>(batch, blocks, order, stream);
    if (dtype == DType::bf16) start_adamw<bf16>(batch, blocks, order, stream);
  });
}

void adamw_8bit(const AdamW8bitPiece* pieces, int64_t count, DType dtype, const AdamWScalars& scalars, const Map8* maps,
                void* stream) {
  in_batches(pieces, count, scalars, [&](const Batch<AdamW8bitPiece>& batch, int64_t blocks) {
    auto kernel = dtype == DType::f32 ? adamw_8bit_kernel<f32> : adamw_8bit_kernel<bf16>;
    launch("adamw_8bit", kernel, blocks, 1, kThreads, stream, batch, maps);
  });
}

}  // namespace qlora::cuda
