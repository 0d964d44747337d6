// The native interface on one page. Every function equals one function of python/qlora_ref/reference/.
// Raw pointers and sizes only; all checks (dtype, device, contiguity, sizes) are made in python/qlora_ref/native.py.
// Every function here is noexcept towards the caller's data: it writes exactly the outputs named, nothing else.
#pragma once
#include "types.h"

namespace qlora {

// reference/blockwise.py: quantize_blockwise
//   x (n) of `dtype` -> packed ((n + 1) / 2), absmax (ceil(n / block_size))
void quantize_4bit(const void* x, DType dtype, int64_t n, int64_t block_size, const Codebook& codebook,
                   uint8_t* packed, float* absmax);

// reference/blockwise.py: dequantize_blockwise (absmax flat or nested)
//   -> out (rows, cols) of `dtype`, row r starting at out + r * row_stride (elements; row_stride >= cols)
void dequantize_4bit(const Weight4bit& weight, const Codebook& codebook, void* out, DType dtype, int64_t row_stride);

// reference/double_quant.py: double_quantize; `mean` is given
//   absmax (n) -> codes (n), nested_absmax (ceil(n / nested_block_size))
void double_quantize(const float* absmax, int64_t n, float mean, int64_t nested_block_size, const Map8& map,
                     uint8_t* codes, float* nested_absmax);

// reference/double_quant.py: double_dequantize -> out (n)
void double_dequantize(const Absmax& absmax, int64_t n, float* out);

// reference/linear.py, base path: y (m, rows) = x (m, cols) W'^T + bias, W' in `dtype`, float32 accumulation,
// one rounding to `dtype` at the end. `bias` (rows) of `dtype` or null.
void linear_4bit_forward(const void* x, DType dtype, int64_t m, const Weight4bit& weight, const Codebook& codebook,
                         const void* bias, void* y);

// dx (m, cols) = dy (m, rows) W'
void linear_4bit_backward(const void* dy, DType dtype, int64_t m, const Weight4bit& weight, const Codebook& codebook,
                          void* dx);

}  // namespace qlora
