// The CPU as the place of a binding's tensors.
#pragma once

#include "../core/huge_pages.h"
#include "torch_layers.h"

namespace {

inline void check_place(const char* function, const char* name, const Tensor& t) {
  if (!t.is_cpu()) fail(function, name, " is not on the CPU; move every tensor of the call to one device");
}

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) {
  Tensor fresh = empty_at(sizes, type, aoti_torch_device_type_cpu(), 0);
  const int64_t bytes = fresh.numel() * fresh.element_size();
  if (bytes >= tersor::kFreshBytes) tersor::expect_huge_pages(fresh.const_data_ptr(), bytes);
  return fresh;
}

}  // namespace
