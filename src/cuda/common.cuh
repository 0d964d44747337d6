// What every kernel shares: the three element types, 16-byte vectors, decoding of absmax, launching with a check.
//
// The same sources also compile as plain C++ with `-include tests/cuda_emulator.h` (no nvcc, no card): that is how the
// kernels' logic is held to the reference on a CPU. Hence no <<<>>> outside `launch`, and device intrinsics only here.
#pragma once
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../cpp/math.h"
#include "../cpp/types.h"
#include "index.h"

namespace qlora::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

// --- element types: storage only, arithmetic is float32 --------------------------------------------------------------

struct f32 {
  float value;
};
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(f32 x) { return x.value; }
__device__ __forceinline__ float to_float(bf16 x) { return bf16_to_float(x.bits); }
__device__ __forceinline__ float to_float(f16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  return f16_to_float(x.bits);
#endif
}

// Two numbers rounded to nearest even, `low` in the lower half of the word.
__device__ __forceinline__ uint32_t pack2(bf16, float low, float high) {
#ifdef __CUDA_ARCH__
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&pair);
#else
  return uint32_t(float_to_bf16(high)) << 16 | float_to_bf16(low);
#endif
}
__device__ __forceinline__ uint32_t pack2(f16, float low, float high) {
#ifdef __CUDA_ARCH__
  __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&pair);
#else
  return uint32_t(float_to_f16(high)) << 16 | float_to_f16(low);
#endif
}

__device__ __forceinline__ f32 round_to(f32, float x) { return {x}; }
template <class T>
__device__ __forceinline__ T round_to(T type, float x) {
  return {uint16_t(pack2(type, x, 0.0f))};
}

// Eight elements as float32, or eight float32 as elements. Both pointers 16-byte aligned.
__device__ __forceinline__ void load8(const f32* x, float (&v)[8]) {
  float4 a = *reinterpret_cast<const float4*>(x), b = *reinterpret_cast<const float4*>(x + 4);
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
template <class T>
__device__ __forceinline__ void load8(const T* x, float (&v)[8]) {
  uint4 words = *reinterpret_cast<const uint4*>(x);
  const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = to_float(T{uint16_t(w[i])});
    v[2 * i + 1] = to_float(T{uint16_t(w[i] >> 16)});
  }
}
// kPerStore<T> elements are 16 bytes.
template <class T>
constexpr int kPerStore = 16 / int(sizeof(T));
__device__ __forceinline__ void store16(f32* out, const float (&v)[4]) {
  *reinterpret_cast<float4*>(out) = make_float4(v[0], v[1], v[2], v[3]);
}
template <class T>
__device__ __forceinline__ void store16(T* out, const float (&v)[8]) {
  *reinterpret_cast<uint4*>(out) =
      make_uint4(pack2(T{}, v[0], v[1]), pack2(T{}, v[2], v[3]), pack2(T{}, v[4], v[5]), pack2(T{}, v[6], v[7]));
}

// 16 bytes read once by the whole grid: not worth a place in L1.
__device__ __forceinline__ uint4 load_once(const void* address) {
#ifdef __CUDA_ARCH__
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
#else
  return *static_cast<const uint4*>(address);
#endif
}

__device__ __forceinline__ float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  return __frcp_rn(x);
#else
  return 1.0f / x;
#endif
}

// Level times absmax: never contracted with what follows, whatever the flags.
__device__ __forceinline__ float product(float level, float scale) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(level, scale);
#else
  return level * scale;
#endif
}

// --- codes and absmax ------------------------------------------------------------------------------------------------

// Levels live in the lanes of a warp: lane i holds levels[i % 16], and a shuffle of width 16 is the table lookup.
// A shuffle uses the low bits of its index only, so the codes above need no mask.
__device__ __forceinline__ float level_of(float lane_level, uint32_t word, int element) {
  return __shfl_sync(kFullWarp, lane_level, int(word >> nibble_shift(element)), 16);
}

// struct Absmax with its division turned into a shift.
struct Scales {
  Absmax absmax;
  int nested_shift;
};

inline Scales prepare(const Absmax& absmax) {
  const int shift = log2_or_minus_one(absmax.nested_block_size);
  if (absmax.codes != nullptr && shift < 0) throw std::runtime_error("nested_block_size must be a power of two");
  return {absmax, shift};
}

// The absmax that decodes block `b`: two dependent loads under double quantization, both hit L1 or L2.
__device__ __forceinline__ float decoding_absmax(const Scales& scales, int64_t b) {
  const Absmax& a = scales.absmax;
  if (a.codes == nullptr) return __ldg(a.absmax + b);
  float nested = __ldg(a.nested_absmax + (b >> scales.nested_shift));
  return double_decode(__ldg(a.map + __ldg(a.codes + b)), nested, __ldg(a.mean));
}

// --- launching -------------------------------------------------------------------------------------------------------

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::string sentence = std::string(what) + " failed: " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice) {
    sentence += "; this card is not among the targets of the build, rebuild with -DQLORA_CUDA_ARCHS=native";
  } else if (error == cudaErrorInsufficientDriver) {
    sentence +=
        "; the NVIDIA driver is older than the CUDA runtime of the build, update the driver or build with an "
        "older CUDA toolkit";
  } else {
    sentence += "; an earlier kernel may be the cause, rerun with CUDA_LAUNCH_BLOCKING=1";
  }
  throw std::runtime_error(sentence);
}

// The card that is current: cuda_backend.py makes it that of the tensors.
struct Device {
  int major, multiprocessors;
};

// Attributes are cached by the driver; asking neither synchronises nor allocates.
inline Device current_device() {
#ifdef __CUDACC__
  int id = 0;
  Device device{};
  check(cudaGetDevice(&id), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, id), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, id), "cudaDeviceGetAttribute");
  return device;
#else
  return emulator::device<Device>();
#endif
}

inline bool aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// `blocks_x` x `blocks_y` blocks of `threads` on the caller's stream. No allocation, no synchronisation: capturable.
template <class... Parameters, class... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), int64_t blocks_x, int64_t blocks_y, int threads,
            void* stream, const Arguments&... arguments) {
  if (blocks_x == 0 || blocks_y == 0) return;
  if (blocks_x > 0x7fffffff || blocks_y > 0xffff) {
    throw std::runtime_error(std::string(what) + ": the tensor is too large for one launch; split it along its rows");
  }
#ifdef __CUDACC__
  kernel<<<dim3(unsigned(blocks_x), unsigned(blocks_y)), threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), what);
#else
  (void)stream;
  emulator::run(unsigned(blocks_x), unsigned(blocks_y), unsigned(threads), [&] { kernel(arguments...); });
#endif
}

// Call f with an element of the C++ type that stands for `dtype`.
template <class F>
void with_type(DType dtype, F&& f) {
  if (dtype == DType::f32) f(f32{});
  if (dtype == DType::bf16) f(bf16{});
  if (dtype == DType::f16) f(f16{});
}

}  // namespace qlora::cuda
