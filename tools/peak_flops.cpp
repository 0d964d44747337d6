// What the multiply-add instructions of this CPU can do at most: registers only, no memory. tools/peak_flops.py builds it.
// And what a bf16 product with 252 tokens does whose weights are written to the cache before they are multiplied, by the same
// loop as ours: one instruction writes 64 bytes of them, nothing is fetched or decoded. What decoding costs is the difference.
//
//   peak_flops THREADS        prints flop/s of all threads together: float32, bf16, bf16 by panels (0 without AVX512-BF16)
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
using Float = __m512;
static Float set1(float x) { return _mm512_set1_ps(x); }
static Float multiply_add(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__FMA__)
using Float = __m256;
static Float set1(float x) { return _mm256_set1_ps(x); }
static Float multiply_add(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
#else
#error "neither AVX-512 nor FMA"
#endif

constexpr int kSums = sizeof(Float) == 64 ? 24 : 12;  // enough to hide the latency, few enough for the registers
constexpr long kRounds = 2'000'000;

// `add(sum)` is one instruction of `flops`, on sums that do not wait for each other.
template <class Add>
double rate(double flops, const Add& add) {
  Float sum[kSums];
#pragma GCC unroll 24
  for (int j = 0; j < kSums; ++j) sum[j] = set1(float(j));  // equal ones would be computed once
  auto start = std::chrono::steady_clock::now();
  for (long i = 0; i < kRounds; ++i) {
#pragma GCC unroll 24
    for (int j = 0; j < kSums; ++j) sum[j] = add(sum[j]);
    asm volatile("" ::"v"(sum[0]));  // every round counts
  }
  std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
#pragma GCC unroll 24
  for (int j = 0; j < kSums; ++j) asm volatile("" ::"v"(sum[j]));  // and every sum
  return double(kRounds) * kSums * flops / seconds.count();
}

#ifdef __AVX512BF16__
constexpr long kTokens = 252, kDepth = 4096, kFeatures = 4096, kTile = 6, kWide = 4;  // registers of 16 features
constexpr long kRows = kDepth / 2;                                                    // of a panel, pairs of the sum

// Memory at a cache line, and numbers in it: zeros may cost less.
struct Pages {
  explicit Pages(long bytes) : memory(std::aligned_alloc(64, size_t(bytes)), std::free) {
    std::mt19937 random(1);
    for (long i = 0; i < bytes / 2; ++i) {
      static_cast<uint16_t*>(memory.get())[i] = uint16_t(0x3e00 + random() % 0x200 + (random() % 2 << 15));  // 1/8 to 2
    }
  }
  char* at(long byte) const { return static_cast<char*>(memory.get()) + byte; }
  std::unique_ptr<void, void (*)(void*)> memory;
};

void write_panel(char* panel, const __m512i* weights) {
  for (long i = 0; i < kRows * kWide; ++i) _mm512_store_si512(panel + 64 * i, weights[i % kWide]);
  asm volatile("" ::: "memory");
}

// Six tokens from x on, 64 features from y on.
void multiply_tile(const char* x, const char* panel, char* y) {
  __m512 sum[kTile][kWide] = {};
  for (long row = 0; row < kRows; ++row, x += 4, panel += 64 * kWide) {
    if (row % 2 == 0) __builtin_prefetch(x + (kTile + row / 2 % 8) * 2 * kDepth);  // of the next tokens
    __m512bh w[kWide];
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) w[v] = (__m512bh)_mm512_load_si512(panel + 64 * v);
#pragma GCC unroll 6
    for (int t = 0; t < kTile; ++t) {
      int pair;
      std::memcpy(&pair, x + t * 2 * kDepth, sizeof pair);
#pragma GCC unroll 4
      for (int v = 0; v < kWide; ++v) sum[t][v] = _mm512_dpbf16_ps(sum[t][v], (__m512bh)_mm512_set1_epi32(pair), w[v]);
    }
  }
#pragma GCC unroll 6
  for (int t = 0; t < kTile; ++t) {
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + t * 2 * kFeatures + 32 * v),
                          (__m256i)_mm512_cvtneps_pbh(sum[t][v]));
    }
  }
}

double panel_rate() {
  static thread_local const Pages x((kTokens + kTile + 8) * kDepth * 2), panel(kRows * kWide * 64),
      y(kTokens * kFeatures * 2);
  __m512i weights[kWide];
  for (long v = 0; v < kWide; ++v) weights[v] = _mm512_load_si512(x.at(64 * v));
  auto start = std::chrono::steady_clock::now();
  for (long feature = 0; feature < kFeatures; feature += 64) {
    write_panel(panel.at(0), weights);
    for (long t = 0; t < kTokens; t += kTile) {
      multiply_tile(x.at(2 * t * kDepth), panel.at(0), y.at(2 * (t * kFeatures + feature)));
    }
  }
  std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return 2.0 * kTokens * kDepth * kFeatures / seconds.count();
}
#endif

// Of all threads together, the best of twenty: what the machine can do, not what its neighbours left.
template <class One>
double best_of_all(int threads, const One& one) {
  double best = 0;
  for (int round = 0; round < 20; ++round) {
    std::vector<double> rates(static_cast<size_t>(threads));
    std::vector<std::thread> team;
    for (double& each : rates) team.emplace_back([&each, &one] { each = one(); });
    for (auto& thread : team) thread.join();
    double total = 0;
    for (double each : rates) total += each;
    best = std::max(best, total);
  }
  return best;
}

int main(int count, char** arguments) {
  const int threads = count > 1 ? std::atoi(arguments[1]) : 1;
  const Float a = set1(0.5f), b = set1(0.25f);
  double bf16 = 0, panels = 0;
  const double f32 = best_of_all(threads, [&] {
    return rate(2.0 * sizeof(Float) / sizeof(float), [&](Float sum) { return multiply_add(a, b, sum); });
  });
#ifdef __AVX512BF16__
  const auto pairs = reinterpret_cast<__m512bh>(a), others = reinterpret_cast<__m512bh>(b);
  bf16 =
      best_of_all(threads, [&] { return rate(64, [&](Float sum) { return _mm512_dpbf16_ps(sum, pairs, others); }); });
  panels = best_of_all(threads, panel_rate);
#endif
  std::printf("%.6g %.6g %.6g\n", f32, bf16, panels);
}
