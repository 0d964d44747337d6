// AdamW (reference/adamw.py): float32 or bf16 parameters, float32 or 8-bit moments. Class EXACT.
//
// The step needs a fused multiply-add. On x86 it is compiled twice, with and without the instruction; without it the C
// library computes the same bits, slowly.
#include <algorithm>

#include "adamw_math.h"
#include "kernels.h"
#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define QLORA_FMA_TARGET __attribute__((target("avx2,fma")))
#endif

namespace qlora {
namespace {

QLORA_HD float load(const float* p) { return *p; }
QLORA_HD float load(const uint16_t* p) { return bf16_to_float(*p); }
QLORA_HD void store(float* p, float x) { *p = x; }
QLORA_HD void store(uint16_t* p, float x) { *p = float_to_bf16(x); }

template <class T, AdamWOrder order>
QLORA_HD void update(T* __restrict param, const T* __restrict grad, float* __restrict exp_avg,
                     float* __restrict exp_avg_sq, AdamWCoefficients c, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float theta = load(param + i), m = exp_avg[i], v = exp_avg_sq[i];
    adamw_element<order>(theta, load(grad + i), m, v, c);
    store(param + i, theta);
    exp_avg[i] = m, exp_avg_sq[i] = v;
  }
}

// Elements [begin, end) of a piece.
template <class T, AdamWOrder order>
QLORA_HD void update(const AdamWPiece& piece, const AdamWCoefficients& c, int64_t begin, int64_t end) {
  update<T, order>(static_cast<T*>(piece.param) + begin, static_cast<const T*>(piece.grad) + begin,
                   piece.exp_avg + begin, piece.exp_avg_sq + begin, c, end - begin);
}

QLORA_HD float block_absmax(const float* x, int64_t n) {
  uint32_t key = 0;
  for (int64_t i = 0; i < n; ++i) key = std::max(key, magnitude_key(x[i]));
  return absmax_of_key(key);
}

// codes[i] = moment_code of x[i], by bisection; but all elements take a step before any takes the next, so that
// the loop over elements is vector code.
QLORA_HD void encode_block(const float* x, float absmax, const Map8& map, int64_t n, int lowest, uint8_t* codes) {
  float s[kStateBlock];
  int32_t below[kStateBlock] = {};
  const float inverse = 1.0f / absmax;
  for (int64_t i = 0; i < n; ++i) s[i] = normalize(x[i], absmax, inverse);
  for (int step = 128; step > 0; step /= 2) {
    const float* thresholds = map.thresholds + step - 1;
    for (int64_t i = 0; i < n; ++i) below[i] += thresholds[below[i]] < s[i] ? step : 0;
  }
  for (int64_t i = 0; i < n; ++i) codes[i] = uint8_t(moment_code(below[i], x[i], absmax, map.zero_code, lowest));
}

// Blocks [begin, end) of a piece.
template <class T>
QLORA_HD void update_8bit(const AdamW8bitPiece& piece, const AdamWCoefficients& c, const Map8* maps, int64_t begin,
                          int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t start = b * kStateBlock, n = std::min<int64_t>(kStateBlock, piece.n - start);
    uint8_t *m_codes = piece.m_codes + start, *v_codes = piece.v_codes + start;
    float m[kStateBlock], v[kStateBlock];
    for (int64_t i = 0; i < n; ++i) m[i] = maps[0].levels[m_codes[i]] * piece.m_absmax[b];
    for (int64_t i = 0; i < n; ++i) v[i] = maps[1].levels[v_codes[i]] * piece.v_absmax[b];
    update<T, AdamWOrder::loop>(static_cast<T*>(piece.param) + start, static_cast<const T*>(piece.grad) + start, m, v,
                                c, n);
    piece.m_absmax[b] = block_absmax(m, n), piece.v_absmax[b] = block_absmax(v, n);
    encode_block(m, piece.m_absmax[b], maps[0], n, 0, m_codes);
    encode_block(v, piece.v_absmax[b], maps[1], n, 1, v_codes);
  }
}

using Update = void (*)(const AdamWPiece&, const AdamWCoefficients&, int64_t, int64_t);
using Update8bit = void (*)(const AdamW8bitPiece&, const AdamWCoefficients&, const Map8*, int64_t, int64_t);

template <class T, AdamWOrder order>
void update_portable(const AdamWPiece& piece, const AdamWCoefficients& c, int64_t begin, int64_t end) {
  update<T, order>(piece, c, begin, end);
}
template <class T>
void update_8bit_portable(const AdamW8bitPiece& piece, const AdamWCoefficients& c, const Map8* maps, int64_t begin,
                          int64_t end) {
  update_8bit<T>(piece, c, maps, begin, end);
}

#ifdef QLORA_FMA_TARGET
template <class T, AdamWOrder order>
QLORA_FMA_TARGET void update_fma(const AdamWPiece& piece, const AdamWCoefficients& c, int64_t begin, int64_t end) {
  update<T, order>(piece, c, begin, end);
}
template <class T>
QLORA_FMA_TARGET void update_8bit_fma(const AdamW8bitPiece& piece, const AdamWCoefficients& c, const Map8* maps,
                                      int64_t begin, int64_t end) {
  update_8bit<T>(piece, c, maps, begin, end);
}
const bool has_fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#define QLORA_CHOOSE(name, ...) (has_fma ? name##_fma<__VA_ARGS__> : name##_portable<__VA_ARGS__>)
#else
#define QLORA_CHOOSE(name, ...) name##_portable<__VA_ARGS__>
#endif

template <class T>
Update choose(AdamWOrder order) {
  return order == AdamWOrder::loop ? QLORA_CHOOSE(update, T, AdamWOrder::loop)
                                   : QLORA_CHOOSE(update, T, AdamWOrder::fused);
}

}  // namespace

void adamw(const AdamWPiece* pieces, int64_t count, DType dtype, const AdamWScalars& scalars, AdamWOrder order) {
  const Update run = dtype == DType::f32 ? choose<float>(order) : choose<uint16_t>(order);
  for (int64_t k = 0; k < count; ++k) {
    const AdamWCoefficients c = adamw_coefficients(scalars, *pieces[k].step, order);
    parallel_for(pieces[k].n, 16 * 1024, [&](int64_t begin, int64_t end) { run(pieces[k], c, begin, end); });
  }
}

void adamw_8bit(const AdamW8bitPiece* pieces, int64_t count, DType dtype, const AdamWScalars& scalars,
                const Map8* maps) {
  const Update8bit run = dtype == DType::f32 ? QLORA_CHOOSE(update_8bit, float) : QLORA_CHOOSE(update_8bit, uint16_t);
  for (int64_t k = 0; k < count; ++k) {
    const AdamWCoefficients c = adamw_coefficients(scalars, *pieces[k].step, AdamWOrder::loop);
    const int64_t blocks = (pieces[k].n + kStateBlock - 1) / kStateBlock;
    parallel_for(blocks, 32, [&](int64_t begin, int64_t end) { run(pieces[k], c, maps, begin, end); });
  }
}

}  // namespace qlora
