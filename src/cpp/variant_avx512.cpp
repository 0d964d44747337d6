// AVX-512 F, BW, VL, DQ: quantize, dequantize, double quantization, AdamW. Bits as variant_scalar.cpp, which also gets the rests.
#include <immintrin.h>

#include <cstring>

#include "element.h"
#include "variant.h"

namespace qlora {
namespace {

constexpr uint32_t kInfinityBits = 0x7f800000u;
const float kNaN = bits_to_float(0x7fc00000u);

// --- quantize ----------------------------------------------------------------------------------------------------------
// 32 elements make 16 bytes: the even elements in one register of 16 floats, the odd in another, so that
// code(even) << 4 | code(odd) is a byte in place.

struct Pair {
  __m512 even, odd;
};

template <DType dtype>
inline __attribute__((always_inline)) Pair load_pair(const void* x);

template <>
inline __attribute__((always_inline)) Pair load_pair<DType::bf16>(const void* x) {
  __m512i both = _mm512_loadu_si512(x);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000u))))};
}

template <>
inline __attribute__((always_inline)) Pair load_pair<DType::f32>(const void* x) {
  auto* p = static_cast<const float*>(x);
  __m512 a = _mm512_loadu_ps(p), b = _mm512_loadu_ps(p + 16);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return {_mm512_permutex2var_ps(a, even, b),
          _mm512_permutex2var_ps(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b)};
}

template <>
inline __attribute__((always_inline)) Pair load_pair<DType::f16>(const void* x) {
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

  static inline __attribute__((always_inline)) __m512i bin(__m512 s) {
    return _mm512_cvttps_epi32(_mm512_fmadd_ps(s, _mm512_set1_ps(15.99f), _mm512_set1_ps(16.0f)));
  }

  explicit Bins(const float* thresholds) : usable(true) {
    float threshold_of[32], ordered[16];
    int32_t below_of[32], bin_of[16];
    memcpy(ordered, thresholds, 15 * sizeof(float));
    ordered[15] = bits_to_float(kInfinityBits);
    _mm512_storeu_si512(bin_of, bin(_mm512_loadu_ps(ordered)));
    for (int i = 0; i < 32; ++i) {
      threshold_of[i] = ordered[15];
      below_of[i] = 0;
      for (int t = 0; t < 15 && is_finite(ordered[t]); ++t) {
        below_of[i] += bin_of[t] < i;
        if (bin_of[t] != i) continue;
        usable = usable && !is_finite(threshold_of[i]);
        threshold_of[i] = ordered[t];
      }
    }
    for (int half = 0; half < 2; ++half) {
      threshold[half] = _mm512_loadu_ps(threshold_of + 16 * half);
      below[half] = _mm512_loadu_si512(below_of + 16 * half);
    }
  }

  // NaN lands in bin 0 and below no threshold: 0.
  inline __attribute__((always_inline)) __m512i operator()(__m512 s) const {
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

  inline __attribute__((always_inline)) __m512i operator()(__m512 s) const {
    __m512i count = _mm512_setzero_si512();
    for (int step = 8; step; step /= 2) {
      __m512 next = _mm512_permutexvar_ps(_mm512_add_epi32(count, _mm512_set1_epi32(step - 1)), thresholds);
      __mmask16 above = _mm512_cmp_ps_mask(next, s, _CMP_LT_OQ);
      count = _mm512_mask_add_epi32(count, above, count, _mm512_set1_epi32(step));
    }
    return count;
  }
};

template <DType dtype, bool in_value_order, class Count>
void quantize_blocks(const void* x_, int64_t n, int64_t block_size, const Codebook& codebook, uint8_t* packed,
                     float* absmax, const Count& count_below_all) {
  using T = typename Element<dtype>::type;
  auto* x = static_cast<const T*>(x_);
  alignas(64) int32_t order[16];
  for (int i = 0; i < 16; ++i) order[i] = codebook.order[i];
  const __m512i code_of = _mm512_load_si512(order);
  for (; n >= block_size; n -= block_size, x += block_size, packed += block_size / 2, ++absmax) {
    uint32_t largest = largest_magnitude<dtype>(x, block_size);
    float scale = largest >= kInfinityBits ? kNaN : bits_to_float(largest);
    if (scale < kSmallestNormal) {
      *absmax = 0.0f;
      memset(packed, codebook.zero_code * 0x11, size_t(block_size / 2));
      continue;
    }
    if (scale > kLargestInvertible) {
      scalar_variant.quantize[int(dtype)](x, block_size, block_size, codebook, packed, absmax);
      continue;
    }
    if (codebook.signed_absmax && largest < kInfinityBits && !contains<dtype>(x, block_size, scale)) scale = -scale;
    *absmax = scale;
    const __m512 inverse = _mm512_set1_ps(1.0f / scale);
    for (int64_t i = 0; i < block_size; i += 32) {
      Pair pair = load_pair<dtype>(x + i);
      __m512i even = count_below_all(_mm512_mul_ps(pair.even, inverse));
      __m512i odd = count_below_all(_mm512_mul_ps(pair.odd, inverse));
      if (!in_value_order) {
        even = _mm512_permutexvar_epi32(even, code_of);
        odd = _mm512_permutexvar_epi32(odd, code_of);
      }
      __m512i bytes = _mm512_or_si512(_mm512_slli_epi32(even, 4), odd);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2), _mm512_cvtepi32_epi8(bytes));
    }
  }
  if (n) scalar_variant.quantize[int(dtype)](x, n, block_size, codebook, packed, absmax);
}

