// The AdamW step over memory that one thread owns, for all instruction sets; a variant brings the Lanes: a register of
// kCount floats, its loads and stores, and the 8-bit codec. What one element does is in adamw_math.h.
//
// Include in an unnamed namespace of a variant file (see variant.h about inlining).

template <class Lanes, DType dtype, AdamWOrder order>
void adamw(const AdamWPiece& piece, const AdamWCoefficients& c, int64_t begin, int64_t end) {
  using T = typename Element<dtype>::type;
  T* __restrict param = static_cast<T*>(piece.param);
  const T* __restrict grad = static_cast<const T*>(piece.grad);
  float *__restrict exp_avg = piece.exp_avg, *__restrict exp_avg_sq = piece.exp_avg_sq;
  const AdamWCoefficients mine = c;  // as nothing that is written here can be
  for (int64_t i = begin; i < end; i += Lanes::kCount) {
    auto theta = Lanes::template load<dtype>(param + i);
    auto m = Lanes::template load<DType::f32>(exp_avg + i), v = Lanes::template load<DType::f32>(exp_avg_sq + i);
    adamw_element<order, Lanes>(theta, Lanes::template load<dtype>(grad + i), m, v, mine);
    Lanes::template store<dtype>(param + i, theta);
    Lanes::template store<DType::f32>(exp_avg + i, m);
    Lanes::template store<DType::f32>(exp_avg_sq + i, v);
  }
}

// What both directions of the 8-bit codec look up.
template <class Lanes>
struct MomentCodec {
  typename Lanes::Levels levels;
  typename Lanes::Search below;
  int zero_code;

  inline __attribute__((always_inline)) explicit MomentCodec(const Map8& map)
      : levels(map.levels), below(map.thresholds), zero_code(map.zero_code) {}

  // One block of codes -> floats.
  inline __attribute__((always_inline)) void decode(const uint8_t* codes, float absmax, float* out) const {
    for (int i = 0; i < kStateBlock; i += Lanes::kCount) {
      Lanes::template store<DType::f32>(out + i, levels(codes + i) * absmax);
    }
  }

  // One block of floats -> codes; returns its absmax. A code of x > 0 is at least `lowest` (see moment_code).
  template <int lowest>
  inline __attribute__((always_inline)) float encode(const float* x, uint8_t* codes) const {
    typename Lanes::Key key{};
    for (int i = 0; i < kStateBlock; i += Lanes::kCount) key = Lanes::larger(key, x + i);
    const float absmax = absmax_of_key(Lanes::largest(key)), inverse = 1.0f / absmax;
    if (absmax == 0.0f) {
      memset(codes, zero_code, kStateBlock);
      return absmax;
    }
    const bool divide = absmax > kLargestInvertible;
    for (int i = 0; i < kStateBlock; i += Lanes::kCount) {
      const auto value = Lanes::template load<DType::f32>(x + i);
      const auto code = below(divide ? value / absmax : value * inverse);
      Lanes::template store_codes<lowest>(codes + i, code, value);
    }
    return absmax;
  }
};

template <class Lanes, DType dtype>
void adamw_8bit(const AdamW8bitPiece& piece, const AdamWCoefficients& c, const Map8* maps, int64_t begin, int64_t end) {
  using T = typename Element<dtype>::type;
  const MomentCodec<Lanes> m_codec(maps[0]), v_codec(maps[1]);
  alignas(64) float m[kStateBlock], v[kStateBlock];
  for (int64_t b = begin; b < end; ++b) {
    const int64_t start = b * kStateBlock;
    m_codec.decode(piece.m_codes + start, piece.m_absmax[b], m);
    v_codec.decode(piece.v_codes + start, piece.v_absmax[b], v);
    AdamWPiece block{};
    block.param = static_cast<T*>(piece.param) + start, block.grad = static_cast<const T*>(piece.grad) + start;
    block.exp_avg = m, block.exp_avg_sq = v;
    adamw<Lanes, dtype, AdamWOrder::loop>(block, c, 0, kStateBlock);
    piece.m_absmax[b] = m_codec.template encode<0>(m, piece.m_codes + start);
    piece.v_absmax[b] = v_codec.template encode<1>(v, piece.v_codes + start);
  }
}

template <class Lanes>
constexpr AdamWLoops adamw_loops = {
    {{adamw<Lanes, DType::f32, AdamWOrder::loop>, adamw<Lanes, DType::bf16, AdamWOrder::loop>},
     {adamw<Lanes, DType::f32, AdamWOrder::fused>, adamw<Lanes, DType::bf16, AdamWOrder::fused>}},
    {adamw_8bit<Lanes, DType::f32>, adamw_8bit<Lanes, DType::bf16>},
};
