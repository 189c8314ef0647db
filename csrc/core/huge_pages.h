// Asks the system to hold a buffer in huge pages.
#pragma once

#include <cstdint>

namespace tersor {

// A matrix of more than the second-level TLB maps (6-12 MiB in 4 KiB pages) pays for a page walk every 4 KiB that the kernels
// stream, and the walks delay the very prefetches that should hide memory. Moves what lies in whole 2 MiB pages; contents stay.
// Returns whether the system knows the request; it may still serve it later, or in part.
bool use_huge_pages(const void* data, int64_t bytes);

// The same for a buffer that nobody has written yet: its pages come as huge ones when they are first touched. Allocators map anew
// what is larger than kFreshBytes (glibc: 32 MiB), smaller buffers come back with their pages.
inline constexpr int64_t kFreshBytes = int64_t{32} << 20;
bool expect_huge_pages(const void* data, int64_t bytes);

}  // namespace tersor