template <DType dtype>
void quantize(const void* x, int64_t n, int64_t block_size, const Codebook& codebook, uint8_t* packed, float* absmax) {
  bool in_value_order = true;
  for (int i = 0; i < 16; ++i) in_value_order = in_value_order && codebook.order[i] == i;
  Bins bins(codebook.thresholds);
  if (bins.usable && in_value_order) {
    quantize_blocks<dtype, true>(x, n, block_size, codebook, packed, absmax, bins);
  } else if (bins.usable) {
    quantize_blocks<dtype, false>(x, n, block_size, codebook, packed, absmax, bins);
  } else {
    quantize_blocks<dtype, false>(x, n, block_size, codebook, packed, absmax, Bisection(codebook.thresholds));
  }
}

// --- dequantize --------------------------------------------------------------------------------------------------------
// A block has 16 different values: scale and round the table once, then look up. Only the low bits of an index count
// (5 of a word, 4 of a dword), so a nibble is never masked: the 16-bit table is stored twice.

// The 16 values of a block as 16-bit words, twice.
template <DType dtype>
inline __attribute__((always_inline)) __m512i table16(__m512 levels, float absmax) {
  __m512 scaled = _mm512_mul_ps(levels, _mm512_set1_ps(absmax));
  if constexpr (dtype == DType::bf16) {
    // To nearest even by integer arithmetic: vcvtneps2bf16 would flush subnormals. Then the upper words, twice.
    if (!is_finite(absmax)) scaled = _mm512_set1_ps(kNaN);
    __m512i bits = _mm512_castps_si512(scaled);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i upper_words = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1,  //
                                                 31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_permutexvar_epi16(upper_words, up);
  } else {
    return _mm512_broadcast_i64x4(_mm512_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}

// 16 bytes -> 32 values. Every lane gets the bytes, takes its four, each twice as words, the first one shifted by 4.
inline __attribute__((always_inline)) void decode32(const uint8_t* packed, __m512i table, void* out) {
  const __m512i spread = _mm512_setr_epi32(int(0x80008000), int(0x80018001), int(0x80028002), int(0x80038003),
                                           int(0x80048004), int(0x80058005), int(0x80068006), int(0x80078007),
                                           int(0x80088008), int(0x80098009), int(0x800a800a), int(0x800b800b),
                                           int(0x800c800c), int(0x800d800d), int(0x800e800e), int(0x800f800f));
  const __m512i phase = _mm512_set1_epi32(0x00000004);
  __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
  __m512i index = _mm512_srlv_epi16(_mm512_shuffle_epi8(bytes, spread), phase);
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table));
}

// 8 bytes -> 16 values: dwords 0-7 see the first four bytes, 8-15 the others, each its own nibble.
inline __attribute__((always_inline)) void decode16(const uint8_t* packed, __m512 table, float* out) {
  const __m512i nibble = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
  int32_t halves[2];
  memcpy(halves, packed, 8);
  __m512i bytes = _mm512_inserti64x4(_mm512_set1_epi32(halves[0]), _mm256_set1_epi32(halves[1]), 1);
  _mm512_storeu_ps(out, _mm512_permutexvar_ps(_mm512_srlv_epi32(bytes, nibble), table));
}

