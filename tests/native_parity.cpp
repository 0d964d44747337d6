// Every compiled variant of the CPU kernels against the scalar one, and the linear layer against float64: no Python, no
// torch, so that it also runs under an emulator of another processor. tests/test_native_parity.py builds and runs it:
//
//   native_parity TABLES      prints counts and a digest of the scalar results; exit status 1 if anything differs
//
// TABLES: two int32, the numbers of codebooks and of maps; the structs Codebook; the structs Map8 (the first two are
// those of AdamW's moments).
#include "native_parity.h"

#include <algorithm>
#include <fstream>

#include "../src/cpp/variant.h"

namespace parity {
namespace {

std::vector<Codebook> codebooks;
std::vector<Map8> maps;

bool read_tables(const char* path) {
  std::ifstream file(path, std::ios::binary);
  int32_t counts[2] = {};
  file.read(reinterpret_cast<char*>(counts), sizeof counts);
  codebooks.resize(size_t(counts[0]));
  maps.resize(size_t(counts[1]));
  file.read(reinterpret_cast<char*>(codebooks.data()), std::streamsize(codebooks.size() * sizeof(Codebook)));
  file.read(reinterpret_cast<char*>(maps.data()), std::streamsize(maps.size() * sizeof(Map8)));
  return bool(file) && maps.size() >= 2 && file.peek() == EOF;
}

int64_t blocks_of(int64_t n, int64_t block_size) { return (n + block_size - 1) / block_size; }

template <class... T>
std::string name(const char* what, T... numbers) {
  std::string text = what;
  for (int64_t number : {int64_t(numbers)...}) text += " " + std::to_string(number);
  return text;
}

// --- blockwise -----------------------------------------------------------------------------------------------------------

void quantize_case(DType dtype, Data data, int64_t n, int64_t block_size, size_t which) {
  const Codebook& codebook = codebooks[which];
  Input x = numbers(data, dtype, n, codebook.thresholds, uint64_t(n) + which);
  exact(name("quantize dtype data n block codebook =", dtype, data, n, block_size, which),
        {{Kind::bytes, (n + 1) / 2}, {Kind::f32, blocks_of(n, block_size)}}, [&](void* const* out) {
          quantize_4bit(x.data(), dtype, n, block_size, codebook, static_cast<uint8_t*>(out[0]),
                        static_cast<float*>(out[1]));
        });
}

void quantize_cases() {
  for (DType dtype : kDTypes) {
    for (int data = 0; data < int(Data::count); ++data) {
      for (size_t which = 0; which < codebooks.size(); ++which) quantize_case(dtype, Data(data), 685, 64, which);
      for (int64_t block = 32; block <= 4096; block *= 2) {
        quantize_case(dtype, Data(data), 2 * block + block / 2 + 13, block, 0);
      }
    }
    for (int64_t n : {0, 1, 2, 15, 16, 31, 32, 33, 63, 64, 65, 127, 128, 129}) {
      quantize_case(dtype, Data::normal, n, 64, 0);
    }
  }
}

// absmax as no quantizer would make them: every scale that rounds, overflows or is no number in one of the dtypes.
float strange_absmax(int64_t i, Random& random) {
  const float strange[] = {0.0f,       -0.0f,      INFINITY,   -INFINITY, bits_to_float(0x7fffffffu),
                           NAN,        1e-40f,     0x1p-126f,  0x1p-133f, 0x1p-24f,
                           0x1.8p-14f, -0x1p-15f,  65504.0f,   65520.0f,  -65519.0f,
                           1e38f,      3.4028e38f, -3.4028e38f};
  const int64_t count = sizeof strange / sizeof *strange;
  return i % 3 == 0 ? strange[i / 3 % count] : random.normal() * 0.1f;
}

// A packed tensor of random codes with strange absmax, flat or nested.
struct Tensor {
  Bytes packed, codes;
  std::vector<float> absmax, nested;
  float mean = 0.21f;
  Weight4bit weight;

