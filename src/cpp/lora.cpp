// LoRA: packs the adapter, then cuts tokens or features into pieces, one thread each. The way up from the ranks is a second
// term of the sums of the large product (product.cpp). Every output belongs to one piece, so no result depends on the
// number of threads.
#include "kept_memory.h"
#include "parallel.h"
#include "product.h"

namespace qlora {
namespace {

enum Part { kDownA, kUpA, kDownB, kUpB, kU, kV, kVRows, kParts };

KeptMemory& memory(Part part) {
  static thread_local KeptMemory of_this_thread[kParts];
  return of_this_thread[part];
}

int64_t padded(int64_t rank) { return parts(rank, kLoraGroup) * kLoraGroup; }
int64_t panels(int64_t features) { return parts(features, kPanelFeatures); }
int64_t bytes_of(DType dtype) { return variant().product[int(dtype)].element_bytes; }

// A (rank, in) as `a`, B (out, rank) as `b`.
struct Adapter {
  LoraPacking a, b;

  Adapter(const Lora& lora, DType dtype, bool down_a, bool up_a, bool down_b, bool up_b)
      : a(packing(lora, dtype, true, down_a, up_a)), b(packing(lora, dtype, false, down_b, up_b)) {
    const int64_t of_a = a.down || a.up ? panels(lora.in) : 0, all = of_a + (b.down || b.up ? panels(lora.out) : 0);
    const auto pack = variant().lora[int(dtype)].pack;
    parallel_for(all, grain_of(padded(lora.rank) * kPanelFeatures * 10), [&](int64_t begin, int64_t end) {
      if (begin < of_a) pack(a, begin, std::min(end, of_a));
      if (end > of_a) pack(b, std::max(begin, of_a) - of_a, end - of_a);
    });
  }
  static LoraPacking packing(const Lora& lora, DType dtype, bool of_a, bool down, bool up) {
    const int64_t features = of_a ? lora.in : lora.out;
    const int64_t bytes = padded(lora.rank) * panels(features) * kPanelFeatures * bytes_of(dtype);
    return {of_a ? lora.A : lora.B,
            of_a ? lora.A_dtype : lora.B_dtype,
            lora.rank,
            features,
            of_a,
            down ? memory(of_a ? kDownA : kDownB).reserve(bytes) : nullptr,
            up ? memory(of_a ? kUpA : kUpB).reserve(bytes) : nullptr};
  }
};

void run(DType dtype, const LoraTokens& call) {
  const auto tokens = variant().lora[int(dtype)].tokens;
  const int64_t blocks = grain_of(padded(call.rank) * call.in * kLoraTokens);
  parallel_for(call.m, blocks * kLoraTokens, [&](int64_t begin, int64_t end) { tokens(call, begin, end); });
}

ProductMore up(DType dtype, const void* middle, const Lora& lora, const void* panel) {
  return {middle, padded(lora.rank) * bytes_of(dtype), padded(lora.rank), panel};
}

}  // namespace

bool can_lora(DType dtype, int64_t rank) { return variant().lora[int(dtype)].tokens && rank >= 1 && rank <= kLoraRank; }

void lora_linear_4bit_forward(const void* x, DType dtype, int64_t m, const Weight4bit& weight, const Codebook& codebook,
                              const void* bias, const Lora& lora, void* y) {
  const Adapter adapter(lora, dtype, true, false, false, true);
  void* u = memory(kU).reserve(m * padded(lora.rank) * bytes_of(dtype));
  run(dtype, {x, m, lora.in, lora.rank, lora.scaling, adapter.a.down, u, nullptr});
  linear_4bit_forward(x, dtype, m, weight, codebook, bias, y, up(dtype, u, lora, adapter.b.up));
}

void lora_linear_4bit_backward(const void* dy, const void* x, DType dtype, int64_t m, const Weight4bit& weight,
                               const Codebook& codebook, const Lora& lora, const LoraGradients& out) {
  const Adapter adapter(lora, dtype, true, out.dx != nullptr, true, false);
  const int64_t bytes = parts(m, 2) * 2 * padded(lora.rank) * bytes_of(dtype);
  void *u = memory(kU).reserve(bytes), *v = memory(kV).reserve(bytes);
  void* v_rows = out.dx ? memory(kVRows).reserve(bytes) : nullptr;
  run(dtype, {dy, m, lora.out, lora.rank, lora.scaling, adapter.b.down, v_rows, v});
  run(dtype, {x, m, lora.in, lora.rank, lora.scaling, adapter.a.down, nullptr, u});
  const LoraGradient dA{x, m, lora.in, lora.rank, v, out.dA, lora.A_dtype, true};
  const LoraGradient dB{dy, m, lora.out, lora.rank, u, out.dB, lora.B_dtype, false};
  const int64_t of_a = parts(lora.in, kLoraStrip), all = of_a + parts(lora.out, kLoraStrip);
  const auto gradient = variant().lora[int(dtype)].gradient;
  parallel_for(all, grain_of(padded(lora.rank) * kLoraStrip * m), [&](int64_t begin, int64_t end) {
    static thread_local KeptMemory scratch_memory;
    void* scratch = scratch_memory.reserve(kLoraScratchBytes);
    if (begin < of_a) gradient(dA, scratch, begin, std::min(end, of_a));
    if (end > of_a) gradient(dB, scratch, std::max(begin, of_a) - of_a, end - of_a);
  });
  if (out.dx) linear_4bit_backward(dy, dtype, m, weight, codebook, out.dx, up(dtype, v_rows, lora, adapter.a.up));
}

}  // namespace qlora
