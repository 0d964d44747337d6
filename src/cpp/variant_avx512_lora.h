// The thin products of LoRA, in dwords as in the large one (variant.h): an element of float32, or two neighbours along the
// sum in bfloat16. One operand is one dword of x or of the middle, broadcast. So the packed adapter has neither a horizontal
// sum nor a rest: it is padded with zeros.
//
//   down      sums over features: lanes are 16 ranks
//   gradient  sums over tokens: lanes are 16 features
//
// The way up, from the ranks to the features, is a part of the large product (variant_avx512_product.h).
//
// A variant brings the Lanes: those of its product, and how elements become dwords and results are stored.
// Include in an unnamed namespace of a variant file, after linear_step.h and variant_avx512_product.h.
#pragma once

QLORA_INLINE __m512i broadcast_dword(const char* p) {
  int dword;
  memcpy(&dword, p, sizeof dword);
  return _mm512_set1_epi32(dword);
}

QLORA_INLINE int64_t lora_groups(int64_t rank) { return (rank + kLoraGroup - 1) / kLoraGroup; }

// --- the adapter ----------------------------------------------------------------------------------------------------------
//   down  lanes are 16 ranks; [group of ranks][dword of features][16]
//   up    rows of a panel: lanes are 64 features; [panel][dword of ranks][64]
// 16 dwords of features at a time.

template <class Lanes, DType dtype>
void pack_panels(const LoraPacking& p, int64_t begin, int64_t end) {
  constexpr int64_t kUnit = 16 * Lanes::kElements, kUnits = kPanelFeatures / kUnit;
  constexpr int64_t kUp = kPanelRegisters * kLoraGroup / Lanes::kElements;  // registers of a group of ranks
  const int64_t groups = lora_groups(p.rank), units = (p.features + kPanelFeatures - 1) / kPanelFeatures * kUnits;
  for (int64_t unit = kUnits * begin; unit < kUnits * end; ++unit) {
    for (int64_t g = 0; g < groups; ++g) {
      auto* down = p.down ? static_cast<__m512i*>(p.down) + 16 * (g * units + unit) : nullptr;
      auto* up = p.up ? static_cast<__m512i*>(p.up) + kUp * (unit / kUnits * groups + g) : nullptr;
      if (up) up += unit % kUnits * Lanes::kElements;
      if (p.rank_rows) {
        Lanes::template pack_rank_rows<dtype>(p, kLoraGroup * g, kUnit * unit, down, up);
      } else {
        Lanes::template pack_rank_columns<dtype>(p, kLoraGroup * g, kUnit * unit, down, up);
      }
    }
  }
}

// --- down: T tokens -------------------------------------------------------------------------------------------------------

// 16 ranks of T tokens, `stride` bytes apart. Two sums each: one would wait for itself. As in the large product every
// Lanes::kRun dwords have sums of their own.
template <class Lanes, int T>
QLORA_INLINE void down_product(const char* x, int64_t stride, int64_t in, const __m512i* w, __m512* out) {
  const int64_t whole = in / Lanes::kElements;
  int64_t row = 0;
  bool first = true;
  do {
    const int64_t end = whole - row < Lanes::kRun ? whole : row + Lanes::kRun;
    __m512 sum[T][2];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[t][0] = sum[t][1] = _mm512_setzero_ps();
    for (; row + 2 <= end; row += 2, w += 2) {
      __builtin_prefetch(x + (T + row / 2 % 8) * stride + 4 * row);  // of the tokens after these, a line each
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          sum[t][i] = Lanes::add(sum[t][i], broadcast_dword(x + t * stride + 4 * (row + i)), w[i]);
        }
      }
    }
    if (row < end) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) sum[t][0] = Lanes::add(sum[t][0], broadcast_dword(x + t * stride + 4 * row), *w);
      ++row, ++w;
    }
    if (end == whole && whole * Lanes::kElements < in) {  // half a dword
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        uint16_t half;
        memcpy(&half, x + t * stride + 4 * row, sizeof half);
        sum[t][0] = Lanes::add(sum[t][0], _mm512_set1_epi32(half), *w);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const __m512 both = _mm512_add_ps(sum[t][0], sum[t][1]);
      out[t] = first ? both : _mm512_add_ps(out[t], both);
    }
    first = false;
  } while (row < whole);
}

// T tokens from `token` on, an even one: then pairs are whole, but for that of the last token.
template <class Lanes, int T>
void token_block(const LoraTokens& call, int64_t token) {
  const int64_t groups = lora_groups(call.rank), stride = call.in * 4 / Lanes::kElements;
  const int64_t w_group = (call.in + kPanelFeatures - 1) / kPanelFeatures * kPanelFeatures / Lanes::kElements;
  for (int64_t g = 0; g < groups; ++g) {
    __m512 sum[T];
    down_product<Lanes, T>(static_cast<const char*>(call.x) + token * stride, stride, call.in,
                           static_cast<const __m512i*>(call.down) + g * w_group, sum);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[t] = _mm512_mul_ps(sum[t], _mm512_set1_ps(call.scaling));
    const auto ranks = __mmask16(first_bits(call.rank - kLoraGroup * g));  // Inf x has made the padding NaN
    Lanes::template store_middle<T>(call, token, g, groups, ranks, sum);
  }
}

template <class Lanes>
void lora_tokens(const LoraTokens& call, int64_t begin, int64_t end) {
  for (int64_t count; begin < end; begin += count) {
    count = end - begin < kLoraTokens ? end - begin : kLoraTokens;
    with_constant<kLoraTokens>(count,
                               [&](auto constant) { token_block<Lanes, decltype(constant)::value>(call, begin); });
  }
}

