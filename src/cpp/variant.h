// What is compiled once per instruction set: the inner loops, over memory that one thread owns.
//
// The portable files (blockwise.cpp, double_quant.cpp, linear.cpp) cut the work into such pieces; a variant fills this
// table. Every variant gives the same bits. A variant file may include only headers whose functions are always inlined
// (math.h, element.h, adamw_math.h): anything else it emits could be the copy that the linker keeps for older CPUs.
#pragma once
#include "adamw_math.h"
#include "types.h"

namespace qlora {

// One call of linear_4bit_forward, with what its threads share.
struct LinearRows {
  const Weight4bit* weight;
  const Codebook* codebook;
  const void* x;  // as linear_prepare left it
  int64_t m;
  const void* bias;
  void* y;
  int block_shift;  // log2(block_size / 64)
};
constexpr int kLinearRows = 4;  // taken at a time

// Of one thread: absmax' of every code, for the nested groups that kLinearRows rows touch.
struct LinearScratch {
  float* values;                // 256 a group
  int64_t first_group, groups;  // which are in there
  void* sums;                   // kLinearRows registers of 64 bytes a token
};

// By DType: f32, bf16.
struct AdamWLoops {
  // By AdamWOrder: elements [begin, end) of a piece, a multiple of kAdamWRun.
  void (*update[2][2])(const AdamWPiece& piece, const AdamWCoefficients& c, int64_t begin, int64_t end);
  // Blocks [begin, end) of a piece, all of kStateBlock elements. `maps`: that of m, that of v.
  void (*update_8bit[2])(const AdamW8bitPiece& piece, const AdamWCoefficients& c, const Map8* maps, int64_t begin,
                         int64_t end);
};
constexpr int kAdamWRun = 16;

struct Variant {
  const char* name;
  bool (*supported)();  // by the CPU this runs on

  // By DType. A run starts at a block boundary; its last block may be short, its last byte half used.
  void (*quantize[3])(const void* x, int64_t n, int64_t block_size, const Codebook& codebook, uint8_t* packed,
                      float* absmax);
  void (*dequantize[3])(const uint8_t* packed, const float* absmax, int64_t n, int64_t block_size,
                        const Codebook& codebook, void* out);

  // One nested group: n <= nested_block_size values and their one nested_absmax.
  void (*double_quantize)(const float* absmax, int64_t n, float mean, const Map8& map, uint8_t* codes,
                          float* nested_absmax);
  // out[i] = absmax of block first + i, reconstructed
  void (*double_dequantize)(const Absmax& absmax, int64_t first, int64_t n, float* out);

  // By DType, null where there is none: rows begin .. end of y = x W'^T + bias. Whole blocks a row, block_size >= 64.
  void (*linear_rows[3])(const LinearRows& call, LinearScratch& scratch, int64_t begin, int64_t end);
  // x (m, cols) -> the order and type that linear_rows wants, linear_x_bytes an element
  void (*linear_prepare[3])(const void* x, int64_t m, int64_t cols, void* out);
  int linear_x_bytes[3];

  AdamWLoops adamw;
};

extern const Variant scalar_variant, avx2_variant, avx512_variant, avx512_bf16_variant;

const Variant& variant();  // the one in use

}  // namespace qlora
