// AVX-512 F, BW, VL, DQ: quantize, dequantize, double quantization, AdamW, linear. Bits as variant_scalar.cpp, which also
// gets the rests.
#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "element.h"
#include "variant.h"

namespace qlora {
namespace {

constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr float kNaN = __builtin_nanf("");

// --- quantize ----------------------------------------------------------------------------------------------------------
// 32 elements make 16 bytes: the even elements in one register of 16 floats, the odd in another, so that
// code(even) << 4 | code(odd) is a byte in place.

struct Pair {
  __m512 even, odd;
};

template <DType dtype>
QLORA_INLINE Pair load_pair(const void* x);

template <>
QLORA_INLINE Pair load_pair<DType::bf16>(const void* x) {
  __m512i both = _mm512_loadu_si512(x);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000u))))};
}

template <>
QLORA_INLINE Pair load_pair<DType::f32>(const void* x) {
  auto* p = static_cast<const float*>(x);
  __m512 a = _mm512_loadu_ps(p), b = _mm512_loadu_ps(p + 16);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return {_mm512_permutex2var_ps(a, even, b),
          _mm512_permutex2var_ps(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b)};
}

template <>
QLORA_INLINE Pair load_pair<DType::f16>(const void* x) {
  auto* p = static_cast<const uint16_t*>(x);
  __m512 a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  __m512 b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return {_mm512_permutex2var_ps(a, even, b),
          _mm512_permutex2var_ps(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b)};
}

// Bits of the largest magnitude of a block (size a multiple of 32), widened to float32's.
template <DType dtype>
uint32_t largest_magnitude(const void* x, int64_t size) {
  if constexpr (dtype == DType::f32) {
    auto* p = static_cast<const float*>(x);
    __m512i largest = _mm512_setzero_si512();
    for (int64_t i = 0; i < size; i += 16) {
      __m512i magnitude = _mm512_and_si512(_mm512_loadu_si512(p + i), _mm512_set1_epi32(0x7fffffff));
      largest = _mm512_max_epu32(largest, magnitude);
    }
    return uint32_t(_mm512_reduce_max_epu32(largest));
  } else {
    auto* p = static_cast<const uint16_t*>(x);
    __m512i largest = _mm512_setzero_si512();
    for (int64_t i = 0; i < size; i += 32) {
      __m512i magnitude = _mm512_and_si512(_mm512_loadu_si512(p + i), _mm512_set1_epi16(0x7fff));
      largest = _mm512_max_epu16(largest, magnitude);
    }
    __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(largest), _mm512_extracti64x4_epi64(largest, 1));
    __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    __m128i inverted = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1)));
    auto bits = uint16_t(~_mm_cvtsi128_si32(inverted));
    return float_to_bits(Element<dtype>::load(bits));
  }
}

template <DType dtype>
bool contains(const void* x, int64_t size, float value) {
  __mmask16 found = 0;
  for (int64_t i = 0; i < size; i += 32) {
    Pair pair = load_pair<dtype>(static_cast<const typename Element<dtype>::type*>(x) + i);
    found |= _mm512_cmp_ps_mask(pair.even, _mm512_set1_ps(value), _CMP_EQ_OQ);
    found |= _mm512_cmp_ps_mask(pair.odd, _mm512_set1_ps(value), _CMP_EQ_OQ);
  }
  return found;
}

// Number of thresholds below s, by a table of 32 equal bins of [-1, 1] with at most one threshold each. The bin of a
// value only has to be monotonic, and the same for values and thresholds: then thresholds of lower bins are below s.
struct Bins {
  __m512 threshold[2];
  __m512i below[2];  // thresholds in lower bins
  bool usable;

  static QLORA_INLINE __m512i bin(__m512 s) {
    return _mm512_cvttps_epi32(_mm512_fmadd_ps(s, _mm512_set1_ps(15.99f), _mm512_set1_ps(16.0f)));
  }

