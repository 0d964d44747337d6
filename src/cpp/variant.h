// What is compiled once per instruction set: the inner loops, over memory that one thread owns.
//
// The portable files (blockwise.cpp, double_quant.cpp, linear.cpp) cut the work into such pieces; a variant fills this
// table. Every variant gives the same bits. A variant file may include only headers whose functions are always inlined
// (math.h, element.h): anything else it emits could be the copy that the linker keeps for older CPUs.
#pragma once
#include "types.h"

namespace qlora {

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
};

extern const Variant scalar_variant, avx512_variant;

const Variant& variant();  // the one in use

}  // namespace qlora
