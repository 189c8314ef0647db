#pragma once

#include <cstdlib>

#include "kernel_table.h"

namespace tersor {

// Grow-only buffer, one for each calling thread; pieces of a parallel region get slices of it, so nothing allocates inside the
// region.
class Scratch {
 public:
  ~Scratch() { std::free(base_); }
  char* get(int64_t bytes) {
    if (bytes > size_) {
      std::free(base_);
      base_ = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(round_up(bytes, 64))));
      size_ = base_ ? bytes : 0;
    }
    return base_;
  }

 private:
  char* base_ = nullptr;
  int64_t size_ = 0;
};
}  // namespace tersor