  Tensor(int64_t rows, int64_t cols, int64_t block_size, bool is_nested, const Map8& map, int64_t nested_block_size) {
    const int64_t n = rows * cols, blocks = blocks_of(n, block_size);
    Random random{uint64_t(n + block_size)};
    packed = random_bytes((n + 1) / 2, 1);
    codes = random_bytes(blocks, 2);
    absmax.resize(size_t(blocks) + 1);
    for (size_t i = 0; i < absmax.size(); ++i) absmax[i] = strange_absmax(int64_t(i), random);
    nested.assign(absmax.begin(), absmax.begin() + blocks_of(blocks, nested_block_size));
    weight = {packed.data() + 1, {absmax.data() + 1, nullptr, nullptr, nullptr, nullptr, 1}, rows, cols, block_size};
    if (is_nested) {
      weight.absmax = {nullptr, codes.data() + 1, nested.data(), &mean, map.levels, nested_block_size};
    }
  }
};

void dequantize_case(DType dtype, int64_t rows, int64_t cols, int64_t block_size, size_t which, int64_t gap,
                     bool nested) {
  Tensor tensor(rows, cols, block_size, nested, maps[0], 32);
  const int64_t stride = cols + gap;
  const size_t row = size_t(cols) * size_of(dtype), wide_row = size_t(stride) * size_of(dtype);
  const std::string what =
      name("dequantize dtype rows cols block codebook gap nested =", dtype, rows, cols, block_size, which, gap, nested);
  exact(what, {{kind_of(dtype), rows * cols}}, [&](void* const* out) {
    if (!gap) return dequantize_4bit(tensor.weight, codebooks[which], out[0], dtype, cols);
    Bytes wide(size_t(rows) * wide_row, 0x77);
    dequantize_4bit(tensor.weight, codebooks[which], wide.data(), dtype, stride);
    for (size_t r = 0; r < size_t(rows); ++r) {
      const uint8_t* from = wide.data() + r * wide_row;
      memcpy(static_cast<uint8_t*>(out[0]) + r * row, from, row);
      if (std::any_of(from + row, from + wide_row, [](uint8_t byte) { return byte != 0x77; })) {
        fail(what + ": wrote between rows");
      }
    }
  });
}

void region_case(DType dtype, int64_t block_size, int64_t first_col, int64_t cols, bool nested) {
  Tensor tensor(6, 1027, block_size, nested, maps[0], 32);
  exact(name("region dtype block first_col cols nested =", dtype, block_size, first_col, cols, nested),
        {{kind_of(dtype), 4 * cols}}, [&](void* const* out) {
          dequantize_region(tensor.weight, codebooks[0], 1, 4, first_col, cols, out[0], dtype);
        });
}

void dequantize_cases() {
  for (DType dtype : kDTypes) {
    for (bool nested : {false, true}) {
      for (size_t which = 0; which < codebooks.size(); ++which) dequantize_case(dtype, 1, 4333, 64, which, 0, nested);
      for (int64_t block = 32; block <= 4096; block *= 2) {
        dequantize_case(dtype, 7, 2049, block, 0, 0, nested);
        dequantize_case(dtype, 7, 2049, block, 0, 51, nested);
        for (int64_t first_col : {0, 1, 64, 77}) region_case(dtype, block, first_col, 901, nested);
      }
    }
    for (int64_t n : {0, 1, 2, 15, 16, 31, 32, 33, 63, 64, 65, 127, 128, 129})
      dequantize_case(dtype, 1, n, 64, 0, 0, 0);
  }
}

// What quantize returns of absmax: NaN, or the sum, right as far as an order of adding can be, and a bound of the smallest;
// known for ordinary weights.
void sum_case(DType dtype, Data data, int64_t n, int64_t block_size, size_t which) {
  const Codebook& codebook = codebooks[which];
  Input x = numbers(data, dtype, n, codebook.thresholds, uint64_t(n));
  Bytes packed(size_t(n / 2 + 1));
  std::vector<float> absmax(size_t(blocks_of(n, block_size)));
  for (const std::string& name_of_variant : cpu_variants()) {
    set_cpu_variant(name_of_variant);
    ++cases;
    const AbsmaxSum got =
        variant().quantize[int(dtype)](x.data(), n, block_size, codebook, packed.data(), absmax.data());
    double want = 0;
    float smallest = INFINITY;
    for (float value : absmax) {
      want += value;
      if (value > 0) smallest = std::min(smallest, value);
    }
    const double bound = double(absmax.size() + 8) * 0x1p-52 * want;
    const bool right = std::fabs(got.sum - want) <= bound && got.smallest <= smallest;
    const bool near = got.smallest >= double(smallest) * 0x1p-16;
    const bool known = !std::isnan(got.sum), must = data == Data::normal && !codebook.signed_absmax;
    if (known ? codebook.signed_absmax || !right || !near : must) {
      fail(name_of_variant + name(" sum of absmax, dtype data n block codebook =", dtype, data, n, block_size, which));
    }
  }
}

void sum_cases() {
  for (DType dtype : kDTypes) {
    for (int data = 0; data < int(Data::count); ++data) {
      for (size_t which = 0; which < codebooks.size(); ++which) {
        for (int64_t n : {1, 64, 685, 4096}) sum_case(dtype, Data(data), n, 64, which);
      }
    }
  }
}

// --- double quantization -------------------------------------------------------------------------------------------------

void double_quantize_case(Data data, int64_t n, int64_t nested_block_size, size_t which, int of_mean) {
  Input absmax = numbers(data, DType::f32, n, codebooks[0].thresholds, uint64_t(n));
  for (int64_t i = 0; i < n; ++i) absmax.set(i, std::fabs(absmax.get(i)));
  const float means[] = {0.0f, 0.8f, n ? absmax.get(n / 2) : 0.0f}, mean = means[of_mean];
  const Map8& map = maps[which];
  exact(name("double quantization data n block map mean =", data, n, nested_block_size, which, of_mean),
        {{Kind::bytes, n}, {Kind::f32, blocks_of(n, nested_block_size)}, {Kind::f32, n}}, [&](void* const* out) {
          auto* codes = static_cast<uint8_t*>(out[0]);
          auto* nested = static_cast<float*>(out[1]);
          double_quantize(static_cast<float*>(absmax.data()), n, mean, nested_block_size, map, codes, nested);
          double_dequantize({nullptr, codes, nested, &mean, map.levels, nested_block_size}, n,
                            static_cast<float*>(out[2]));
        });
}

void double_quantize_cases() {
  for (size_t which = 0; which < maps.size(); ++which) {
    for (int of_mean = 0; of_mean < 3; ++of_mean) {
      for (int data = 0; data < int(Data::count); ++data) {
        double_quantize_case(Data(data), 685, 256, which, of_mean);
        double_quantize_case(Data(data), 205, 32, which, of_mean);
      }
      for (int64_t n : {0, 1, 15, 16, 17, 31, 32, 33, 5000})
        double_quantize_case(Data::normal, n, 4096, which, of_mean);
    }
  }
}

void nested_case(DType dtype, Data data, int64_t n, int64_t block_size, int64_t nested_block_size) {
  Input x = numbers(data, dtype, n, codebooks[0].thresholds, uint64_t(n));
  const int64_t blocks = blocks_of(n, block_size);
  exact(name("quantize nested dtype data n block nested_block =", dtype, data, n, block_size, nested_block_size),
        {{Kind::bytes, (n + 1) / 2}, {Kind::bytes, blocks}, {Kind::f32, blocks_of(blocks, nested_block_size)}},
        [&](void* const* out) {
          quantize_4bit_nested(x.data(), dtype, n, block_size, codebooks[0], 0.9f, nested_block_size, maps[0],
                               static_cast<uint8_t*>(out[0]), static_cast<uint8_t*>(out[1]),
                               static_cast<float*>(out[2]));
        });
}

// --- linear --------------------------------------------------------------------------------------------------------------

constexpr int64_t kTokens[] = {1, 2, 3, 4, 5, 7, 8, 16, 33, 45}, kMostTokens = 45;

struct Product {
  double value, magnitude;
};

// A layer with ordinary weights, quantized by the scalar variant, and one block that is not a number.
struct Layer {
  DType dtype;
  Tensor tensor;
  Input weight, bias, x;
  std::vector<Product> products;  // (kMostTokens, rows)

