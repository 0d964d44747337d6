// y = x W'^T + bias and dx = dy W' for many tokens: 64 features of W' at a time are decoded into a panel that stays in
// the second-level cache, and all tokens go over it. The loops are the variant's. Every output belongs to one piece of
// work and is summed in one order, so no result depends on the number of threads.
#include "product.h"

#include <cstring>

#include "dequantize_run.h"
#include "kept_memory.h"
#include "parallel.h"

namespace qlora {
namespace {

constexpr int64_t kPanelMemory = 512 * 1024;  // of a thread, in its second-level cache
constexpr int64_t kTogether = 4;              // panels of dx, at most: of a row of the weight 128 bytes
constexpr int64_t kTokensAtOnce = 512;        // whose x stays in the third-level cache

// n in equal parts of at most `at_most`, all but the last a multiple of 64
int64_t part(int64_t n, int64_t at_most) { return parts(parts(n, parts(n, at_most)), 64) * 64; }

// How many rows of the weight are fetched ahead: whole ones, and short pieces, which lie far apart. The processor does not
// foresee those at all.
constexpr int64_t kWholeAhead = 4, kPiecesAhead = 16;

void prefetch(const Weight4bit& weight, const RunScales& scales, int64_t first, int64_t count) {
  const uint8_t* packed = weight.packed + first / 2;
  for (int64_t i = 0; i < count / 2; i += 64) __builtin_prefetch(packed + i, 0, 2);
  const int64_t block = first >> scales.block_shift;
  if (weight.absmax.codes) {
    __builtin_prefetch(weight.absmax.codes + block);
  } else {
    __builtin_prefetch(weight.absmax.absmax + block);
  }
}

// out[i] = absmax of the block of element first + 64 i
void absmax_of_parts(const Absmax& absmax, const RunScales& scales, int64_t first, int64_t parts, float* out) {
  const auto block = [&](int64_t i) { return (first + 64 * i) >> scales.block_shift; };
  if (!absmax.codes) {
    for (int64_t i = 0; i < parts; ++i) out[i] = absmax.absmax[block(i)];
    return;
  }
  const float mean = *absmax.mean;
  for (int64_t i = 0; i < parts; ++i) {
    out[i] =
        double_decode(absmax.map[absmax.codes[block(i)]], absmax.nested_absmax[block(i) >> scales.group_shift], mean);
  }
}

// `more` for the tokens from `token` and the panel from `feature` on.
ProductMore more_of(ProductMore more, DType dtype, int64_t token, int64_t feature) {
  const int64_t row = kPanelFeatures * variant().product[int(dtype)].element_bytes;  // of the panels
  more.x = static_cast<const char*>(more.x) + token * more.x_stride;
  more.panel = static_cast<const char*>(more.panel) + feature / kPanelFeatures * more.depth * row;
  return more;
}

struct Product {
  const Weight4bit& weight;
  const Codebook& codebook;
  DType dtype;
  bool forward;
  const void* x;
  int64_t tokens;
  const void* bias;
  void* y;
  ProductMore more;

  const ProductLoops& loops = variant().product[int(dtype)];
  int64_t features = forward ? weight.rows : weight.cols, sum = forward ? weight.cols : weight.rows;
  int64_t elements = loops.element_bytes == 2 ? 2 : 1;  // of the sum in a row of the panel
  int64_t together = 1;                                 // panels whose weights are decoded together
  int64_t depth = 0, panel_bytes = 0, token_part = part(tokens, kTokensAtOnce);

  void plan() {
    if (!forward) together = panels_together();
    // Where the sum is cut must not depend on the number of threads.
    depth = part(sum, kPanelMemory / kPanelBytes / (forward ? 1 : kTogether) * elements);
    panel_bytes = parts(depth, elements * kPanelRows) * kPanelRows * kPanelBytes;
  }
  // The rows of a panel of dx are short pieces of rows of the weight. Several panels share them, as far as that leaves all
  // threads busy: a round of pieces takes the time of their panels, and an eighth of a panel is assumed for what each piece
  // costs besides.
  int64_t panels_together() const {
    const int64_t panels = parts(features, kPanelFeatures), blocks = parts(tokens, token_part);
    int64_t best = 1, least = INT64_MAX;
    for (int64_t count = 1; count <= kTogether; ++count) {
      const int64_t time = parts(parts(panels, count) * blocks, num_threads()) * (8 * count + 1);
      if (time <= least) best = count, least = time;
    }
    return best;
  }
  void run() {
    const int64_t pieces = parts(features, kPanelFeatures * together), blocks = parts(tokens, token_part);
    const auto run = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) piece(i % pieces * kPanelFeatures * together, i / pieces * token_part);
    };
    parallel_for(pieces * blocks, 1, run, 1);
  }

