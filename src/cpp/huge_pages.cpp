// Large pages for memory that is read from end to end: 30 MB of weights are 7500 pages of 4 KB, each to be looked up. An advice: where the system has none to give, nothing changes.
#include "kernels.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace qlora {

void advise_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + uintptr_t(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace qlora
