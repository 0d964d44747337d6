// What is compiled once per instruction set: the inner loops, over memory that one thread owns.
//
// The portable files (blockwise.cpp, double_quant.cpp, linear.cpp, product.cpp, lora.cpp, adamw.cpp) cut the work into
// such pieces; a variant fills this table. Every variant gives the same bits, products excepted, which stay within their
// bounds. A variant file may include only headers whose functions are always inlined (math.h, element.h, adamw_math.h):
// anything else it emits could be the copy that the linker keeps for older CPUs. Nor may it run anything when the module
// is loaded.
#pragma once
#include "adamw_math.h"
#include "types.h"

#define QLORA_INLINE inline __attribute__((always_inline))  // variant files are for GCC and Clang

namespace qlora {

// One call of linear_4bit_forward, with what its threads share.
struct LinearRows {
  const Weight4bit* weight;
  const Codebook* codebook;
  const void* x;     // as linear_prepare left it,
  int64_t x_stride;  // bytes a token
  int64_t m;
  const void* bias;
  void* y;
  int block_shift;  // log2(block_size / 64)
};
// Rows taken at a time, at most. Where there are more tokens than kManyTokens, their x no longer stays in the cache by
// itself, and more rows share a pass over it.
constexpr int kTileRows = 4, kLinearRows = 16, kManyTokens = 32;
constexpr int kLinearChunkBytes = 128 * 1024;  // of decoded weights at a time, at most

// Of one thread.
struct LinearScratch {
  float* values;       // absmax' of every code of some nested groups: 256 a group, group g in slot g & mask
  int64_t mask;        // one more is a power of two, at least as many groups as these rows touch, and one more
  int64_t next_group;  // those below are in there
  void* sums;          // a register of 64 bytes for every row and token
  char* chunk;         // kLinearChunkBytes
};

// absmax of the blocks of a run: values[b], or under double quantization values[codes[b]], where `values` holds what the
// 256 codes mean in the run's nested group.
struct BlockAbsmax {
  const float* values;
  const uint8_t* codes;  // null: flat
};
QLORA_HD const float* absmax_of(const BlockAbsmax& absmax, int64_t block) {
  return absmax.values + (absmax.codes ? absmax.codes[block] : block);
}

// Of the absmax that quantize found. NaN where it is not known.
struct AbsmaxSum {
  double sum;       // in float64, added in any order
  double smallest;  // no positive one is smaller
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

// --- Products with many tokens ---
// A panel holds 64 features side by side and some elements of the sum, one row of 64 dwords after the other: a dword is
// one float32, or two bf16 that follow each other in the sum.

constexpr int64_t kPanelFeatures = 64;
constexpr int64_t kPanelRows = 16;       // decoded rows that are packed together
constexpr int64_t kPanelBytes = 64 * 4;  // a row of a panel

// A second term of the sum: more_x (tokens, depth) more_panel. The whole of it belongs to one part.
struct ProductMore {
  const void* x;
  int64_t x_stride, depth;
  const void* panel;
};
// y (tokens, features) = x panel + bias for one panel, or a part of the sum of it.
struct ProductPiece {
  const void* x;
  int64_t x_stride;  // bytes
  int64_t tokens, depth;
  const void* panel;
  float* sums;       // (tokens, 64): from the parts before, for those after
  bool first, last;  // part of the sum
  const void* bias;  // or null
  void* y;
  int64_t y_stride, features;  // elements; at most 64 features
  bool onto;                   // y += instead
  ProductMore more;
};
// kPanelRows rows of a weight, `parts` times 64 elements of each; every 64 lie within one block.
struct PackedRows {
  const uint8_t* packed;
  int64_t stride;  // bytes from row to row
  int64_t parts;
  const float* absmax;  // (kPanelRows, parts)
};
struct ProductLoops {
  int element_bytes;  // of x
  // kPanelRows decoded rows, `stride` elements apart, zeros behind `depth` up to a multiple of 32. They are
  //   features: `panel` is where the first one's lane begins
  void (*pack_features)(const void* rows, int64_t stride, int64_t depth, void* panel);
  //   elements of the sum: `panels` begin with them, one panel for every 64 elements of `width`
  void (*pack_sum)(const void* rows, int64_t stride, int64_t width, void* panels, int64_t panel_bytes);
  void (*multiply)(const ProductPiece& piece);
  void (*widen)(const void* x, int64_t n, float* out);  // to the element of x, where it is not the dtype itself
  // Decoding and packing in one, or null
  void (*decode_features)(const PackedRows& rows, const Codebook& codebook, void* panel);
  void (*decode_sum)(const PackedRows& rows, const Codebook& codebook, void* panels, int64_t panel_bytes);
};

// --- LoRA: elements in dwords as above, float32 sums ---

constexpr int64_t kLoraGroup = 16;  // ranks: packed adapters are padded to whole groups
constexpr int64_t kLoraStrip = 32;  // features whose gradients are computed together
constexpr int64_t kLoraTokens = 6;  // that share a packed adapter
constexpr int64_t kLoraRank = 256;  // at most
constexpr int64_t kLoraRows = 128;  // of dwords, of tokens in a strip: they stay in the first-level cache
constexpr int64_t kLoraScratchBytes = (kLoraRows + kLoraRank) * kLoraStrip * 4;

// An adapter's matrix, (rank, features) or (features, rank), as the two kinds of product want it.
struct LoraPacking {
  const void* matrix;
  DType dtype;  // f32, or that of x
  int64_t rank, features;
  bool rank_rows;
  void* down;  // for sums over features, or null
  void* up;    // for sums over ranks, or null
};
// middle = scaling x down^T in the dtype of x, zeros behind the rank up to a whole group: as `rows` (m, ranks), and as
// `dwords` of tokens (tokens, ranks), which in bf16 are pairs (ceil(m / 2), ranks, 2), where given
struct LoraTokens {
  const void* x;
  int64_t m, in, rank;
  float scaling;
  const void* down;
  void *rows, *dwords;
};
// gradient (rank, features) = middle^T x, or its transpose
struct LoraGradient {
  const void* x;
  int64_t m, features, rank;
  const void* dwords;  // of the middle
  void* gradient;
  DType dtype;
  bool rank_rows;
};
struct LoraLoops {
  void (*pack)(const LoraPacking& packing, int64_t begin, int64_t end);                   // panels of 64 features
  void (*tokens)(const LoraTokens& call, int64_t begin, int64_t end);                     // begin is even
  void (*gradient)(const LoraGradient& call, void* scratch, int64_t begin, int64_t end);  // strips
};

struct Variant {
  const char* name;