  explicit Bins(const float* thresholds) : usable(true) {
    float threshold_of[32], ordered[16];
    int32_t bin_of[16];
    memcpy(ordered, thresholds, 15 * sizeof(float));
    ordered[15] = bits_to_float(kInfinityBits);
    _mm512_storeu_si512(bin_of, bin(_mm512_loadu_ps(ordered)));
    for (float& each : threshold_of) each = ordered[15];
    for (auto& each : below) each = _mm512_setzero_si512();
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int t = 0; t < 15 && is_finite(ordered[t]); ++t) {
      usable = usable && !is_finite(threshold_of[bin_of[t]]);
      threshold_of[bin_of[t]] = ordered[t];
      for (int half = 0; half < 2; ++half) {
        __mmask16 higher = _mm512_cmplt_epi32_mask(_mm512_set1_epi32(bin_of[t] - 16 * half), lane);
        below[half] = _mm512_mask_add_epi32(below[half], higher, below[half], _mm512_set1_epi32(1));
      }
    }
    for (int half = 0; half < 2; ++half) threshold[half] = _mm512_loadu_ps(threshold_of + 16 * half);
  }

  // NaN lands in bin 0 and below no threshold: 0.
  QLORA_INLINE __m512i operator()(__m512 s) const {
    __m512i i = bin(s);
    __mmask16 above = _mm512_cmp_ps_mask(_mm512_permutex2var_ps(threshold[0], i, threshold[1]), s, _CMP_LT_OQ);
    __m512i count = _mm512_permutex2var_epi32(below[0], i, below[1]);
    return _mm512_mask_add_epi32(count, above, count, _mm512_set1_epi32(1));
  }
};

// The same count by bisection in a register, for tables with two thresholds in one bin (fp4_e3m0).
struct Bisection {
  __m512 thresholds;

  explicit Bisection(const float* thresholds15) {
    thresholds = _mm512_mask_loadu_ps(_mm512_set1_ps(bits_to_float(kInfinityBits)), 0x7fff, thresholds15);
  }

  QLORA_INLINE __m512i operator()(__m512 s) const {
    __m512i count = _mm512_setzero_si512();
    for (int step = 8; step; step /= 2) {
      __m512 next = _mm512_permutexvar_ps(_mm512_add_epi32(count, _mm512_set1_epi32(step - 1)), thresholds);
      __mmask16 above = _mm512_cmp_ps_mask(next, s, _CMP_LT_OQ);
      count = _mm512_mask_add_epi32(count, above, count, _mm512_set1_epi32(step));
    }
    return count;
  }
};

#include "quantize_tile.h"

template <DType dtype, bool in_value_order, class Count>
AbsmaxSum quantize_blocks(const void* x_, int64_t n, int64_t block_size, const Codebook& codebook, uint8_t* packed,
                          float* absmax, const Count& count_below_all) {
  using T = typename Element<dtype>::type;
  auto* x = static_cast<const T*>(x_);
  alignas(64) int32_t order[16];
  for (int i = 0; i < 16; ++i) order[i] = codebook.order[i];
  const __m512i code_of = _mm512_load_si512(order);
  return quantize_each_block<dtype>(
      x, n, block_size, codebook, packed, absmax,
      [&](const T* x, float inverse, uint8_t* packed) __attribute__((always_inline)) {
        for (int64_t i = 0; i < block_size; i += 32) {
          Pair pair = load_pair<dtype>(x + i);
          __m512i even = count_below_all(_mm512_mul_ps(pair.even, _mm512_set1_ps(inverse)));
          __m512i odd = count_below_all(_mm512_mul_ps(pair.odd, _mm512_set1_ps(inverse)));
          if (!in_value_order) {
            even = _mm512_permutexvar_epi32(even, code_of);
            odd = _mm512_permutexvar_epi32(odd, code_of);
          }
          __m512i bytes = _mm512_or_si512(_mm512_slli_epi32(even, 4), odd);
          _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2), _mm512_cvtepi32_epi8(bytes));
        }
      });
}

template <DType dtype>
AbsmaxSum quantize(const void* x, int64_t n, int64_t block_size, const Codebook& codebook, uint8_t* packed,
                   float* absmax) {
  bool in_value_order = true;
  for (int i = 0; i < 16; ++i) in_value_order = in_value_order && codebook.order[i] == i;
  Bins bins(codebook.thresholds);
  if (bins.usable && in_value_order) {
    return quantize_blocks<dtype, true>(x, n, block_size, codebook, packed, absmax, bins);
  } else if (bins.usable) {
    return quantize_blocks<dtype, false>(x, n, block_size, codebook, packed, absmax, bins);
  } else {
    return quantize_blocks<dtype, false>(x, n, block_size, codebook, packed, absmax, Bisection(codebook.thresholds));
  }
}

// --- dequantize --------------------------------------------------------------------------------------------------------

#include "variant_avx512_dequantize.h"

// 8 bytes -> 16 values: dwords 0-7 see the first four bytes, 8-15 the others, each its own nibble.
QLORA_INLINE void decode16(const uint8_t* packed, __m512 table, float* out) {
  const __m512i nibble = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
  int32_t halves[2];
  memcpy(halves, packed, 8);
  __m512i bytes = _mm512_inserti64x4(_mm512_set1_epi32(halves[0]), _mm256_set1_epi32(halves[1]), 1);
  _mm512_storeu_ps(out, _mm512_permutexvar_ps(_mm512_srlv_epi32(bytes, nibble), table));
}

