// For native_parity.cpp: numbers that are the same on every processor, outputs between guard bytes, and the comparison
// of what two variants wrote.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../src/cpp/element.h"
#include "../src/cpp/kernels.h"

namespace parity {

using namespace qlora;
using Bytes = std::vector<uint8_t>;

constexpr DType kDTypes[] = {DType::f32, DType::bf16, DType::f16};
constexpr size_t kGuard = 64;

inline size_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline int failures = 0;

inline void fail(const std::string& what) {
  if (++failures > 20) return;
  std::printf("FAILED %s\n", what.c_str());
  std::fflush(stdout);  // should the next case crash
}

// --- numbers: integer arithmetic and exact floating point only ---------------------------------------------------------

struct Random {
  uint64_t state;

  uint64_t bits() {  // splitmix64
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int below(int n) { return int(bits() % uint64_t(n)); }
  float normal() {  // nearly: the sum of 12 uniform numbers
    int sum = 0;
    for (int i = 0; i < 12; ++i) sum += below(1 << 16);
    return float(sum - 6 * (1 << 16)) * 0x1p-16f;
  }
};

enum class Data {
  normal,
  zeros,
  zero_blocks,
  outlier,
  ties,
  knife_edge,
  huge_knife_edge,
  huge,
  subnormal,
  near_zero,
  plus_minus,
  nonfinite,
  any_bits,
  count
};

// Element i. `thresholds` are the 15 of the codebook in use.
inline float number(Data data, int64_t i, const float* thresholds, Random& random) {
  const float x = random.normal();
  const float threshold = thresholds[random.below(15)], tie = std::isfinite(threshold) ? threshold : 0.5f;
  const float near = tie * (1.0f + float(random.below(5) - 2) * 0x1p-23f);  // within two units in the last place
  switch (data) {
    case Data::zeros:
      return x < 0 ? -0.0f : 0.0f;
    case Data::zero_blocks:
      return i / 96 % 2 ? 0.0f : x;
    case Data::outlier:
      return i % 77 ? x : 1e4f;
    case Data::ties:
      return i % 32 ? tie : 1.0f;
    case Data::knife_edge:
      return i % 32 ? near * 1.37f : 1.37f;
    case Data::huge_knife_edge:
      return (i % 32 ? near * 1.37f : 1.37f) * 0x1p126f;
    case Data::huge:
      return std::fmax(-3.9f, std::fmin(3.9f, x)) * 0x1p125f;
    case Data::subnormal:
      return x * 0x1p-131f;
    case Data::near_zero:
      return x * 0x1p-126f;
    case Data::plus_minus:
      return i % 16 == 3 ? 7.0f : i % 16 == 1 ? -7.0f : x;
    case Data::nonfinite:
      return i % 301 == 5   ? bits_to_float(0x7f812345u)  // signaling, with a payload
             : i % 503 == 9 ? -INFINITY
             : i % 997 == 2 ? bits_to_float(0xffffffffu)
                            : x;
    case Data::any_bits:
      return bits_to_float(uint32_t(random.bits()));
    default:
      return x;
  }
}

inline void store(DType dtype, float x, void* to) {
  const uint16_t word = dtype == DType::bf16 ? float_to_bf16(x) : float_to_f16(x);
  dtype == DType::f32 ? memcpy(to, &x, 4) : memcpy(to, &word, 2);
}

inline float load(DType dtype, const void* from) {
  float x;
  uint16_t word;
  if (dtype == DType::f32) return memcpy(&x, from, 4), x;
  memcpy(&word, from, 2);
  return dtype == DType::bf16 ? bf16_to_float(word) : f16_to_float(word);
}

// n elements of `dtype`, which begin one element after the start of an allocation: aligned as elements and no better.
struct Input {
  Bytes memory;
  DType dtype;