  // The features from `feature` on, of one panel or of several, for the tokens from `token` on.
  void piece(int64_t feature, int64_t token) const {
    static thread_local KeptMemory panel_memory, row_memory, sum_memory;
    const int64_t width = std::min(features - feature, kPanelFeatures * together);
    const int64_t count = std::min(tokens - token, token_part), row_bytes = loops.element_bytes * sum;
    char* panels = panel_memory.reserve(together * panel_bytes);
    auto* sums = reinterpret_cast<float*>(sum_memory.reserve(together * count * kPanelBytes));
    RunScales scales(weight);
    for (int64_t first = 0; first < sum; first += depth) {
      const int64_t size = std::min(depth, sum - first);
      if (forward) {
        decode_features(scales, feature, width, first, size, row_memory, panels);
      } else {
        decode_sum(scales, feature, width, first, size, row_memory, panels);
      }
      for (int64_t p = 0; p * kPanelFeatures < width; ++p) {
        const int64_t at = feature + p * kPanelFeatures, esize = element_size(dtype);
        loops.multiply({static_cast<const char*>(x) + token * row_bytes + first * loops.element_bytes, row_bytes, count,
                        size, panels + p * panel_bytes, sums + p * count * kPanelFeatures, first == 0,
                        first + size == sum, bias ? static_cast<const char*>(bias) + at * esize : nullptr,
                        static_cast<char*>(y) + (token * features + at) * esize, features,
                        std::min(width - p * kPanelFeatures, kPanelFeatures), false, more_of(more, dtype, token, at)});
      }
    }
  }

  // Rows of the weight are features: elements first .. first + size of each.
  void decode_features(RunScales& scales, int64_t feature, int64_t width, int64_t first, int64_t size,
                       KeptMemory& memory, char* panel) const {
    const int64_t stride = parts(size, 32) * 32;
    char* rows = memory.reserve(kPanelRows * stride * element_size(dtype));
    for (int64_t lane = 0; lane < kPanelFeatures; lane += kPanelRows) {
      if (lane + kPanelRows <= width && loops.decode_features && in_one(first, size)) {
        loops.decode_features(packed_rows(scales, feature + lane, first, size, kWholeAhead, rows), codebook,
                              panel + lane * 4);
        continue;
      }
      decode_rows(scales, feature + lane, feature + width, first, size, kWholeAhead, rows, stride);
      loops.pack_features(rows, stride, size, panel + lane * 4);
    }
  }
  // Rows of the weight are elements of the sum: features feature .. feature + width of each.
  void decode_sum(RunScales& scales, int64_t feature, int64_t width, int64_t first, int64_t size, KeptMemory& memory,
                  char* panels) const {
    const int64_t stride = parts(width, kPanelFeatures) * kPanelFeatures;
    char* rows = memory.reserve(kPanelRows * stride * element_size(dtype));
    for (int64_t k = 0; k < size; k += kPanelRows, panels += kPanelRows / elements * kPanelBytes) {
      if (k + kPanelRows <= size && loops.decode_sum && in_one(feature, width)) {
        loops.decode_sum(packed_rows(scales, first + k, feature, width, kPiecesAhead, rows), codebook, panels,
                         panel_bytes);
        continue;
      }
      decode_rows(scales, first + k, first + size, feature, width, kPiecesAhead, rows, stride);
      loops.pack_sum(rows, stride, stride, panels, panel_bytes);
    }
  }
  // Whether columns col .. col + count can be decoded and packed in one: 64s of one block each.
  bool in_one(int64_t col, int64_t count) const { return (weight.cols | col | count | weight.block_size) % 64 == 0; }
  // Columns col .. col + count of kPanelRows rows; their absmax go to `memory`, which could hold them decoded.
  PackedRows packed_rows(const RunScales& scales, int64_t row, int64_t col, int64_t count, int64_t ahead,
                         char* memory) const {
    const int64_t parts = count / 64;
    auto* absmax = reinterpret_cast<float*>(memory);
    for (int64_t r = 0; r < kPanelRows; ++r) {
      const int64_t first = (row + r) * weight.cols + col;
      prefetch(weight, scales, first + ahead * weight.cols, count);
      absmax_of_parts(weight.absmax, scales, first, parts, absmax + r * parts);
    }
    return {weight.packed + (row * weight.cols + col) / 2, weight.cols / 2, parts, absmax};
  }
  // Columns col .. col + count of kPanelRows rows of the weight -> out, zeros behind them and for the rows from `end` on.
  void decode_rows(RunScales& scales, int64_t row, int64_t end, int64_t col, int64_t count, int64_t ahead, char* out,
                   int64_t stride) const {
    const int64_t bytes = element_size(dtype);
    for (int64_t r = row; r < row + kPanelRows; ++r, out += stride * bytes) {
      const int64_t filled = r < end ? count : 0;
      prefetch(weight, scales, (r + ahead) * weight.cols + col, count);
      if (filled) dequantize_run(weight, codebook, scales, r * weight.cols + col, count, dtype, out);
      memset(out + filled * bytes, 0, size_t((stride - filled) * bytes));
    }
  }
};

