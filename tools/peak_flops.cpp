// What the multiply-add instructions of this CPU can do at most: registers only, no memory. tools/peak_flops.py builds it.
//
//   peak_flops THREADS        prints flop/s of all threads together: float32, then bf16 (0 without AVX512-BF16)
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
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
  double bf16 = 0;
  const double f32 = best_of_all(threads, [&] {
    return rate(2.0 * sizeof(Float) / sizeof(float), [&](Float sum) { return multiply_add(a, b, sum); });
  });
#ifdef __AVX512BF16__
  const auto pairs = reinterpret_cast<__m512bh>(a), others = reinterpret_cast<__m512bh>(b);
  bf16 =
      best_of_all(threads, [&] { return rate(64, [&](Float sum) { return _mm512_dpbf16_ps(sum, pairs, others); }); });
#endif
  std::printf("%.6g %.6g\n", f32, bf16);
}