// `whole` elements of one block, a multiple of 32.
template <DType dtype>
inline __attribute__((always_inline)) void dequantize_block(const uint8_t* packed, float absmax, int64_t whole,
                                                            __m512 levels, typename Element<dtype>::type* out) {
  if constexpr (dtype == DType::f32) {
    __m512 table = _mm512_mul_ps(levels, _mm512_set1_ps(absmax));
    for (int64_t i = 0; i < whole; i += 16) decode16(packed + i / 2, table, out + i);
  } else {
    __m512i table = table16<dtype>(levels, absmax);
    for (int64_t i = 0; i < whole; i += 32) decode32(packed + i / 2, table, out + i);
  }
}

template <DType dtype>
void dequantize(const uint8_t* packed, const float* absmax, int64_t n, int64_t block_size, const Codebook& codebook,
                void* out_) {
  auto* out = static_cast<typename Element<dtype>::type*>(out_);
  const __m512 levels = _mm512_loadu_ps(codebook.levels);
  if (block_size == 64) {  // the same, unrolled
    for (; n >= 64; n -= 64, out += 64, packed += 32) dequantize_block<dtype>(packed, *absmax++, 64, levels, out);
  }
  for (; n > 0; n -= block_size, out += block_size, packed += block_size / 2, ++absmax) {
    int64_t size = n < block_size ? n : block_size, whole = size & ~int64_t(31);
    dequantize_block<dtype>(packed, *absmax, whole, levels, out);
    if (whole < size) {
      scalar_variant.dequantize[int(dtype)](packed + whole / 2, absmax, size - whole, block_size, codebook,
                                            out + whole);
    }
  }
}

// --- double quantization -------------------------------------------------------------------------------------------------

#include "variant_avx512_search.h"

void double_quantize(const float* absmax, int64_t n, float mean, const Map8& map, uint8_t* codes,
                     float* nested_absmax) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t magnitude = float_to_bits(absmax[i] - mean) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  float scale = largest >= kInfinityBits ? kNaN : bits_to_float(largest);
  if (!(scale >= kSmallestNormal && scale <= kLargestInvertible)) {  // rare: zero, NaN, huge
    scalar_variant.double_quantize(absmax, n, mean, map, codes, nested_absmax);
    return;
  }
  *nested_absmax = scale;
  int lowest = 0;
  while (lowest < 255 && !(double_decode(map.levels[lowest], scale, mean) >= 0.0f)) ++lowest;
  if (!(double_decode(map.levels[lowest], scale, mean) >= 0.0f)) lowest = 0;

  const Search256 below(map.thresholds);
  const __m512 inverse = _mm512_set1_ps(1.0f / scale);
  for (int64_t i = 0; i < n; i += 16) {
    __mmask16 valid = n - i >= 16 ? 0xffff : __mmask16((1 << (n - i)) - 1);
    __m512 d = _mm512_sub_ps(_mm512_maskz_loadu_ps(valid, absmax + i), _mm512_set1_ps(mean));
    const __m512 s[] = {_mm512_mul_ps(d, inverse)};
    __m512i count[1];
    below(s, count);
    count[0] = _mm512_max_epi32(count[0], _mm512_set1_epi32(lowest));
    _mm_mask_storeu_epi8(codes + i, valid, _mm512_cvtepi32_epi8(count[0]));
  }
}

// map[code] for 16 codes by shuffles, cheaper here than a gather: the map lies in 16 registers; the low 5 bits of a code
// choose in each pair of them, then each of the high 3 bits halves the number of candidates.
struct Map256 {
  __m512 part[16];

  explicit Map256(const float* map) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) part[i] = _mm512_loadu_ps(map + 16 * i);
  }

  inline __attribute__((always_inline)) __m512 operator()(__m512i code) const {
    __mmask16 bit5 = _mm512_test_epi32_mask(code, _mm512_set1_epi32(32));
    __mmask16 bit6 = _mm512_test_epi32_mask(code, _mm512_set1_epi32(64));
    __mmask16 bit7 = _mm512_test_epi32_mask(code, _mm512_set1_epi32(128));
    auto in32 = [&](int i) { return _mm512_permutex2var_ps(part[2 * i], code, part[2 * i + 1]); };
    auto in64 = [&](int i) { return _mm512_mask_blend_ps(bit5, in32(i), in32(i + 1)); };
    auto in128 = [&](int i) { return _mm512_mask_blend_ps(bit6, in64(i), in64(i + 2)); };
    return _mm512_mask_blend_ps(bit7, in128(0), in128(4));
  }
};

