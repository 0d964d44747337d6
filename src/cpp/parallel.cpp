#include "parallel.h"

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include "kernels.h"

#ifndef _WIN32
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace qlora {
namespace {

thread_local int threads_of_this_thread = 1;

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<bool> forked{false};

#ifndef _WIN32
// From when the module is loaded: torch may have started libgomp's workers before our first team.
[[maybe_unused]] const int watch = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

GompParallel find_runtime() {
#ifdef _WIN32
  return nullptr;
#else
  return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#endif
}

}  // namespace

void set_num_threads(int threads) { threads_of_this_thread = std::max(1, threads); }
int num_threads() { return threads_of_this_thread; }

namespace detail {

void run_team(int threads, void (*body)(void*), void* context) {
  static const GompParallel gomp_parallel = find_runtime();
  if (gomp_parallel && !forked) {
    gomp_parallel(body, context, unsigned(threads), 0);
    return;
  }
  std::vector<std::thread> team;
  try {
    for (int i = 1; i < threads; ++i) team.emplace_back(body, context);
  } catch (const std::system_error&) {  // the system gives no more: those that there are do all the work
  }
  body(context);
  for (auto& thread : team) thread.join();
}

int64_t take(void* counter) { return __atomic_fetch_add(static_cast<int64_t*>(counter), 1, __ATOMIC_RELAXED); }

}  // namespace detail
}  // namespace qlora
