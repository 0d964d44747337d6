// Runs CUDA kernels as plain C++, so that their logic can be tested where there is no card.
//
//   g++ -std=c++17 -x c++ -include tests/cuda_emulator.h src/cuda/blockwise.cu ...
//
// Every CUDA thread is a fiber. A warp shuffle or __syncthreads is a meeting point: a fiber waits there until all the
// others of its warp (or block) have come. Blocks run one after the other. What this shows: index arithmetic, masks,
// tails, shuffles, the fragment layout of mma.sync, scalar semantics. What it cannot show: races between warps, memory
// ordering, alignment faults of real vector loads (checked here by hand), timing, anything of the compiler's back end.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) alignas(n)

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorNoKernelImageForDevice, cudaErrorInsufficientDriver };
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {

[[noreturn]] inline void fail(const char* sentence) {
  std::fprintf(stderr, "cuda_emulator: %s\n", sentence);
  std::abort();
}

constexpr size_t kStack = 64 * 1024;

struct Meeting {  // of the fibers of a warp or a block
  int members = 0, arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t first;  // where it starts; later switches jump, which unlike swapcontext needs no system call
  jmp_buf context;
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStack]};
  unsigned thread = 0;
  bool done = false;
};

struct State {
  dim3 block, grid;
  unsigned threads = 0;
  ucontext_t unused;
  jmp_buf scheduler;
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  Meeting all;
  uint64_t slots[32][2][32][4];  // [warp][parity of the meeting][lane]: values exchanged
  int count = 0;              // of __syncthreads_count
  Fiber* current = nullptr;
  std::function<void()> kernel;
};
inline State state;

inline unsigned lane() { return state.current->thread % 32; }
inline unsigned warp() { return state.current->thread / 32; }

[[gnu::noinline]] inline void yield() {
  if (_setjmp(state.current->context) == 0) _longjmp(state.scheduler, 1);
}

[[gnu::noinline]] inline void resume(Fiber& f) {  // not inlined: a jump back may clobber the caller's variables
  state.current = &f;
  if (_setjmp(state.scheduler) != 0) return;
  if (f.started) _longjmp(f.context, 1);
  f.started = true;
  swapcontext(&state.unused, &f.first);
}

inline void meet(Meeting& meeting) {
  int generation = meeting.generation;
  if (++meeting.arrived == meeting.members) {
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  while (meeting.generation == generation) yield();
}

inline void entry() {
  state.kernel();
  state.current->done = true;
  // A lane that has left takes part in no further meeting.
  for (Meeting* m : {&state.warps[warp()], &state.all}) {
    if (--m->members > 0 && m->arrived == m->members) {
      m->arrived = 0;
      ++m->generation;
    }
  }
  _longjmp(state.scheduler, 1);
}

template <class Kernel>
void run(unsigned blocks_x, unsigned blocks_y, unsigned threads, Kernel&& kernel) {
  if (threads % 32 != 0 || threads > 1024) fail("threads must be a multiple of 32, at most 1024");
  state.kernel = kernel;
  state.threads = threads;
  state.grid = {blocks_x, blocks_y, 1};
  if (state.fibers.size() < threads) state.fibers.resize(threads);
  for (unsigned y = 0; y < blocks_y; ++y) {
    for (unsigned x = 0; x < blocks_x; ++x) {
      state.block = {x, y, 0};
      state.warps.assign(threads / 32, Meeting{32});
      state.all = Meeting{int(threads)};
      for (unsigned t = 0; t < threads; ++t) {
        Fiber& f = state.fibers[t];
        f.thread = t;
        f.done = f.started = false;
        getcontext(&f.first);
        f.first.uc_stack.ss_sp = f.stack.get();
        f.first.uc_stack.ss_size = kStack;
        f.first.uc_link = nullptr;
        makecontext(&f.first, entry, 0);
      }
      for (unsigned left = threads; left > 0;) {
        left = 0;
        for (unsigned t = 0; t < threads; ++t) {
          Fiber& f = state.fibers[t];
          if (f.done) continue;
          resume(f);
          left += !f.done;
        }
      }
    }
  }
}

// Lay `value` out for the warp and meet; then any lane may be read. Slots alternate, and nobody can be two meetings
// ahead, so nothing is overwritten while it may still be read.
template <class T>
struct Exchanged {
  const uint64_t (*slots)[4];
  T operator[](unsigned lane) const {
    T value;
    std::memcpy(&value, slots[lane], sizeof value);
    return value;
  }
};

template <class T>
Exchanged<T> exchange(const T& value) {
  static_assert(sizeof(T) <= sizeof(state.slots[0][0][0]), "too large for a slot");
  Meeting& meeting = state.warps[warp()];
  auto& slots = state.slots[warp()][meeting.generation % 2];
  std::memcpy(slots[lane()], &value, sizeof value);
  meet(meeting);
  return {slots};
}

// mma.m16n8k16: element (row, k) of a lies in lane row % 8 * 4 + k % 8 / 2, word row / 8 + k / 8 * 2, half k % 2, and
// (k, column) of b in lane column * 4 + k % 8 / 2, word k / 8, half k % 2. Accumulated in double, rounded once.
struct Fragments {
  uint32_t a[4], b[2];
};

template <class ToFloat>
void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, ToFloat to_float) {
  const auto all = exchange(Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  auto half = [&](uint32_t word, int k) { return double(to_float(uint16_t(k % 2 ? word >> 16 : word))); };
  for (int i = 0; i < 4; ++i) {
    const int row = int(lane() / 4) + i / 2 * 8, column = int(lane() % 4) * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const uint32_t word_a = all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
      const uint32_t word_b = all[column * 4 + k % 8 / 2].b[k / 8];
      sum += half(word_a, k) * half(word_b, k);
    }
    c[i] = float(sum);
  }
}

// The card that the launchers think they are on; tests set it.
inline int device_major = 9, device_multiprocessors = 4;
template <class Device>
Device device() {
  return Device{device_major, device_multiprocessors};
}

template <class Word>
const Word& checked(const Word* address) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(Word) != 0) fail("misaligned vector access");
  return *address;
}

}  // namespace emulator

struct EmulatedThread {
  struct {
    operator unsigned() const { return emulator::state.current->thread; }
  } x;
};
struct EmulatedBlockIdx {
  struct {
    operator unsigned() const { return emulator::state.block.x; }
  } x;
  struct {
    operator unsigned() const { return emulator::state.block.y; }
  } y;
};
inline EmulatedThread threadIdx;
inline EmulatedBlockIdx blockIdx;

template <class T>
T __ldg(const T* address) {
  return emulator::checked(address);
}

template <class T>
T __shfl_sync(unsigned, T value, int source, int width = 32) {
  const unsigned low = unsigned(width - 1);
  return emulator::exchange(value)[(emulator::lane() & ~low) | (unsigned(source) & low)];
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::exchange(value)[emulator::lane() ^ unsigned(mask)];
}

inline void __syncthreads() { emulator::meet(emulator::state.all); }
inline int __syncthreads_count(int predicate) {
  emulator::state.count += predicate != 0;
  emulator::meet(emulator::state.all);
  const int result = emulator::state.count;
  emulator::meet(emulator::state.all);
  emulator::state.count = 0;  // nobody counts again before all have met here
  emulator::meet(emulator::state.all);
  return result;
}
