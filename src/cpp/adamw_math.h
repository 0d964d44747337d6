// What one element does in an AdamW step, shared by host and device code; the definition is reference/adamw.py.
//
// Two orders of operations. `loop` is the reference's (torch.optim.AdamW(foreach=False), with IEEE square roots); it is
// the one we use. `fused` is that of torch's CUDA kernel (ATen fused_adam_utils.cuh, float32), to equal it in bits.
// Every fused multiply-add is written out; compile without contraction.
#pragma once
#include "math.h"

namespace qlora {

constexpr int kStateBlock = 256;  // elements that share one absmax of an 8-bit moment

enum class AdamWOrder : int { loop = 0, fused = 1 };

struct AdamWScalars {
  double lr, beta1, beta2, weight_decay, eps;
};

// What the elements of one piece share: scalars in float64 (loop) or float32 (fused), rounded once.
struct AdamWCoefficients {
  float decay;  // theta * decay, or fma(-decay, theta, theta)
  float w1, w1_rest, w2, beta1, beta2, eps, step_size, correction2_sqrt;
  bool decays, from_old;  // from_old: interpolate m from its old value (beta1 > 0.5), else from the gradient
};

QLORA_HD AdamWCoefficients adamw_coefficients(const AdamWScalars& s, float step, AdamWOrder order) {
  AdamWCoefficients c;
  c.decays = s.weight_decay != 0;
  c.beta1 = float(s.beta1), c.beta2 = float(s.beta2), c.eps = float(s.eps);
  c.w1 = float(1 - s.beta1), c.w2 = float(1 - s.beta2);
  c.w1_rest = float(1 - double(c.w1));
  c.from_old = c.w1 < 0.5f;
  if (order == AdamWOrder::loop) {
    c.decay = float(1 - s.lr * s.weight_decay);
    c.step_size = float(s.lr / (1 - pow(s.beta1, double(step))));
    c.correction2_sqrt = float(pow(1 - pow(s.beta2, double(step)), 0.5));
  } else {
    c.decay = float(s.lr) * float(s.weight_decay);
    c.step_size = float(s.lr) / (1 - powf(c.beta1, step));
    c.correction2_sqrt = sqrtf(1 - powf(c.beta2, step));
  }
  return c;
}

// One float. A CPU variant has the same for a register of them, which the compiler can add, multiply and divide.
struct OneFloat {
  using F = float;
  QLORA_HD float fma(float a, float b, float c) { return fmaf(a, b, c); }
  QLORA_HD float sqrt(float x) { return sqrtf(x); }
};

template <AdamWOrder order, class Lanes = OneFloat, class F = typename Lanes::F>
QLORA_HD void adamw_element(F& theta, F g, F& m, F& v, const AdamWCoefficients& c) {
  Lanes lanes;  // an object, because QLORA_HD makes static members on the host only
  if constexpr (order == AdamWOrder::loop) {
    if (c.decays) theta = theta * c.decay;
    m = c.from_old ? lanes.fma(c.w1, g - m, m) : lanes.fma(-c.w1_rest, g - m, g);
    v = lanes.fma(g, c.w2 * g, v * c.beta2);
  } else {
    if (c.decays) theta = lanes.fma(-c.decay, theta, theta);
    m = lanes.fma(c.beta1, m, lanes.fma(-c.beta1, g, g));
    v = lanes.fma(c.beta2, v, lanes.fma(-c.beta2, g * g, g * g));
  }
  const F denominator = lanes.sqrt(v) / c.correction2_sqrt + c.eps;
  theta = theta - (c.step_size * m) / denominator;
}

// --- 8-bit moments ---------------------------------------------------------------------------------------------------

// The key of |x|: keys order like magnitudes, with everything that is not finite above.
QLORA_HD uint32_t magnitude_key(float x) { return float_to_bits(x) & 0x7fffffffu; }

// absmax from the largest key of a block: NaN if one element is not finite, 0 for a zero block.
QLORA_HD float absmax_of_key(uint32_t key) {
  if (key >= 0x7f800000u) return bits_to_float(0x7fc00000u);
  return key < 0x00800000u ? 0.0f : bits_to_float(key);
}

// Number of the 255 ascending thresholds strictly below s (0 for NaN), by bisection.
QLORA_HD int count_below_255(const float* thresholds, float s) {
  int below = 0;
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int step = 128; step > 0; step /= 2) below += thresholds[below + step - 1] < s ? step : 0;
  return below;
}

// The code of one moment, given the number of thresholds below x / absmax. `lowest` is 1 for second moments: above 0
// they never become 0, else m would be divided by eps alone (reference/adamw.py). 0 for first moments: no such rule.
QLORA_HD int moment_code(int below, float x, float absmax, int zero_code, int lowest) {
  const int code = absmax == 0.0f ? zero_code : below;
  return x > 0.0f && absmax != 0.0f && code < lowest ? lowest : code;
}

}  // namespace qlora
