// The native interface on one page. Every function equals one function of python/qlora_ref/reference/.
// Raw pointers and sizes only; all checks (dtype, device, contiguity, sizes) are made in python/qlora_ref/backend.py and
// arguments.py.
// Every function writes exactly the outputs named, nothing else.
#pragma once
#include <string>
#include <vector>

#include "adamw_math.h"
#include "types.h"

namespace qlora {

// reference/blockwise.py: quantize_blockwise
//   x (n) of `dtype` -> packed ((n + 1) / 2), absmax (ceil(n / block_size))
void quantize_4bit(const void* x, DType dtype, int64_t n, int64_t block_size, const Codebook& codebook, uint8_t* packed,
                   float* absmax);

// reference/blockwise.py: dequantize_blockwise (absmax flat or nested)
//   -> out (rows, cols) of `dtype`, row r starting at out + r * row_stride (elements; row_stride >= cols)
void dequantize_4bit(const Weight4bit& weight, const Codebook& codebook, void* out, DType dtype, int64_t row_stride);

// quantize_4bit, then reference/double_quant.py: absmax_mean and double_quantize of its absmax
//   x (n) of `dtype` -> packed, absmax (as quantize_4bit), mean (1), absmax_codes, nested_absmax (as double_quantize)
// False, and only packed and absmax valid, where the mean is not certain: if the sum could round to another float32 in
// another order of adding (then the reference must say), or if n is 0 or an absmax negative or NaN.
bool quantize_4bit_double(const void* x, DType dtype, int64_t n, int64_t block_size, const Codebook& codebook,
                          int64_t nested_block_size, const Map8& map, uint8_t* packed, float* absmax, float* mean,
                          uint8_t* absmax_codes, float* nested_absmax);

// reference/double_quant.py: double_quantize; `mean` is given
//   absmax (n) -> codes (n), nested_absmax (ceil(n / nested_block_size))
void double_quantize(const float* absmax, int64_t n, float mean, int64_t nested_block_size, const Map8& map,
                     uint8_t* codes, float* nested_absmax);

// Both at once, for a mean that is known: quantize_blockwise, then double_quantize of its absmax
//   x (n) of `dtype` -> packed ((n + 1) / 2), absmax_codes (ceil(n / block_size)), nested_absmax (of those)
void quantize_4bit_nested(const void* x, DType dtype, int64_t n, int64_t block_size, const Codebook& codebook,
                          float mean, int64_t nested_block_size, const Map8& map, uint8_t* packed,
                          uint8_t* absmax_codes, float* nested_absmax);

// reference/double_quant.py: double_dequantize -> out (n)
void double_dequantize(const Absmax& absmax, int64_t n, float* out);

// reference/linear.py, base path: y (m, rows) = x (m, cols) W'^T + bias, W' in `dtype`, float32 accumulation, one rounding
// to `dtype` at the end. `bias` (rows) of `dtype` or null. Only where can_... says so, which may depend on m; elsewhere
// cpu_linear.py multiplies parts from dequantize_region with torch's own product.
bool can_linear_4bit_forward(DType dtype, int64_t m, int64_t cols, int64_t block_size);
void linear_4bit_forward(const void* x, DType dtype, int64_t m, const Weight4bit& weight, const Codebook& codebook,
                         const void* bias, void* y);

// reference/linear.py, base path: dx (m, cols) = dy (m, rows) W', likewise, for any m where can_... says so.
bool can_linear_4bit_backward(DType dtype, int64_t rows);
void linear_4bit_backward(const void* dy, DType dtype, int64_t m, const Weight4bit& weight, const Codebook& codebook,
                          void* dx);

// Part of the weight -> out (rows, cols) of `dtype`, contiguous
void dequantize_region(const Weight4bit& weight, const Codebook& codebook, int64_t first_row, int64_t rows,
                       int64_t first_col, int64_t cols, void* out, DType dtype);

// --- LoRA (reference/linear.py), only where can_... says so; the linear layer must be possible too ----------------------
// A and B are of `dtype` (f32 or bf16) or, as f32, rounded to it; u = scaling x A^T and v = scaling dy B are stored in it;
// float32 accumulation, one rounding of every output; for 32 tokens and fewer y is rounded before u B^T too.

bool can_lora(DType dtype, int64_t rank);
// y (m, out) = x W'^T + bias + u B^T
void lora_linear_4bit_forward(const void* x, DType dtype, int64_t m, const Weight4bit& weight, const Codebook& codebook,
                              const void* bias, const Lora& lora, void* y);
// dA (rank, in) = v^T x, dB (out, rank) = dy^T u in the dtypes of A and B; dx (m, in) = dy W' + v A, or null
struct LoraGradients {
  void *dA, *dB, *dx;
};
void lora_linear_4bit_backward(const void* dy, const void* x, DType dtype, int64_t m, const Weight4bit& weight,
                               const Codebook& codebook, const Lora& lora, const LoraGradients& out);

// --- AdamW (reference/adamw.py): `count` runs of elements in one call, updated in place -------------------------------

void adamw(const AdamWPiece* pieces, int64_t count, DType dtype, const AdamWScalars& scalars, AdamWOrder order);
// `maps`: the map of m and that of v.
void adamw_8bit(const AdamW8bitPiece* pieces, int64_t count, DType dtype, const AdamWScalars& scalars,
                const Map8* maps);

// --- memory -------------------------------------------------------------------------------------------------------

// Ask for pages of 2 MB, before the memory is first written. Only whole pages inside are meant.
void advise_huge_pages(void* memory, int64_t bytes);

// --- threads ------------------------------------------------------------------------------------------------------

// How many threads the calls made from this thread may use (cpu_backend.py passes torch.get_num_threads()).
void set_num_threads(int threads);

// --- variants: the same functions compiled for more of the instruction set -----------------------------------------

// Names of the variants compiled in that this CPU can run, slowest first ("scalar" is always there).
std::vector<std::string> cpu_variants();
// The one in use; at start the last of cpu_variants() (native.py then sets what QLORA_CPU_VARIANT names).
std::string cpu_variant();
// Throws std::invalid_argument with a sentence if `name` is not one of cpu_variants().
void set_cpu_variant(const std::string& name);

// --- CUDA: the same functions on the device of `stream` (a cudaStream_t); they throw std::runtime_error -------------
// Built only where nvcc is (QLORA_HAS_CUDA). All pointers are device pointers; a call returns before the work is done.
namespace cuda {

void quantize_4bit(const void* x, DType dtype, int64_t n, int64_t block_size, const Codebook& codebook, uint8_t* packed,
                   float* absmax, void* stream);
void dequantize_4bit(const Weight4bit& weight, const Codebook& codebook, void* out, DType dtype, int64_t row_stride,
                     void* stream);
void double_quantize(const float* absmax, int64_t n, const float* mean, int64_t nested_block_size, const Map8& map,
                     uint8_t* codes, float* nested_absmax, void* stream);
void quantize_4bit_nested(const void* x, DType dtype, int64_t n, int64_t block_size, const Codebook& codebook,
                          const float* mean, int64_t nested_block_size, const Map8& map, uint8_t* packed,
                          uint8_t* absmax_codes, float* nested_absmax, void* stream);
void double_dequantize(const Absmax& absmax, int64_t n, float* out, void* stream);
// m <= 32 and cols % 8 == 0 only; for more tokens, and backward, python/qlora_ref/cuda_linear.py dequantizes and calls
// cuBLAS through torch.
void linear_4bit_forward(const void* x, DType dtype, int64_t m, const Weight4bit& weight, const Codebook& codebook,
                         const void* bias, void* y, void* stream);

// CUDA versions as 1000 * major + 10 * minor; 0 where there is no driver. Neither creates a context.
int driver_version();
int runtime_version();
// Compute capability of every visible card as 10 * major + minor.
std::vector<int> capabilities();

// `pieces` lies on the host and travels as a kernel parameter; what it points to, and `maps`, on the device.
void adamw(const AdamWPiece* pieces, int64_t count, DType dtype, const AdamWScalars& scalars, AdamWOrder order,
           void* stream);
void adamw_8bit(const AdamW8bitPiece* pieces, int64_t count, DType dtype, const AdamWScalars& scalars, const Map8* maps,
                void* stream);

}  // namespace cuda

}  // namespace qlora
