// y = x W'^T and dx = dy W' for many tokens: the loops over one panel of decoded weights (variant.h). Six tokens share
// every register of the panel, and every register of weights lies in the order in which the loop reads it.
//
// A variant brings the Lanes: how elements meet (`add`) and how rows become dwords.
// Include in an unnamed namespace of a variant file, after linear_step.h.
#pragma once
#include "variant_avx512_transpose.h"

constexpr int kPanelRegisters = kPanelFeatures / 16;

// sum (R tokens, one panel) += `rows` rows of the panel times what x has for them
template <class Lanes, int R>
QLORA_INLINE void add_rows(__m512 (&sum)[R][kPanelRegisters], const char* x, int64_t stride, const char* panel,
                           int64_t rows) {
  for (int64_t i = 0; i < rows; ++i, x += 4, panel += kPanelBytes) {
    if (i % 2 == 0) __builtin_prefetch(x + (R + i / 2 % 8) * stride);  // of the tokens after these, a line each
    __m512i w[kPanelRegisters];
#pragma GCC unroll 8
    for (int v = 0; v < kPanelRegisters; ++v) w[v] = _mm512_load_si512(panel + 64 * v);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int dword;
      memcpy(&dword, x + r * stride, sizeof dword);
#pragma GCC unroll 8
      for (int v = 0; v < kPanelRegisters; ++v) sum[r][v] = Lanes::add(sum[r][v], _mm512_set1_epi32(dword), w[v]);
    }
  }
}

// The last row of a panel, if it has half a dword only: nothing behind it may be read.
template <class Lanes, int R>
QLORA_INLINE void add_half_row(__m512 (&sum)[R][kPanelRegisters], const char* x, int64_t stride, const char* panel) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    uint16_t half;
    memcpy(&half, x + r * stride, sizeof half);
#pragma GCC unroll 8
    for (int v = 0; v < kPanelRegisters; ++v) {
      sum[r][v] = Lanes::add(sum[r][v], _mm512_set1_epi32(half), _mm512_load_si512(panel + 64 * v));
    }
  }
}

// sum += the second term
template <class Lanes, int R>
QLORA_INLINE void add_more(__m512 (&sum)[R][kPanelRegisters], const ProductMore& more, int64_t token) {
  add_rows<Lanes, R>(sum, static_cast<const char*>(more.x) + token * more.x_stride, more.x_stride,
                     static_cast<const char*>(more.panel), more.depth / Lanes::kElements);
}

// The second term as a sum of its own, before all others: later there would be too few registers for both.
template <class Lanes, int R>
QLORA_INLINE void begin_with_more(const ProductMore& more, int64_t token, float* sums) {
  __m512 sum[R][kPanelRegisters] = {};
  add_more<Lanes, R>(sum, more, token);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kPanelRegisters; ++v) _mm512_storeu_ps(sums + r * kPanelFeatures + 16 * v, sum[r][v]);
  }
}

// The lines of y that R tokens will be written to.
template <class Lanes, int R>
QLORA_INLINE void fetch_outputs(const ProductPiece& piece, int64_t token) {
  const char* y = static_cast<const char*>(piece.y) + token * piece.y_stride * Lanes::kOutputBytes;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r, y += piece.y_stride * Lanes::kOutputBytes) {
    for (int64_t at = 0; at < kPanelFeatures * Lanes::kOutputBytes; at += 64) __builtin_prefetch(y + at, 1);
  }
}

// R tokens of a piece, from `token` on. Every Lanes::kRun rows of the panel have a sum of their own, so that in float32
// the error does not grow with the whole length.
template <class Lanes, int R>
void product_tile(const ProductPiece& piece, int64_t token) {
  const char *x = static_cast<const char*>(piece.x) + token * piece.x_stride,
             *panel = static_cast<const char*>(piece.panel);
  const int64_t whole = piece.depth / Lanes::kElements;
  float* sums = piece.sums + token * kPanelFeatures;
  const bool own = Lanes::kRun < INT64_MAX && piece.depth && piece.more.depth;
  if (own && piece.first) begin_with_more<Lanes, R>(piece.more, token, sums);
  int64_t row = 0;
  do {
    const int64_t end = whole - row < Lanes::kRun ? whole : row + Lanes::kRun;
    __m512 sum[R][kPanelRegisters];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kPanelRegisters; ++v) sum[r][v] = _mm512_setzero_ps();
    }
    if (piece.last && end == whole) fetch_outputs<Lanes, R>(piece, token);
    add_rows<Lanes, R>(sum, x + 4 * row, piece.x_stride, panel + row * kPanelBytes, end - row);
    if (end == whole && whole * Lanes::kElements < piece.depth) {
      add_half_row<Lanes, R>(sum, x + 4 * end, piece.x_stride, panel + end * kPanelBytes);
    }
    const bool first = piece.first && row == 0 && !own, last = piece.last && end == whole;
    if (last && piece.more.depth && !own) add_more<Lanes, R>(sum, piece.more, token);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kPanelRegisters; ++v) {
        float* so_far = sums + r * kPanelFeatures + 16 * v;
        if (!first) sum[r][v] = _mm512_add_ps(sum[r][v], _mm512_loadu_ps(so_far));
        if (!last) _mm512_storeu_ps(so_far, sum[r][v]);
      }
      if (last) Lanes::store(piece, token + r, sum[r]);
    }
    row = end;
  } while (row < whole);
}

template <class Lanes>
void multiply(const ProductPiece& piece) {
  constexpr int R = 6;
  for (int64_t token = 0, count; token < piece.tokens; token += count) {
    count = evenly<R>(piece.tokens - token);
    with_constant<R>(count, [&](auto constant) { product_tile<Lanes, decltype(constant)::value>(piece, token); });
  }
}

template <class Lanes>
void pack_features(const void* rows, int64_t stride, int64_t depth, void* panel) {
  auto* out = static_cast<char*>(panel);
  auto* from = static_cast<const char*>(rows);
  constexpr int64_t kStep = 16 * Lanes::kElements;  // elements of the sum
  for (int64_t k = 0; k < depth; k += kStep, out += 16 * kPanelBytes) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = Lanes::load_dwords(from, i * stride + k);
    transpose16(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_si512(out + i * kPanelBytes, r[i]);
  }
}

template <class Lanes>
void pack_sum(const void* rows, int64_t stride, int64_t width, void* panels, int64_t panel_bytes) {
  auto* from = static_cast<const char*>(rows);
  for (int64_t first = 0; first < width; first += kPanelFeatures) {
    char* out = static_cast<char*>(panels) + first / kPanelFeatures * panel_bytes;
    for (int64_t k = 0; k < kPanelRows; k += Lanes::kElements, out += kPanelBytes) {
      Lanes::interleave(from, k * stride + first, stride, out);
    }
  }
}
