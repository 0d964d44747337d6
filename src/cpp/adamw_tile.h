// The AdamW step over memory that one thread owns, for all instruction sets; a variant brings the Lanes: a register of
// kCount floats, its loads and stores, the two look-ups of the 8-bit codec. What one element does is in adamw_math.h.
//
// Include in an unnamed namespace of a variant file (see variant.h about inlining).

template <class Lanes, DType dtype, AdamWOrder order>
void adamw(const AdamWPiece& piece, const AdamWCoefficients& c, int64_t begin, int64_t end) {
  using T = typename Element<dtype>::type;
  T* __restrict param = static_cast<T*>(piece.param);
  const T* __restrict grad = static_cast<const T*>(piece.grad);
  float* __restrict exp_avg = piece.exp_avg;
  float* __restrict exp_avg_sq = piece.exp_avg_sq;
  const AdamWCoefficients mine = c;  // nothing written here can change it, so it stays in registers
  for (int64_t i = begin; i < end; i += Lanes::kCount) {
    auto theta = Lanes::template load<dtype>(param + i);
    auto m = Lanes::template load<DType::f32>(exp_avg + i), v = Lanes::template load<DType::f32>(exp_avg_sq + i);
    adamw_element<order, Lanes>(theta, Lanes::template load<dtype>(grad + i), m, v, mine);
    Lanes::template store<dtype>(param + i, theta);
    Lanes::template store<DType::f32>(exp_avg + i, m);
    Lanes::template store<DType::f32>(exp_avg_sq + i, v);
  }
}

// One block of codes -> floats.
template <class Lanes>
QLORA_HD void decode_block(const uint8_t* codes, float absmax, const typename Lanes::Levels& levels, float* x) {
  for (int i = 0; i < kStateBlock; i += Lanes::kCount) {
    Lanes::template store<DType::f32>(x + i, levels(codes + i) * absmax);
  }
}

// One block of floats -> codes, given its absmax. A code of x > 0 is at least `lowest` (see moment_code).
template <class Lanes, int lowest>
QLORA_HD void encode_block(const float* x, float absmax, int zero_code, const typename Lanes::Search& below,
                           uint8_t* codes) {
  if (absmax == 0.0f) {
    memset(codes, zero_code, kStateBlock);
    return;
  }
  const float inverse = 1.0f / absmax;
  const bool divide = absmax > kLargestInvertible;
  constexpr int kTogether = Lanes::kTogether;
  for (int i = 0; i < kStateBlock; i += kTogether * Lanes::kCount, x += kTogether * Lanes::kCount) {
    typename Lanes::F value[kTogether], s[kTogether];
    typename Lanes::Code code[kTogether];
#pragma GCC unroll 4
    for (int k = 0; k < kTogether; ++k) {
      value[k] = Lanes::template load<DType::f32>(x + k * Lanes::kCount);
      s[k] = divide ? value[k] / absmax : value[k] * inverse;
    }
    below(s, code);
#pragma GCC unroll 4
    for (int k = 0; k < kTogether; ++k) {
      Lanes::template store_codes<lowest>(codes + i + k * Lanes::kCount, code[k], value[k]);
    }
  }
}

// Loop after loop over a block that stays in the first-level cache: each needs the registers for its own table.
template <class Lanes, DType dtype>
void adamw_8bit(const AdamW8bitPiece& piece, const AdamWCoefficients& c, const Map8* maps, int64_t begin, int64_t end) {
  using T = typename Element<dtype>::type;
  const typename Lanes::Levels m_levels(maps[0].levels), v_levels(maps[1].levels);
  const typename Lanes::Search m_below(maps[0].thresholds), v_below(maps[1].thresholds);
  const AdamWCoefficients mine = c;
  alignas(64) float ms[kStateBlock], vs[kStateBlock];
  for (int64_t b = begin; b < end; ++b) {
    T* param = static_cast<T*>(piece.param) + b * kStateBlock;
    const T* grad = static_cast<const T*>(piece.grad) + b * kStateBlock;
    uint8_t *m_codes = piece.m_codes + b * kStateBlock, *v_codes = piece.v_codes + b * kStateBlock;
    decode_block<Lanes>(m_codes, piece.m_absmax[b], m_levels, ms);
    decode_block<Lanes>(v_codes, piece.v_absmax[b], v_levels, vs);
    typename Lanes::Key m_key{}, v_key{};
    for (int i = 0; i < kStateBlock; i += Lanes::kCount) {
      auto theta = Lanes::template load<dtype>(param + i);
      auto m = Lanes::template load<DType::f32>(ms + i), v = Lanes::template load<DType::f32>(vs + i);
      adamw_element<AdamWOrder::loop, Lanes>(theta, Lanes::template load<dtype>(grad + i), m, v, mine);
      Lanes::template store<dtype>(param + i, theta);
      Lanes::template store<DType::f32>(ms + i, m);
      Lanes::template store<DType::f32>(vs + i, v);
      m_key = Lanes::larger(m_key, m), v_key = Lanes::larger(v_key, v);
    }
    piece.m_absmax[b] = absmax_of_key(Lanes::largest(m_key));
    piece.v_absmax[b] = absmax_of_key(Lanes::largest(v_key));
    encode_block<Lanes, 0>(ms, piece.m_absmax[b], maps[0].zero_code, m_below, m_codes);
    encode_block<Lanes, 1>(vs, piece.v_absmax[b], maps[1].zero_code, v_below, v_codes);
  }
}

template <class Lanes>
constexpr AdamWLoops adamw_loops = {
    {{adamw<Lanes, DType::f32, AdamWOrder::loop>, adamw<Lanes, DType::bf16, AdamWOrder::loop>},
     {adamw<Lanes, DType::f32, AdamWOrder::fused>, adamw<Lanes, DType::bf16, AdamWOrder::fused>}},
    {adamw_8bit<Lanes, DType::f32>, adamw_8bit<Lanes, DType::bf16>},
};