  Input(DType dtype, int64_t n) : memory(size_t(n + 1) * size_of(dtype)), dtype(dtype) {}
  void* data() { return memory.data() + size_of(dtype); }
  void set(int64_t i, float x) { store(dtype, x, memory.data() + size_t(i + 1) * size_of(dtype)); }
  float get(int64_t i) const { return load(dtype, memory.data() + size_t(i + 1) * size_of(dtype)); }
};

inline Input numbers(Data data, DType dtype, int64_t n, const float* thresholds, uint64_t seed) {
  Random random{seed};
  Input x(dtype, n);
  for (int64_t i = 0; i < n; ++i) {
    float value = number(data, i, thresholds, random);
    if (dtype == DType::f16 && (data == Data::huge || data == Data::huge_knife_edge)) value *= 0x1p-112f;
    if (dtype == DType::f16 && (data == Data::subnormal || data == Data::near_zero)) value *= 0x1p106f;
    x.set(i, value);
    if (data == Data::any_bits && dtype != DType::f32) {
      const auto word = uint16_t(random.bits());
      memcpy(static_cast<char*>(x.data()) + 2 * i, &word, 2);
    }
  }
  return x;
}

inline Bytes random_bytes(int64_t n, uint64_t seed) {
  Random random{seed};
  Bytes bytes(size_t(n) + 1);  // one more: the caller begins at an odd address
  for (uint8_t& byte : bytes) byte = uint8_t(random.bits());
  return bytes;
}

// --- one case: the same call on every variant ----------------------------------------------------------------------------

enum class Kind { bytes, f32, bf16, f16 };  // of an output: floats are compared with all NaN alike

struct Output {
  Kind kind;
  int64_t n;
};

inline Kind kind_of(DType dtype) { return Kind(1 + int(dtype)); }
inline size_t size_of(Kind kind) { return kind == Kind::bytes ? 1 : size_of(DType(int(kind) - 1)); }

inline void make_nans_alike(Kind kind, Bytes& bytes) {
  if (kind == Kind::bytes) return;
  const auto dtype = DType(int(kind) - 1);
  for (size_t i = 0; i < bytes.size(); i += size_of(kind)) {
    if (std::isnan(load(dtype, &bytes[i]))) memset(&bytes[i], 0xff, size_of(kind));
  }
}

// What the outputs hold after `run`, which gets pointers one element past the alignment of an allocation.
inline std::vector<Bytes> outputs_of(const std::string& what, const std::vector<Output>& outputs, uint8_t poison,
                                     const std::function<void(void* const*)>& run) {
  std::vector<Bytes> memory, results;
  std::vector<void*> pointers;
  for (const Output& output : outputs) {
    memory.emplace_back(2 * kGuard + size_t(output.n + 1) * size_of(output.kind), poison);
    pointers.push_back(memory.back().data() + kGuard + size_of(output.kind));
  }
  run(pointers.data());
  for (size_t k = 0; k < outputs.size(); ++k) {
    const size_t size = size_t(outputs[k].n) * size_of(outputs[k].kind);
    const auto* begin = static_cast<const uint8_t*>(pointers[k]);
    results.emplace_back(begin, begin + size);
    for (uint8_t& byte : memory[k]) {
      if ((&byte < begin || &byte >= begin + size) && byte != poison) {
        fail(what + ": wrote outside output " + std::to_string(k));
        break;
      }
    }
    make_nans_alike(outputs[k].kind, results.back());
  }
  return results;
}

inline int cases = 0;
inline uint64_t digest = 0xcbf29ce484222325u;  // FNV-1a of all that the scalar variant wrote

// Every variant writes the bytes of the first, "scalar", and nothing beside its outputs. Poison differs between them, so
// that a byte which was left out differs too.
inline void exact(const std::string& what, const std::vector<Output>& outputs,
                  const std::function<void(void* const*)>& run) {
  ++cases;
  std::vector<Bytes> expected;
  for (const std::string& name : cpu_variants()) {
    set_cpu_variant(name);
    const std::string where = name + " " + what;
    std::vector<Bytes> actual = outputs_of(where, outputs, name == "scalar" ? 0xa5 : 0x5a, run);
    if (name == "scalar") {
      expected = actual;
      for (const Bytes& bytes : actual) {
        for (uint8_t byte : bytes) digest = (digest ^ byte) * 0x100000001b3u;
      }
    }
    for (size_t k = 0; k < outputs.size(); ++k) {
      size_t i = 0;
      while (i < actual[k].size() && actual[k][i] == expected[k][i]) ++i;
      if (i == actual[k].size()) continue;
      fail(where + ": output " + std::to_string(k) + " differs from scalar first at element " +
           std::to_string(i / size_of(outputs[k].kind)));
    }
  }
}

}  // namespace parity
