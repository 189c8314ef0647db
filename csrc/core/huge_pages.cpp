#include "huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace tersor {

#if defined(__linux__)
bool expect_huge_pages(const void* data, int64_t bytes) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + static_cast<uintptr_t>(bytes);
  // Whole small pages around the buffer: a huge page may begin before it, where the mapping does.
  const uintptr_t first = begin / page * page, last = (end + page - 1) / page * page;
  return madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE) == 0;
}

bool use_huge_pages(const void* data, int64_t bytes) {
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
#ifdef MADV_COLLAPSE
  constexpr int kCollapse = MADV_COLLAPSE;
#else
  constexpr int kCollapse = 25;  // Linux 6.1; older systems refuse it and collapse in the background
#endif
  if (!expect_huge_pages(data, bytes)) return false;
  const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + static_cast<uintptr_t>(bytes);
  const uintptr_t inner = (begin + kHuge - 1) / kHuge * kHuge;
  if (inner < end / kHuge * kHuge) madvise(reinterpret_cast<void*>(inner), end / kHuge * kHuge - inner, kCollapse);
  return true;
}
#else
bool expect_huge_pages(const void*, int64_t) { return false; }
bool use_huge_pages(const void*, int64_t) { return false; }
#endif

}  // namespace tersor