template <DType dtype>
struct Decoder {
  __m512 levels;

  explicit Decoder(const Codebook& codebook) : levels(_mm512_loadu_ps(codebook.levels)) {}
  QLORA_INLINE void operator()(const uint8_t* packed, const float* absmax, int64_t whole,
                               typename Element<dtype>::type* out) const {
    if constexpr (dtype == DType::f32) {
      __m512 table = _mm512_mul_ps(levels, _mm512_set1_ps(*absmax));
      for (int64_t i = 0; i < whole; i += 16) decode16(packed + i / 2, table, out + i);
    } else {
      __m512i table = table16<dtype>(levels, absmax);
      for (int64_t i = 0; i < whole; i += 32) decode32(packed + i / 2, table, out + i);
    }
  }
};

// --- double quantization -------------------------------------------------------------------------------------------------

#include "variant_avx512_double_quant.h"
#include "variant_avx512_search.h"

void double_quantize(const float* absmax, int64_t n, int64_t nested_block_size, float mean, const Map8& map,
                     uint8_t* codes, float* nested_absmax) {
  const Search256 count_below(map.thresholds);
  constexpr int kTogether = 8, kStep = 16 * kTogether;
  const auto encode = [&](const NestedGroup& group, const float* from, uint8_t* to) {
    __m512 s[kTogether];
    __m512i count[kTogether];
    for (int v = 0; v < kTogether; ++v) s[v] = group.normalized(from + 16 * v);
    count_below(s, count);
    for (int v = 0; v < kTogether; ++v) {
      __m128i bytes = _mm512_cvtepi32_epi8(_mm512_max_epi32(count[v], _mm512_set1_epi32(group.lowest)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16 * v), bytes);
    }
  };
  double_quantize_groups(absmax, n, nested_block_size, mean, map, codes, nested_absmax,
                         [&](const NestedGroup& group, const float* from, int64_t size, uint8_t* to) {
                           for (; size >= kStep; size -= kStep, from += kStep, to += kStep) encode(group, from, to);
                           padded<kStep>(from, size, to,
                                         [&](const float* x, uint8_t* codes) { encode(group, x, codes); });
                         });
}

void nested_values(const float* map, float nested_absmax, float mean, float* values) {
  decode_map(map, nested_absmax, mean, values);
}

// --- AdamW ---------------------------------------------------------------------------------------------------------------

#include "variant_avx512_adamw.h"

// --- linear --------------------------------------------------------------------------------------------------------------

#include "linear_rows.h"

// 16 float32 weights a register, as dwords of 8 nibbles: lower half shifted by 8v, upper half by 8v + 4.
template <DType dtype>
struct F32Lanes {
  using X = float;
  using Bytes = __m512i;
  using Table = __m512;
  using Weights = __m512;
  using Sum = __m512;
  static constexpr int kSpan = 1, kRows = 4, kTokens = 6, kFew = 4, kVectors = 4, kVectorBytes = 64, kStepBytes = 256;

  __m512 levels;
  __m512i shift[4];

  QLORA_INLINE explicit F32Lanes(const Codebook& codebook) {
    levels = _mm512_loadu_ps(codebook.levels);
    for (int v = 0; v < 4; ++v) {
      shift[v] = _mm512_inserti64x4(_mm512_set1_epi32(8 * v), _mm256_set1_epi32(8 * v + 4), 1);
    }
  }
  // The 16 values of the block, rounded to dtype and widened again.
  QLORA_INLINE Table table(float absmax) const {
    __m512 scaled = _mm512_mul_ps(levels, _mm512_set1_ps(absmax));
    if constexpr (dtype == DType::f16) {
      return _mm512_cvtph_ps(_mm512_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    } else if constexpr (dtype == DType::bf16) {
      __m512i words = table16<dtype>(levels, &absmax);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(words)), 16));
    } else {
      return scaled;
    }
  }
  static QLORA_INLINE Bytes load(const uint8_t* packed) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
  }
  QLORA_INLINE Weights weights(Bytes bytes, Table table, int v) const {
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(bytes, shift[v]), table);
  }
  static QLORA_INLINE __m512 load_x(const char* x) { return _mm512_loadu_ps(x); }
  static QLORA_INLINE void store(char* out, Weights w) { _mm512_store_ps(out, w); }
  static QLORA_INLINE Sum zero() { return _mm512_setzero_ps(); }
  static QLORA_INLINE Sum add(Sum sum, Weights w, __m512 x) { return _mm512_fmadd_ps(w, x, sum); }
  static QLORA_INLINE float reduce(Sum sum) { return _mm512_reduce_add_ps(sum); }

  static QLORA_INLINE float convert(typename Element<dtype>::type x) { return Element<dtype>::load(x); }
  static QLORA_INLINE void reorder(const typename Element<dtype>::type* x, float* out) {
    reorder_by_source<F32Lanes>(x, out);
  }
  // Which element of 64 belongs to lane j: dword j % 8 of 8, nibble 2v (+ 1: the low nibble is the second element).
  static QLORA_INLINE int source(int j) {
    int v = j / 16, upper = j / 8 % 2;
    return 8 * (j % 8) + 2 * v + (upper ? 0 : 1);
  }
};

