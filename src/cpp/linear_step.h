// What the two loops of the linear layer share: where absmax come from, a decoded step, and numbers of tokens as constants.
//
// A step is Lanes::kSpan times 64 weights: 32 or 64 bytes, seen as words or dwords of several nibbles. Register v of a
// step is shifted so that every lane has another nibble in its low bits, the index of a table look-up. So the weights come
// in a fixed, odd order; instead of putting them right, linear_prepare puts x into the same order, once per call.
#pragma once

// Where the absmax come from. Under double quantization absmax' takes only 256 values in a nested group: they are computed
// once (`values`), and the loop looks them up by code.
struct Scales {
  const uint8_t* codes;  // of block 0 of the tensor
  const float* absmax;   // flat: of block 0
  const float* values;   // nested: 256 a group, group g in slot g & mask
  int64_t mask;
  int nested_shift;  // log2 of the nested block size

  QLORA_INLINE const float* values_of(int64_t block) const { return values + 256 * ((block >> nested_shift) & mask); }
  QLORA_INLINE float operator[](int64_t block) const { return codes ? values_of(block)[codes[block]] : absmax[block]; }
};

// absmax' of every code for the groups of blocks first .. last, which ascend from call to call, and for one group more: so
// a value is looked up long after it was stored, which a store still on its way to the cache would delay.
inline Scales scales(const Absmax& absmax, int64_t first, int64_t last, int64_t blocks, LinearScratch& scratch) {
  if (!absmax.codes) return {nullptr, absmax.absmax, nullptr, 0, 0};
  const int shift = __builtin_ctzll(uint64_t(absmax.nested_block_size));
  const int64_t last_of_all = (blocks - 1) >> shift, ahead = (last >> shift) + 1;
  const int64_t until = ahead < last_of_all ? ahead : last_of_all;
  if (scratch.next_group < first >> shift) scratch.next_group = first >> shift;
  for (; scratch.next_group <= until; ++scratch.next_group) {
    const float mean = *absmax.mean, scale = absmax.nested_absmax[scratch.next_group], *__restrict__ map = absmax.map;
    float* __restrict__ values = scratch.values + 256 * (scratch.next_group & scratch.mask);
    for (int code = 0; code < 256; ++code) values[code] = double_decode(map[code], scale, mean);
  }
  return {absmax.codes, nullptr, scratch.values, scratch.mask, shift};
}

QLORA_INLINE uint16_t load_pair(const uint8_t* codes) {  // the first one in the low byte: AVX-512 is little-endian
  uint16_t pair;
  memcpy(&pair, codes, sizeof pair);
  return pair;
}

// A step of one row, ready to be decoded.
template <class Lanes>
struct Step {
  typename Lanes::Bytes bytes;
  typename Lanes::Table table;

  // `absmax(s)` is that of the s-th group of 64.
  template <class Get>
  static QLORA_INLINE Step full(const Lanes& lanes, const uint8_t* packed, Get absmax) {
    if constexpr (Lanes::kSpan == 1) {
      return {Lanes::load(packed), lanes.table(absmax(0))};
    } else {
      return {Lanes::load(packed), lanes.table(absmax(0), absmax(1))};
    }
  }
  // The last one of a row may have one group only; x is zero in the place of the other.
  static QLORA_INLINE Step any(const Lanes& lanes, const uint8_t* packed, const Scales& scales, int64_t first_block,
                               int64_t group, int shift, bool half) {
    auto absmax = [&](int s) { return scales[first_block + ((group + s) >> shift)]; };
    if constexpr (Lanes::kSpan == 2) {
      if (half) return {Lanes::load_half(packed), lanes.table(absmax(0), 0.0f)};
    }
    return full(lanes, packed, absmax);
  }
};

// How many of `rest` tokens to take next, at most T: 8 are 4 + 4 and not 6 + 2.
template <int T>
inline int64_t evenly(int64_t rest) {
  int64_t times = (rest + T - 1) / T;
  return (rest + times - 1) / times;
}

// f(a constant equal to `tokens`), 1 to T: the kernels want the number of tokens at compile time.
template <int T, class F>
QLORA_INLINE void with_constant(int64_t tokens, const F& f) {
  if (tokens == T) return f(std::integral_constant<int, T>());
  if constexpr (T > 1) with_constant<T - 1>(tokens, f);
}