// x in the elements that the loops read.
const void* widened(const ProductLoops& loops, const void* x, int64_t n, KeptMemory& memory) {
  if (!loops.widen) return x;
  auto* out = reinterpret_cast<float*>(memory.reserve(n * int64_t(sizeof(float))));
  parallel_for(n, 256 * 1024, [&](int64_t begin, int64_t end) {
    loops.widen(static_cast<const uint16_t*>(x) + begin, end - begin, out + begin);
  });
  return out;
}

}  // namespace

bool can_product(DType dtype, int64_t sum) { return variant().product[int(dtype)].multiply && sum > 0; }

void product(const void* x, DType dtype, int64_t m, const Weight4bit& weight, const Codebook& codebook,
             const void* bias, void* y, bool forward, const ProductMore& more) {
  const ProductLoops& loops = variant().product[int(dtype)];
  const int64_t width = forward ? weight.cols : weight.rows, features = forward ? weight.rows : weight.cols;
  const int64_t bytes = element_size(dtype), step = loops.widen ? 2 * kTokensAtOnce : m;  // what is widened is kept
  for (int64_t token = 0, count; token < m; token += count) {
    static thread_local KeptMemory memory;
    count = std::min(step, m - token);
    const void* read = widened(loops, static_cast<const char*>(x) + token * width * bytes, count * width, memory);
    char* out = static_cast<char*>(y) + token * features * bytes;
    Product product{weight, codebook, dtype, forward, read, count, bias, out, more_of(more, dtype, token, 0)};
    product.plan();
    product.run();
  }
}

void add_product(DType dtype, int64_t m, int64_t features, void* y, const ProductMore& more) {
  const ProductLoops& loops = variant().product[int(dtype)];
  parallel_for(
      parts(features, kPanelFeatures), grain_of(m * more.depth * kPanelFeatures), [&](int64_t begin, int64_t end) {
        for (int64_t at = begin * kPanelFeatures; at < std::min(features, end * kPanelFeatures); at += kPanelFeatures) {
          loops.multiply({nullptr, 0, m, 0, nullptr, nullptr, true, true, nullptr,
                          static_cast<char*>(y) + at * element_size(dtype), features,
                          std::min(features - at, kPanelFeatures), true, more_of(more, dtype, 0, at)});
        }
      });
}

bool can_linear_4bit_backward(DType dtype, int64_t rows) { return can_product(dtype, rows); }

void linear_4bit_backward(const void* dy, DType dtype, int64_t m, const Weight4bit& weight, const Codebook& codebook,
                          void* dx, const ProductMore& more) {
  product(dy, dtype, m, weight, codebook, nullptr, dx, false, more);
}
void linear_4bit_backward(const void* dy, DType dtype, int64_t m, const Weight4bit& weight, const Codebook& codebook,
                          void* dx) {
  linear_4bit_backward(dy, dtype, m, weight, codebook, dx, {});
}

}  // namespace qlora
