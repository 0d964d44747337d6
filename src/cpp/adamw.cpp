// AdamW (reference/adamw.py): float32 or bf16 parameters, float32 or 8-bit moments. Class EXACT.
#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "parallel.h"
#include "variant.h"

namespace qlora {
namespace {

constexpr int64_t kGrain = 16 * 1024;  // elements, at least, that a thread takes

// The elements behind the last whole block, as one more block: filled up with what decodes to zero and stays zero.
template <class T>
void update_rest(const AdamW8bitPiece& piece, const AdamWCoefficients& c, const Map8* maps, DType dtype) {
  const int64_t block = piece.n / kStateBlock, start = block * kStateBlock, n = piece.n - start;
  T param[kStateBlock] = {}, grad[kStateBlock] = {};
  uint8_t m_codes[kStateBlock], v_codes[kStateBlock];
  T* param_at = static_cast<T*>(piece.param) + start;
  std::copy_n(param_at, n, param);
  std::copy_n(static_cast<const T*>(piece.grad) + start, n, grad);
  std::fill(std::copy_n(piece.m_codes + start, n, m_codes), m_codes + kStateBlock, uint8_t(maps[0].zero_code));
  std::fill(std::copy_n(piece.v_codes + start, n, v_codes), v_codes + kStateBlock, uint8_t(maps[1].zero_code));
  const AdamW8bitPiece whole{param,      grad,       m_codes, piece.m_absmax + block, v_codes, piece.v_absmax + block,
                             piece.step, kStateBlock};
  variant().adamw.update_8bit[int(dtype)](whole, c, maps, 0, 1);
  std::copy_n(param, n, param_at);
  std::copy_n(m_codes, n, piece.m_codes + start);
  std::copy_n(v_codes, n, piece.v_codes + start);
}

}  // namespace

void adamw(const AdamWPiece* pieces, int64_t count, DType dtype, const AdamWScalars& scalars, AdamWOrder order) {
  const auto run = variant().adamw.update[int(order)][int(dtype)];
  const auto run_rest = scalar_variant.adamw.update[int(order)][int(dtype)];
  for (int64_t k = 0; k < count; ++k) {
    const AdamWPiece& piece = pieces[k];
    const AdamWCoefficients c = adamw_coefficients(scalars, *piece.step, order);
    const int64_t whole = piece.n - piece.n % kAdamWRun;
    parallel_for(whole, kGrain, [&](int64_t begin, int64_t end) { run(piece, c, begin, end); });
    if (whole < piece.n) run_rest(piece, c, whole, piece.n);
  }
}

void adamw_8bit(const AdamW8bitPiece* pieces, int64_t count, DType dtype, const AdamWScalars& scalars,
                const Map8* maps) {
  const auto run = variant().adamw.update_8bit[int(dtype)];
  const auto run_rest = dtype == DType::f32 ? update_rest<float> : update_rest<uint16_t>;
  for (int64_t k = 0; k < count; ++k) {
    const AdamW8bitPiece& piece = pieces[k];
    const AdamWCoefficients c = adamw_coefficients(scalars, *piece.step, AdamWOrder::loop);
    parallel_for(piece.n / kStateBlock, kGrain / kStateBlock,
                 [&](int64_t begin, int64_t end) { run(piece, c, maps, begin, end); });
    if (piece.n % kStateBlock) run_rest(piece, c, maps, dtype);
  }
}

}  // namespace qlora
