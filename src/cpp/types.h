// The data that crosses the native boundary: plain structs, no torch, no pybind11.
// A data type is data: kernels get the tables by value, derived in python/qlora_ref/reference/.
#pragma once
#include <cstdint>

namespace qlora {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// One 4-bit data type (reference/codebook.py).
// code = order[number of thresholds strictly below s];  value = levels[code]
struct Codebook {
  float levels[16];
  float thresholds[15];
  uint8_t order[16];
  uint8_t zero_code;
  uint8_t signed_absmax;  // divide by the largest element with its sign (bof4_s)
};

// One 8-bit data type (reference/double_quant.py): ascending levels, code = number of thresholds strictly below s.
struct Map8 {
  float levels[256];
  float thresholds[255];
  int32_t zero_code;
};

// The absmax of the blocks of one tensor, either flat or double-quantized:
//   flat:    absmax[b]                                                        (codes == nullptr)
//   nested:  map[codes[b]] * nested_absmax[b / nested_block_size] + mean[0]   two roundings, never an FMA
// All pointers live where the kernel runs (host or device), `mean` and `map` included.
struct Absmax {
  const float* absmax;
  const uint8_t* codes;
  const float* nested_absmax;
  const float* mean;
  const float* map;
  int64_t nested_block_size;
};

// A packed weight: n = rows * cols elements, row-major, blocks over the flattened tensor.
struct Weight4bit {
  const uint8_t* packed;  // (n + 1) / 2 bytes, first element in the high nibble
  Absmax absmax;
  int64_t rows, cols;  // out_features, in_features
  int64_t block_size;
};

// A LoRA adapter: scaling (x A^T) B^T. A and B may be f32 or bf16.
struct Lora {
  const void* A;  // (rank, in)
  const void* B;  // (out, rank)
  DType A_dtype, B_dtype;
  int64_t rank, in, out;
  float scaling;
};

// One run of elements that AdamW updates in place. `param` and `grad` are f32 or bf16; `step` points at this step's
// number, counted from 1.
struct AdamWPiece {
  void* param;
  const void* grad;
  float *exp_avg, *exp_avg_sq;
  const float* step;
  int64_t n;
};
// The same with moments in 8 bits: one absmax for every 256 elements of the run.
struct AdamW8bitPiece {
  void* param;
  const void* grad;
  uint8_t* m_codes;
  float* m_absmax;
  uint8_t* v_codes;
  float* v_absmax;
  const float* step;
  int64_t n;
};

}  // namespace qlora
