// One parallel loop for the CPU kernels, on the threads of the OpenMP runtime that torch has already loaded.
//
// A pool of our own next to torch's would mean two pools on the same cores: torch's workers spin for a while after each
// of its ops, and ours would be scheduled against them. So the loop borrows torch's: GOMP_parallel is looked up at run
// time (libgomp, LLVM's and Intel's OpenMP all export it; no link dependency, no second runtime). Without one, and in
// the child of a fork (where libgomp's workers are gone and it would wait for them for ever), it starts std::threads.
#pragma once
#include <algorithm>
#include <cstdint>

namespace qlora {

int num_threads();

namespace detail {
// Run `body(context)` on `threads` threads, this one included.
void run_team(int threads, void (*body)(void*), void* context);
// The next chunk of a shared counter.
int64_t take(void* counter);
}  // namespace detail

inline int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }
// How many pieces make about 8 us (see parallel_for), if one is `products` multiplications of 16-bit numbers.
inline int64_t grain_of(int64_t products) { return std::max<int64_t>(1, 600000 / std::max<int64_t>(1, products)); }

// f(begin, end) for pieces of [0, n), each a multiple of `grain` long (the last one excepted), on up to num_threads()
// threads; threads that come late (or share their core) take fewer pieces. A thread is started for every grain, so let
// that be about 8 us of work: a team costs 1 us while its threads still spin and 5 us once they sleep (measured, Zen 4).
//
// `at_a_time`: how many pieces a thread takes, at most; by default so many that it comes about four times.
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f, int64_t at_a_time = INT64_MAX) {
  int64_t grains = (n + grain - 1) / grain;
  int threads = int(std::min<int64_t>(num_threads(), grains));
  if (threads <= 1) {
    if (n > 0) f(int64_t(0), n);
    return;
  }
  constexpr int64_t kPiecesPerThread = 4;
  int64_t piece = std::clamp<int64_t>(grains / (threads * kPiecesPerThread), 1, at_a_time) * grain;
  struct Context {
    const F& f;
    int64_t n, piece, next;
  } context{f, n, piece, 0};
  detail::run_team(
      threads,
      [](void* pointer) {
        auto& c = *static_cast<Context*>(pointer);
        for (;;) {
          int64_t begin = detail::take(&c.next) * c.piece;
          if (begin >= c.n) return;
          c.f(begin, std::min(c.n, begin + c.piece));
        }
      },
      &context);
}

}  // namespace qlora
