// The thin products of LoRA: packs the adapter, then cuts tokens or features into pieces, one thread each. Every output
// belongs to one piece, so no result depends on the number of threads.
#include "kernels.h"
#include "parallel.h"
#include "variant.h"

namespace qlora {
namespace {

struct alignas(64) CacheLine {
  char bytes[64];
};

// Kept between calls: fresh memory would cost page faults.
struct Memory {
  std::vector<CacheLine> lines;
  void* reserve(int64_t bytes) {
    if (int64_t(lines.size()) * 64 < bytes) lines.resize(size_t((bytes + 63) / 64));
    return lines.data();
  }
};
enum Part { kDownA, kUpA, kDownB, kUpB, kU, kV, kParts };

Memory& memory(Part part) {
  static thread_local Memory of_this_thread[kParts];
  return of_this_thread[part];
}

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
int64_t strips(int64_t features) { return (features + kLoraStrip - 1) / kLoraStrip; }
int64_t packed_bytes(int64_t rank, int64_t features) {
  return round_up(rank, kLoraGroup) * strips(features) * kLoraStrip * 2;
}

// How many pieces make about 8 us (see parallel.h), if one is `products` multiplications.
int64_t grain(int64_t products) { return std::max<int64_t>(1, 600000 / std::max<int64_t>(1, products)); }

// A (rank, in) as `a`, B (out, rank) as `b`.
struct Adapter {
  LoraPacking a, b;

  Adapter(const Lora& lora, bool down_a, bool up_a, bool down_b, bool up_b)
      : a(packing(lora.A, lora.A_dtype, lora.rank, lora.in, true, down_a, up_a)),
        b(packing(lora.B, lora.B_dtype, lora.rank, lora.out, false, down_b, up_b)) {
    const int64_t of_a = strips(lora.in), all = of_a + strips(lora.out);
    const auto pack = variant().lora.pack;
    parallel_for(all, grain(round_up(lora.rank, kLoraGroup) * kLoraStrip * 10), [&](int64_t begin, int64_t end) {
      if (begin < of_a) pack(a, begin, std::min(end, of_a));
      if (end > of_a) pack(b, std::max(begin, of_a) - of_a, end - of_a);
    });
  }
  static LoraPacking packing(const void* matrix, DType dtype, int64_t rank, int64_t features, bool rank_rows, bool down,
                             bool up) {
    const int64_t bytes = packed_bytes(rank, features);
    return {matrix,
            dtype,
            rank,
            features,
            rank_rows,
            down ? memory(rank_rows ? kDownA : kDownB).reserve(bytes) : nullptr,
            up ? memory(rank_rows ? kUpA : kUpB).reserve(bytes) : nullptr};
  }
};

void run(const LoraTokens& call) {
  const auto tokens = variant().lora.tokens;
  const int64_t features = call.in + (call.y ? call.out : 0);
  const int64_t blocks = grain(round_up(call.rank, kLoraGroup) * features * kLoraTokens);
  parallel_for(call.m, blocks * kLoraTokens, [&](int64_t begin, int64_t end) { tokens(call, begin, end); });
}

}  // namespace

bool can_lora(DType dtype, int64_t rank) {
  return dtype == DType::bf16 && variant().lora.tokens && rank >= 1 && rank <= kLoraRank;
}

void lora_forward(const void* x, int64_t m, const Lora& lora, void* y) {
  const Adapter adapter(lora, true, false, false, true);
  run({x, m, lora.in, lora.rank, lora.scaling, adapter.a.down, nullptr, adapter.b.up, lora.out, y});
}

void lora_backward(const void* dy, const void* x, int64_t m, const Lora& lora, const LoraGradients& out) {
  const Adapter adapter(lora, true, out.dx != nullptr, true, false);
  const int64_t bytes = round_up(m, 2) * round_up(lora.rank, kLoraGroup) * 2;
  void *u = memory(kU).reserve(bytes), *v = memory(kV).reserve(bytes);
  run({dy, m, lora.out, lora.rank, lora.scaling, adapter.b.down, v, adapter.a.up, lora.in, out.dx});
  run({x, m, lora.in, lora.rank, lora.scaling, adapter.a.down, u, nullptr, 0, nullptr});
  const LoraGradient dA{x, m, lora.in, lora.rank, v, out.dA, lora.A_dtype, true};
  const LoraGradient dB{dy, m, lora.out, lora.rank, u, out.dB, lora.B_dtype, false};
  const int64_t of_a = strips(lora.in), all = of_a + strips(lora.out);
  const auto gradient = variant().lora.gradient;
  parallel_for(all, grain(round_up(lora.rank, kLoraGroup) * kLoraStrip * m), [&](int64_t begin, int64_t end) {
    static thread_local std::vector<CacheLine> scratch(kLoraScratchBytes / sizeof(CacheLine));
    if (begin < of_a) gradient(dA, scratch.data(), begin, std::min(end, of_a));
    if (end > of_a) gradient(dB, scratch.data(), std::max(begin, of_a) - of_a, end - of_a);
  });
}

}  // namespace qlora
