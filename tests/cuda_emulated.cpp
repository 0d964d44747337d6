// The launchers of src/cuda behind C names with flat arguments (those of bindings.cpp), for ctypes. Compiled together
// with the .cu files, all through cuda_emulator.h; called by tests/test_cuda_emulated.py.
#include <stdexcept>

#include "../src/cpp/kernels.h"
#include "../src/cuda/encode.h"
#include "../src/cuda/index.h"

using namespace qlora;

#define WEIGHT_PARAMETERS                                                                                       \
  const uint8_t *packed, const float *absmax, const uint8_t *codes, const float *nested, const float *mean,     \
      const float *map, int64_t nested_block_size, int64_t rows, int64_t cols, int64_t block_size,              \
      const Codebook *codebook
#define WEIGHT \
  Weight4bit { packed, {absmax, codes, nested, mean, map, nested_block_size}, rows, cols, block_size }

extern "C" {

void quantize_4bit(const void* x, int dtype, int64_t n, int64_t block_size, const Codebook* codebook, uint8_t* packed,
                   float* absmax) {
  cuda::quantize_4bit(x, DType(dtype), n, block_size, *codebook, packed, absmax, nullptr);
}

void quantize_4bit_nested(const void* x, int dtype, int64_t n, int64_t block_size, const Codebook* codebook,
                          const float* mean, int64_t nested_block_size, const Map8* map, uint8_t* packed,
                          uint8_t* absmax_codes, float* nested_absmax) {
  cuda::quantize_4bit_nested(x, DType(dtype), n, block_size, *codebook, mean, nested_block_size, *map, packed,
                             absmax_codes, nested_absmax, nullptr);
}

void dequantize_4bit(WEIGHT_PARAMETERS, void* out, int dtype, int64_t row_stride) {
  cuda::dequantize_4bit(WEIGHT, *codebook, out, DType(dtype), row_stride, nullptr);
}

void double_quantize(const float* absmax, int64_t n, const float* mean, int64_t nested_block_size, const Map8* map,
                     uint8_t* codes, float* nested) {
  cuda::double_quantize(absmax, n, mean, nested_block_size, *map, codes, nested, nullptr);
}

void double_dequantize(const uint8_t* codes, const float* nested, const float* mean, const float* map,
                       int64_t nested_block_size, int64_t n, float* out) {
  cuda::double_dequantize({nullptr, codes, nested, mean, map, nested_block_size}, n, out, nullptr);
}

void linear_4bit_forward(const void* x, int dtype, int64_t m, WEIGHT_PARAMETERS, const void* bias, void* y) {
  cuda::linear_4bit_forward(x, DType(dtype), m, WEIGHT, *codebook, bias, y, nullptr);
}

void set_device(int major, int multiprocessors) {
  emulator::device_major = major;
  emulator::device_multiprocessors = multiprocessors;
}

int64_t position(int64_t i, int64_t cols, int64_t row_stride) { return cuda::strided_position(i, cols, row_stride); }

int64_t position_in_tile(int64_t row, int64_t col, uint32_t offset, int64_t cols, int64_t row_stride) {
  return cuda::strided_position(row, col, offset, cols, row_stride);
}

int64_t divide(int64_t n, int64_t divisor) { return cuda::divide(n, cuda::make_divider(divisor)); }

void tiling(int64_t rows, int m, int multiprocessors, int* out) {
  const cuda::LinearTiling t = cuda::linear_tiling(rows, m, multiprocessors);
  out[0] = t.row_tiles, out[1] = t.token_tiles, out[2] = t.row_warps;
}

// Whether the bin table serves this codebook; else the kernels search.
int bins_usable(const Codebook* codebook) { return cuda::make_bins(*codebook).usable; }

}  // extern "C"