  Layer(DType dtype, int64_t rows, int64_t cols, int64_t block_size, bool nested, bool with_nan)
      : dtype(dtype),
        tensor(rows, cols, block_size, nested, maps[0], 32),
        weight(numbers(Data::plus_minus, dtype, rows * cols, codebooks[0].thresholds, 3)),
        bias(numbers(Data::normal, dtype, rows, codebooks[0].thresholds, 4)),
        x(numbers(Data::normal, dtype, kMostTokens * cols, codebooks[0].thresholds, 5)) {
    set_cpu_variant("scalar");
    tensor.absmax.resize(size_t(rows * cols / block_size));
    float* absmax = tensor.absmax.data();
    quantize_4bit(weight.data(), dtype, rows * cols, block_size, codebooks[0], tensor.packed.data() + 1, absmax);
    if (with_nan) absmax[tensor.absmax.size() / 2] = NAN;
    if (nested) {
      double_quantize(absmax, int64_t(tensor.absmax.size()), tensor.mean, 32, maps[0], tensor.codes.data() + 1,
                      tensor.nested.data());
    } else {
      tensor.weight.absmax.absmax = absmax;
    }
    dequantize_4bit(tensor.weight, codebooks[0], weight.data(), dtype, cols);
    for (int64_t m = 0; m < kMostTokens; ++m) {
      for (int64_t r = 0; r < rows; ++r) products.push_back(product(m, r, cols));
    }
  }

