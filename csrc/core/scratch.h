#pragma once

#include <cstdlib>
#if defined(_WIN32)
#include <malloc.h>
#endif

#include "kernel_table.h"

namespace tersor {

// Grow-only buffer, one for each calling thread; pieces of a parallel region get slices of it, so nothing allocates inside the
// region.
class Scratch {
 public:
  ~Scratch() { release(base_); }
  char* get(int64_t bytes) {
    if (bytes > size_) {
      release(base_);
      base_ = static_cast<char*>(allocate(static_cast<size_t>(round_up(bytes, 64))));
      size_ = base_ ? bytes : 0;
    }
    return base_;
  }

 private:
#if defined(_WIN32)  // has no aligned_alloc
  static void* allocate(size_t bytes) { return _aligned_malloc(bytes, 64); }
  static void release(void* base) { _aligned_free(base); }
#else
  static void* allocate(size_t bytes) { return std::aligned_alloc(64, bytes); }
  static void release(void* base) { std::free(base); }
#endif

  char* base_ = nullptr;
  int64_t size_ = 0;
};
}  // namespace tersor
