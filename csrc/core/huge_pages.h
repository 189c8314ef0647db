// Asks the system to hold a buffer in huge pages.
#pragma once

#include <cstdint>

namespace tersor {

// A matrix of more than the second-level TLB maps (6-12 MiB in 4 KiB pages) pays for a page walk every 4 KiB that the kernels
// stream, and the walks delay the very prefetches that should hide memory. Moves what lies in whole 2 MiB pages; contents stay.
// Returns whether the system knows the request; it may still serve it later, or in part.
bool use_huge_pages(const void* data, int64_t bytes);

}  // namespace tersor