  Product product(int64_t m, int64_t r, int64_t cols) const {
    Product sum{bias.get(r), std::fabs(double(bias.get(r)))};
    for (int64_t c = 0; c < cols; ++c) {
      double term = double(x.get(m * cols + c)) * double(weight.get(r * cols + c));
      sum.value += term;
      sum.magnitude += std::fabs(term);
    }
    return sum;
  }
};

// A float32 sum of cols products and a bias, in whatever order, then one rounding to dtype (docs/07_parity.md).
bool within_bound(float y, const Product& product, int64_t cols, DType dtype) {
  if (std::isnan(product.value)) return std::isnan(y);
  const double n = double(cols) + 1, gamma = n * 0x1p-24 / (1 - n * 0x1p-24);
  const double unit = dtype == DType::f32 ? 0x1p-24 : dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;
  const double of_sum = gamma * product.magnitude, smallest = dtype == DType::f16 ? 0x1p-24 : 0x1p-126;
  return std::fabs(y - product.value) <= of_sum + unit * (std::fabs(product.value) + of_sum) + smallest;
}

void linear_case(Layer& layer) {
  const Weight4bit& weight = layer.tensor.weight;
  const int64_t rows = weight.rows, cols = weight.cols;
  const bool nested = weight.absmax.codes;
  for (const std::string& variant : cpu_variants()) {
    set_cpu_variant(variant);
    for (int64_t m : kTokens) {
      if (!can_linear_4bit_forward(layer.dtype, m, cols, weight.block_size)) continue;
      ++cases;
      const std::string what = variant + name(" linear dtype rows cols block nested m =", layer.dtype, rows, cols,
                                              weight.block_size, nested, m);
      Bytes y = outputs_of(what, {{kind_of(layer.dtype), m * rows}}, 0x5a, [&](void* const* out) {
        linear_4bit_forward(layer.x.data(), layer.dtype, m, weight, codebooks[0], layer.bias.data(), out[0]);
      })[0];
      for (int64_t i = 0; i < m * rows; ++i) {
        float value = load(layer.dtype, &y[size_t(i) * size_of(layer.dtype)]);
        if (within_bound(value, layer.products[size_t(i)], cols, layer.dtype)) continue;
        fail(what + ": output " + std::to_string(i) + " is outside its bound");
        break;
      }
    }
  }
}

// dx = dy W', one element of float64 beside each.
void backward_case(const Layer& layer) {
  const Weight4bit& weight = layer.tensor.weight;
  const int64_t rows = weight.rows, cols = weight.cols;
  Input dy = numbers(Data::normal, layer.dtype, kMostTokens * rows, codebooks[0].thresholds, 8);
  for (const std::string& variant : cpu_variants()) {
    set_cpu_variant(variant);
    if (!can_linear_4bit_backward(layer.dtype, rows)) continue;
    for (int64_t m : {1, 6, 45}) {
      ++cases;
      const std::string what = variant + name(" dx dtype rows cols m =", layer.dtype, rows, cols, m);
      Bytes dx = outputs_of(what, {{kind_of(layer.dtype), m * cols}}, 0x5a, [&](void* const* out) {
        linear_4bit_backward(dy.data(), layer.dtype, m, weight, codebooks[0], out[0]);
      })[0];
      for (int64_t i = 0; i < m * cols; ++i) {
        Product sum{0, 0};
        for (int64_t r = 0; r < rows; ++r) {
          double term = double(dy.get(i / cols * rows + r)) * double(layer.weight.get(r * cols + i % cols));
          sum.value += term;
          sum.magnitude += std::fabs(term);
        }
        float value = load(layer.dtype, &dx[size_t(i) * size_of(layer.dtype)]);
        if (within_bound(value, sum, rows, layer.dtype)) continue;
        fail(what + ": output " + std::to_string(i) + " is outside its bound");
        break;
      }
    }
  }
}

// Tokens with a single 1: y are columns of W', exactly.
void unit_vector_case(DType dtype, size_t which, int64_t m) {
  constexpr int64_t rows = 7, cols = 192;
  const Codebook& codebook = codebooks[which];
  Tensor tensor(rows, cols, 64, false, maps[0], 32);
  Random random{6};
  for (float& absmax : tensor.absmax) absmax = std::fabs(random.normal()) + 0.01f;
  Input weight(dtype, rows * cols);
  for (const std::string& variant : cpu_variants()) {
    set_cpu_variant(variant);
    if (!can_linear_4bit_forward(dtype, m, cols, 64)) continue;
    ++cases;
    const std::string what = variant + name(" unit vectors dtype codebook m =", dtype, which, m);
    dequantize_4bit(tensor.weight, codebook, weight.data(), dtype, cols);
    for (int64_t first = 0; first < cols; first += m) {
      Input x(dtype, m * cols);
      for (int64_t t = 0; t < m && first + t < cols; ++t) x.set(t * cols + first + t, 1.0f);
      Bytes y = outputs_of(what, {{kind_of(dtype), m * rows}}, 0x5a, [&](void* const* out) {
        linear_4bit_forward(x.data(), dtype, m, tensor.weight, codebook, nullptr, out[0]);
      })[0];
      for (int64_t t = 0; t < m && first + t < cols; ++t) {
        for (int64_t r = 0; r < rows; ++r) {
          float value = load(dtype, &y[size_t(t * rows + r) * size_of(dtype)]);
          if (value != weight.get(r * cols + first + t)) fail(what + ": column " + std::to_string(first + t));
        }
      }
    }
  }
}

void linear_cases() {
  const int64_t shapes[][3] = {{1, 64, 64}, {5, 128, 64}, {7, 192, 64}, {9, 256, 128}, {6, 4352, 64}, {3, 4096, 4096}};
  for (DType dtype : kDTypes) {
    for (auto [rows, cols, block_size] : shapes) {
      for (bool nested : {false, true}) {
        Layer layer(dtype, rows, cols, block_size, nested, cols == 256);
        linear_case(layer);
        backward_case(layer);
      }
    }
    for (size_t which = 0; which < codebooks.size(); ++which) {
      for (int64_t m : {1, 3, 4, 7, 48}) unit_vector_case(dtype, which, m);
    }
  }
}

// --- AdamW ---------------------------------------------------------------------------------------------------------------

constexpr AdamWScalars kScalars[] = {{1e-3, 0.9, 0.999, 0.01, 1e-8}, {2e-4, 0.4, 0.95, 0.0, 1e-6}};

void adamw_case(DType dtype, Data data, int64_t n, const AdamWScalars& scalars, AdamWOrder order) {
  const float* thresholds = codebooks[0].thresholds;
  Input param = numbers(Data::normal, dtype, n, thresholds, 7), grad = numbers(data, dtype, n, thresholds, 8);
  Input m = numbers(data, DType::f32, n, thresholds, 9), v = numbers(data, DType::f32, n, thresholds, 10);
  for (int64_t i = 0; i < n; ++i) v.set(i, std::fabs(v.get(i)));
  const float step = 3.0f;
  exact(name("adamw dtype data n order =", dtype, data, n, order),
        {{kind_of(dtype), n}, {Kind::f32, n}, {Kind::f32, n}}, [&](void* const* out) {
          memcpy(out[0], param.data(), size_t(n) * size_of(dtype));
          memcpy(out[1], m.data(), size_t(n) * 4);
          memcpy(out[2], v.data(), size_t(n) * 4);
          AdamWPiece piece{out[0], grad.data(), static_cast<float*>(out[1]), static_cast<float*>(out[2]), &step, n};
          adamw(&piece, 1, dtype, scalars, order);
        });
}

void adamw_8bit_case(DType dtype, Data data, int64_t n, const AdamWScalars& scalars) {
  const float* thresholds = codebooks[0].thresholds;
  Input param = numbers(Data::normal, dtype, n, thresholds, 7), grad = numbers(data, dtype, n, thresholds, 8);
  const Bytes codes = random_bytes(n, 11);
  const int64_t blocks = blocks_of(n, kStateBlock);
  const float step = 3.0f;
  exact(name("adamw 8 bit dtype data n =", dtype, data, n),
        {{kind_of(dtype), n}, {Kind::bytes, n}, {Kind::f32, blocks}, {Kind::bytes, n}, {Kind::f32, blocks}},
        [&](void* const* out) {
          memcpy(out[0], param.data(), size_t(n) * size_of(dtype));
          auto *m_codes = static_cast<uint8_t*>(out[1]), *v_codes = static_cast<uint8_t*>(out[3]);
          auto *m_absmax = static_cast<float*>(out[2]), *v_absmax = static_cast<float*>(out[4]);
          memcpy(m_codes, codes.data(), size_t(n));
          memcpy(v_codes, codes.data() + 1, size_t(n));
          for (int64_t b = 0; b < blocks; ++b) m_absmax[b] = 0.3f, v_absmax[b] = 0.02f;
          AdamW8bitPiece piece{out[0], grad.data(), m_codes, m_absmax, v_codes, v_absmax, &step, n};
          adamw_8bit(&piece, 1, dtype, scalars, maps.data());
        });
}

void adamw_cases() {
  for (DType dtype : {DType::f32, DType::bf16}) {
    for (const AdamWScalars& scalars : kScalars) {
      for (Data data :
           {Data::normal, Data::zeros, Data::zero_blocks, Data::outlier, Data::subnormal, Data::nonfinite}) {
        for (AdamWOrder order : {AdamWOrder::loop, AdamWOrder::fused}) adamw_case(dtype, data, 1021, scalars, order);
        adamw_8bit_case(dtype, data, 1021, scalars);
      }
      for (int64_t n : {0, 1, 7, 8, 15, 16, 17, 31, 255, 256, 257}) {
        adamw_case(dtype, Data::normal, n, scalars, AdamWOrder::loop);
        adamw_8bit_case(dtype, Data::normal, n, scalars);
      }
    }
  }
}

// Several pieces, on two threads.
void threaded_cases() {
  set_num_threads(2);
  for (DType dtype : kDTypes) {
    quantize_case(dtype, Data::normal, 300'003, 64, 0);
    nested_case(dtype, Data::normal, 300'003, 64, 256);
    dequantize_case(dtype, 301, 1003, 64, 0, 0, true);
    Layer layer(dtype, 600, 64, 64, true, false);  // two parts of the sum of dx
    linear_case(layer);
    backward_case(layer);
  }
  set_num_threads(1);
}

// LoRA has no scalar loop to be equal to (tests/test_cpu_lora.py holds it to its bounds). Here: the same bits on any number
// of threads, for few and many tokens, and ragged sizes.
void lora_cases() {
  constexpr int64_t rank = 5, rows = 150, cols = 200;
  for (DType dtype : kDTypes) {
    Layer layer(dtype, rows, cols, 64, true, false);
    Input A = numbers(Data::normal, DType::f32, rank * cols, codebooks[0].thresholds, 9);
    Input B = numbers(Data::normal, DType::f32, rows * rank, codebooks[0].thresholds, 10);
    const Lora lora{A.data(), B.data(), DType::f32, DType::f32, rank, cols, rows, 0.25f};
    for (const std::string& variant : cpu_variants()) {
      set_cpu_variant(variant);
      for (int64_t m : {3, 33, 700}) {
        if (!can_lora(dtype, rank) || !can_linear_4bit_backward(dtype, rows)) continue;
        ++cases;
        Input x = numbers(Data::normal, dtype, m * cols, codebooks[0].thresholds, 11);
        Input dy = numbers(Data::normal, dtype, m * rows, codebooks[0].thresholds, 12);
        const std::vector<Output> outputs = {
            {kind_of(dtype), m * rows}, {Kind::f32, rank * cols}, {Kind::f32, rows * rank}, {kind_of(dtype), m * cols}};
        const std::string what = variant + name(" LoRA dtype m =", dtype, m);
        std::vector<Bytes> results[2];
        for (int threads : {1, 3}) {
          set_num_threads(threads);
          results[threads / 3] = outputs_of(what, outputs, uint8_t(0x5a + threads), [&](void* const* out) {
            lora_linear_4bit_forward(x.data(), dtype, m, layer.tensor.weight, codebooks[0], layer.bias.data(), lora,
                                     out[0]);
            lora_linear_4bit_backward(dy.data(), x.data(), dtype, m, layer.tensor.weight, codebooks[0], lora,
                                      {out[1], out[2], out[3]});
          });
        }
        set_num_threads(1);
        if (results[0] != results[1]) fail(what + ": three threads give other bits than one");
      }
    }
  }
}

}  // namespace
}  // namespace parity

int main(int argc, char** argv) {
  using namespace parity;
  if (argc != 2 || !read_tables(argv[1])) {
    std::puts("usage: native_parity TABLES (a file as tests/test_native_parity.py writes it)");
    return 2;
  }
  quantize_cases();
  sum_cases();
  dequantize_cases();
  double_quantize_cases();
  for (DType dtype : kDTypes) {
    for (int data = 0; data < int(Data::count); ++data) nested_case(dtype, Data(data), 5005, 64, 32);
  }
  threaded_cases();
  lora_cases();
  std::printf("digest %016llx\n", static_cast<unsigned long long>(digest));
  linear_cases();
  adamw_cases();  // after the digest: its scalars come from the C library's pow
  std::printf("variants");
  for (const std::string& variant : cpu_variants()) std::printf(" %s", variant.c_str());
  std::printf("\n%d cases, %d failures\n", cases, failures);
  return failures ? 1 : 0;
}