void double_dequantize(const Absmax& absmax, int64_t first, int64_t n, float* out) {
  const __m512 mean = _mm512_set1_ps(*absmax.mean);
  const Map256 map(absmax.map);
  while (n > 0) {
    int64_t group = first / absmax.nested_block_size, room = (group + 1) * absmax.nested_block_size - first;
    int64_t size = n < room ? n : room;
    const __m512 scale = _mm512_set1_ps(absmax.nested_absmax[group]);
    for (int64_t i = 0; i < size; i += 16) {
      __mmask16 valid = size - i >= 16 ? 0xffff : __mmask16((1 << (size - i)) - 1);
      __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(valid, absmax.codes + first + i));
      __m512 level = map(code);
      _mm512_mask_storeu_ps(out + i, valid, _mm512_add_ps(_mm512_mul_ps(level, scale), mean));
    }
    first += size;
    out += size;
    n -= size;
  }
}

// --- AdamW ---------------------------------------------------------------------------------------------------------------

#include "variant_avx512_adamw.h"

// --- linear --------------------------------------------------------------------------------------------------------------

#include "linear_tile.h"

// 16 float32 weights a register, as dwords of 8 nibbles: lower half shifted by 8v, upper half by 8v + 4.
template <DType dtype>
struct F32Lanes {
  using X = float;
  using Bytes = __m512i;
  using Table = __m512;
  using Weights = __m512;
  using Sum = __m512;
  static constexpr int kRows = 4, kTokens = 6, kVectors = 4, kVectorBytes = 64, kGroupBytes = 256;

  __m512 levels;
  __m512i shift[4];

  inline __attribute__((always_inline)) explicit F32Lanes(const Codebook& codebook) {
    levels = _mm512_loadu_ps(codebook.levels);
    for (int v = 0; v < 4; ++v) {
      shift[v] = _mm512_inserti64x4(_mm512_set1_epi32(8 * v), _mm256_set1_epi32(8 * v + 4), 1);
    }
  }
  // The 16 values of the block, rounded to dtype and widened again.
  inline __attribute__((always_inline)) Table table(float absmax) const {
    __m512 scaled = _mm512_mul_ps(levels, _mm512_set1_ps(absmax));
    if constexpr (dtype == DType::f16) {
      return _mm512_cvtph_ps(_mm512_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    } else if constexpr (dtype == DType::bf16) {
      __m512i words = table16<dtype>(levels, absmax);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(words)), 16));
    } else {
      return scaled;
    }
  }
  static inline __attribute__((always_inline)) Bytes load(const uint8_t* packed) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
  }
  inline __attribute__((always_inline)) Weights weights(Bytes bytes, Table table, int v) const {
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(bytes, shift[v]), table);
  }
  static inline __attribute__((always_inline)) __m512 load_x(const char* x) { return _mm512_loadu_ps(x); }
  static inline __attribute__((always_inline)) void store(char* out, Weights w) { _mm512_store_ps(out, w); }
  static inline __attribute__((always_inline)) Sum zero() { return _mm512_setzero_ps(); }
  static inline __attribute__((always_inline)) Sum add(Sum sum, Weights w, __m512 x) {
    return _mm512_fmadd_ps(w, x, sum);
  }
  static inline __attribute__((always_inline)) float reduce(Sum sum) { return _mm512_reduce_add_ps(sum); }

  static inline __attribute__((always_inline)) float convert(typename Element<dtype>::type x) {
    return Element<dtype>::load(x);
  }
  // Which element of 64 belongs to lane j: dword j % 8 of 8, nibble 2v (+ 1: the low nibble is the second element).
  static inline __attribute__((always_inline)) int source(int j) {
    int v = j / 16, upper = j / 8 % 2;
    return 8 * (j % 8) + 2 * v + (upper ? 0 : 1);
  }
};

template <DType dtype>
constexpr auto f32_rows = linear_rows<F32Lanes<dtype>, dtype>;
template <DType dtype>
constexpr auto f32_prepare = linear_prepare<F32Lanes<dtype>, dtype>;

}  // namespace

const Variant avx512_variant = {
    "avx512",
    [] {
      return bool(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"));
    },
    {quantize<DType::f32>, quantize<DType::bf16>, quantize<DType::f16>},
    {dequantize<DType::f32>, dequantize<DType::bf16>, dequantize<DType::f16>},
    double_quantize,
    double_dequantize,
    {f32_rows<DType::f32>, f32_rows<DType::bf16>, f32_rows<DType::f16>},
    {f32_prepare<DType::f32>, f32_prepare<DType::bf16>, f32_prepare<DType::f16>},
    {4, 4, 4},
    adamw_loops<AdamWLanes>,
};

}  // namespace qlora