// --- gradient: a strip of features ------------------------------------------------------------------------------------------

constexpr int kGradientRanks = 8;     // at a time, two registers each
constexpr int64_t kTokensAhead = 32;  // fetched into the second-level cache: rows of x lie far apart

// Some tokens, of 32 features.
struct TokenStrip {
  const char* x;  // of the first one
  int64_t stride, count;
  __mmask32 mask;
};

// sums (of 8 ranks, two registers each) += dwords of tokens times their strip. `fill`: which first gets there from x.
template <class Lanes, bool fill>
QLORA_INLINE void add_tokens(const TokenStrip& from, __m512i* strip, const char* middle, int64_t stride, bool first,
                             __m512* sums) {
  constexpr bool kCut = Lanes::kRun < INT64_MAX;  // a sum of their own, as kLoraRows are no more than kRun
  __m512 low[kGradientRanks], high[kGradientRanks];
#pragma GCC unroll 8
  for (int r = 0; r < kGradientRanks; ++r) {
    low[r] = kCut || first ? _mm512_setzero_ps() : sums[2 * r];
    high[r] = kCut || first ? _mm512_setzero_ps() : sums[2 * r + 1];
  }
  const char* x = from.x;
  for (int64_t t = 0; t < from.count; t += Lanes::kElements, strip += 2, middle += stride) {
    if constexpr (fill) {
      Lanes::load_strip(x, t + 1 < from.count ? x + from.stride : nullptr, from.mask, strip);
      const char* ahead = x + kTokensAhead * from.stride;
      __builtin_prefetch(ahead, 0, 2);
      __builtin_prefetch(Lanes::kElements == 1 ? ahead + 64 : ahead + from.stride, 0, 2);
      x += Lanes::kElements * from.stride;
    }
#pragma GCC unroll 8
    for (int r = 0; r < kGradientRanks; ++r) {
      const __m512i dword = broadcast_dword(middle + 4 * r);
      low[r] = Lanes::add(low[r], dword, strip[0]);
      high[r] = Lanes::add(high[r], dword, strip[1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kGradientRanks; ++r) {
    sums[2 * r] = kCut && !first ? _mm512_add_ps(sums[2 * r], low[r]) : low[r];
    sums[2 * r + 1] = kCut && !first ? _mm512_add_ps(sums[2 * r + 1], high[r]) : high[r];
  }
}

template <class Lanes>
QLORA_INLINE void store_rank_rows(const LoraGradient& call, int64_t feature, const __m512* sums) {
  const uint32_t mask = first_bits(call.features - feature);
  for (int64_t r = 0; r < call.rank; ++r) {
    __m512 low = sums[2 * r], high = sums[2 * r + 1];
    Lanes::in_order(low, high);
    Lanes::store_gradient(call, r * call.features + feature, __mmask16(mask), low);
    Lanes::store_gradient(call, r * call.features + feature + 16, __mmask16(mask >> 16), high);
  }
}

template <class Lanes>
QLORA_INLINE void store_rank_columns(const LoraGradient& call, int64_t feature, const __m512* sums) {
  for (int64_t rank = 0; rank < call.rank; rank += 16) {
    const auto mask = __mmask16(first_bits(call.rank - rank));
    for (int half = 0; half < 2; ++half) {
      __m512i rows[16];
      for (int r = 0; r < 16; ++r) {
        rows[r] = rank + r < call.rank ? _mm512_castps_si512(sums[2 * (rank + r) + half]) : _mm512_setzero_si512();
      }
      transpose16(rows);
      for (int i = 0; i < 16; ++i) {
        const int64_t f = feature + Lanes::feature_of(half, i);
        if (f < call.features) {
          Lanes::store_gradient(call, f * call.rank + rank, mask, _mm512_castsi512_ps(rows[i]));
        }
      }
    }
  }
}

template <class Lanes>
void lora_gradient(const LoraGradient& call, void* scratch, int64_t begin, int64_t end) {
  constexpr int64_t kBytes = 4 / Lanes::kElements, kTokens = kLoraRows * Lanes::kElements;
  auto* strip = static_cast<__m512i*>(scratch);
  auto* sums = reinterpret_cast<__m512*>(strip + 2 * kLoraRows);
  const int64_t stride = lora_groups(call.rank) * kLoraGroup * 4, x_stride = call.features * kBytes;
  for (int64_t feature = begin * kLoraStrip; feature < end * kLoraStrip; feature += kLoraStrip) {
    for (int64_t token = 0; token < call.m; token += kTokens) {
      const TokenStrip from{static_cast<const char*>(call.x) + token * x_stride + feature * kBytes, x_stride,
                            call.m - token < kTokens ? call.m - token : kTokens, first_bits(call.features - feature)};
      auto* middle = static_cast<const char*>(call.dwords) + token / Lanes::kElements * stride;
      add_tokens<Lanes, true>(from, strip, middle, stride, token == 0, sums);
      for (int64_t r = kGradientRanks; r < call.rank; r += kGradientRanks) {
        add_tokens<Lanes, false>(from, strip, middle + 4 * r, stride, token == 0, sums + 2 * r);
      }
    }
    call.rank_rows ? store_rank_rows<Lanes>(call, feature, sums) : store_rank_columns<Lanes>(call, feature, sums);
  }
}