  // By DType. A run starts at a block boundary; its last block may be short, its last byte half used.
  AbsmaxSum (*quantize[3])(const void* x, int64_t n, int64_t block_size, const Codebook& codebook, uint8_t* packed,
                           float* absmax);
  void (*dequantize[3])(const uint8_t* packed, const BlockAbsmax& absmax, int64_t n, int64_t block_size,
                        const Codebook& codebook, void* out);
  // By DType, null where there is none: whole nested groups from `group` on, as nested_values and dequantize give them.
  void (*dequantize_groups[3])(const uint8_t* packed, const Absmax& absmax, int64_t group, int64_t groups,
                               int64_t block_size, const Codebook& codebook, void* out);

  // A run of nested groups, the last of which may be short: n values, a nested_absmax a group.
  void (*double_quantize)(const float* absmax, int64_t n, int64_t nested_block_size, float mean, const Map8& map,
                          uint8_t* codes, float* nested_absmax);
  // values[code] = absmax' of each of the 256 codes in a nested group
  void (*nested_values)(const float* map, float nested_absmax, float mean, float* values);

  // By DType, null where there is none: rows begin .. end of y = x W'^T + bias. Whole blocks a row, block_size >= 64.
  void (*linear_rows[3])(const LinearRows& call, LinearScratch& scratch, int64_t begin, int64_t end);
  // x (m, cols) -> the order and type that linear_rows wants, linear_x_bytes an element, `stride` bytes a token
  void (*linear_prepare[3])(const void* x, int64_t m, int64_t cols, int64_t stride, void* out);
  int linear_x_bytes[3];
  ProductLoops product[3];  // by DType, null where there are none

  AdamWLoops adamw;
  LoraLoops lora[3];  // by DType, null where there are none
};

extern const Variant scalar_variant;

// What an instruction set does better: `extend` replaces entries of the variant before it. It is called only where
// `supported` says so, as its code may use the instructions itself.
struct InstructionSet {
  const char* name;
  bool (*supported)();  // by the CPU this runs on
  void (*extend)(Variant& variant);
};
extern const InstructionSet avx2, avx512, avx512_vbmi, avx512_bf16, neon;

const Variant& variant();  // the one in use

}  // namespace qlora