template <DType dtype>
constexpr auto f32_rows = linear_rows<F32Lanes<dtype>, dtype>;
template <DType dtype>
constexpr auto f32_prepare = linear_prepare<F32Lanes<dtype>, dtype>;

// --- products with many tokens --------------------------------------------------------------------------------------------

#include "variant_avx512_product.h"

template <DType dtype>
struct F32Product {
  using E = Element<dtype>;
  using T = typename E::type;
  static constexpr int kElements = 1;  // a dword
  static constexpr int kOutputBytes = int(sizeof(T));
  static constexpr int64_t kRun = 256;

  static QLORA_INLINE __m512 add(__m512 sum, __m512i x, __m512i w) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(w), sum);
  }
  static QLORA_INLINE __m512i load_dwords(const char* rows, int64_t first) {
    return _mm512_castps_si512(load16(reinterpret_cast<const T*>(rows) + first, 0xffff));
  }
  static QLORA_INLINE void interleave(const char* rows, int64_t first, int64_t, char* out) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) _mm512_store_si512(out + 64 * v, load_dwords(rows, first + 16 * v));
  }
  static QLORA_INLINE void store(const ProductPiece& piece, int64_t token, const __m512* sum) {
    auto* y = static_cast<T*>(piece.y) + token * piece.y_stride;
    auto* bias = static_cast<const T*>(piece.bias);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const auto mask = __mmask16(first_bits(piece.features - 16 * v));
      __m512 value = bias ? _mm512_add_ps(sum[v], load16(bias + 16 * v, mask)) : sum[v];
      if (piece.onto) value = _mm512_add_ps(value, load16(y + 16 * v, mask));
      store16(y + 16 * v, mask, value);
    }
  }
  static QLORA_INLINE __m512 load16(const T* x, __mmask16 mask) {
    if constexpr (dtype == DType::f32) {
      return _mm512_maskz_loadu_ps(mask, x);
    } else {
      return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, x));
    }
  }
  static QLORA_INLINE void store16(T* y, __mmask16 mask, __m512 value) {
    if constexpr (dtype == DType::f32) {
      _mm512_mask_storeu_ps(y, mask, value);
    } else {
      _mm256_mask_storeu_epi16(y, mask, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
  }
  static void widen(const void* x, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += 16) {
      const auto mask = __mmask16(first_bits(n - i));
      _mm512_mask_storeu_ps(out + i, mask, load16(static_cast<const T*>(x) + i, mask));
    }
  }
};

template <DType dtype>
constexpr ProductLoops f32_product = {4,
                                      pack_features<F32Product<dtype>>,
                                      pack_sum<F32Product<dtype>>,
                                      multiply<F32Product<dtype>>,
                                      dtype == DType::f32 ? nullptr : F32Product<dtype>::widen,
                                      nullptr,
                                      nullptr};

// --- LoRA ----------------------------------------------------------------------------------------------------------------

#include "variant_avx512_f32_lora.h"

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

template <DType dtype>
void extend_dtype(Variant& variant) {
  variant.quantize[int(dtype)] = quantize<dtype>;
  variant.dequantize[int(dtype)] = dequantize<dtype, Decoder<dtype>>;
  variant.dequantize_groups[int(dtype)] = dequantize_groups<dtype, Decoder<dtype>>;
  variant.linear_rows[int(dtype)] = f32_rows<dtype>;
  variant.linear_prepare[int(dtype)] = f32_prepare<dtype>;
  variant.linear_x_bytes[int(dtype)] = 4;
}

void extend(Variant& variant) {
  extend_dtype<DType::f32>(variant);
  extend_dtype<DType::bf16>(variant);
  extend_dtype<DType::f16>(variant);
  variant.product[int(DType::f32)] = f32_product<DType::f32>;
  variant.product[int(DType::f16)] = f32_product<DType::f16>;
  variant.lora[int(DType::f32)] = f32_lora;
  variant.double_quantize = double_quantize;
  variant.nested_values = nested_values;
  variant.adamw = adamw_loops<AdamWLanes>;
}

}  // namespace

const InstructionSet avx512 = {"avx512", supported, extend};

}  // namespace qlora
