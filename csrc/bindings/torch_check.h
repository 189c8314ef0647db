// What the torch bindings share: torch tensors as the pointers, sizes and strides that the drivers take. A binding includes
// torch_on_cpu.h or torch_on_cuda.h, which say where its tensors are.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../core/linear.h"
#include "check.h"

namespace {

using tersor::Dtype;
using tersor::fail;
using torch::headeronly::Layout;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype float_dtype(const char* function, const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      fail(function, name, " has dtype ", torch::headeronly::toString(type), ", expected float32, bfloat16 or float16");
  }
}

// Of the device: raises where t is on another, and fresh memory there.
void check_place(const char* function, const char* name, const Tensor& t);
Tensor empty(const std::vector<int64_t>& sizes, ScalarType type);

inline void check_plain(const char* function, const char* name, const Tensor& t) {
  check_place(function, name, t);
  if (t.layout() != Layout::Strided) fail(function, name, " is sparse; call .to_dense() first");
}

// Copies that live as long as the call.
using Keep = std::vector<Tensor>;

inline bool misaligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % static_cast<uintptr_t>(t.element_size()) != 0;
}

// A tensor over a mapped file can begin at any byte; kernels take floats and int32 where their type may lie.
inline const void* aligned(const Tensor& t, Keep* keep) {
  if (!misaligned(t)) return t.const_data_ptr();
  keep->push_back(torch::stable::clone(t));
  return keep->back().const_data_ptr();
}

// One tensor of exactly this dtype and these sizes, contiguous.
inline const void* exact(const char* function, const char* name, const Tensor& t, ScalarType type,
                         std::initializer_list<int64_t> sizes, Keep* keep) {
  check_plain(function, name, t);
  if (t.scalar_type() != type) {
    fail(function, name, " has dtype ", torch::headeronly::toString(t.scalar_type()), ", expected ",
         torch::headeronly::toString(type));
  }
  const auto have = t.sizes();
  bool same = have.size() == sizes.size();
  for (size_t i = 0; same && i < sizes.size(); ++i) same = have[i] == sizes.begin()[i];
  if (!same) {
    std::ostringstream text;
    for (size_t i = 0; i < have.size(); ++i) text << (i ? ", " : "") << have[i];
    text << "], expected [";
    for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes.begin()[i];
    fail(function, name, " is [", text.str(), "]");
  }
  if (!t.is_contiguous()) fail(function, name, " is not contiguous; call .contiguous() first");
  return aligned(t, keep);
}

// One element for each row of `rows` [..., K]: exactly its leading sizes, contiguous.
inline const void* per_row(const char* function, const char* name, const Tensor& t, ScalarType type, const Tensor& rows,
                           Keep* keep) {
  check_plain(function, name, t);
  const auto have = t.sizes();
  const auto want = rows.sizes();
  bool same = t.scalar_type() == type && have.size() + 1 == want.size();
  for (size_t i = 0; same && i < have.size(); ++i) same = have[i] == want[i];
  if (!same || !t.is_contiguous()) {
    std::ostringstream text;
    for (size_t i = 0; i + 1 < want.size(); ++i) text << (i ? ", " : "") << want[i];
    fail(function, name, " must be contiguous ", torch::headeronly::toString(type), " [", text.str(), "], one for each row");
  }
  return aligned(t, keep);
}

// x [..., K] as M rows with one row stride. Leading dimensions that no single stride describes, and elements off their alignment,
// cost a copy.
struct XRows {
  Tensor held;
  int64_t M, K;
  std::vector<int64_t> out_sizes;  // sizes of x, the last to be replaced
  tersor::StridedRows rows;
};

inline bool collapse(int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t* stride_m) {
  int64_t stride = 0, size = 1;
  for (int64_t d = dim - 2; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (size == 1) {
      stride = strides[d];
    } else if (strides[d] != stride * size) {
      return false;
    }
    size *= sizes[d];
  }
  *stride_m = stride;
  return true;
}

inline XRows rows_of(const char* function, const Tensor& x) {
  XRows r{x, 1, 0, {}, {}};
  check_plain(function, "x", x);
  const Dtype dtype = float_dtype(function, "x", x.scalar_type());
  const auto sizes = x.sizes();
  const int64_t dim = static_cast<int64_t>(sizes.size());
  if (dim == 0) fail(function, "x is 0-dimensional, expected [..., K]");
  r.out_sizes.assign(sizes.begin(), sizes.end());
  r.K = sizes[dim - 1];
  tersor::check_k(function, r.K);
  for (int64_t d = 0; d < dim - 1; ++d) r.M *= sizes[d];
  int64_t stride_m = 0;
  if (misaligned(x)) r.held = torch::stable::clone(x);  // may keep the strides
  if (!collapse(dim, sizes.data(), r.held.strides().data(), &stride_m)) {
    r.held = torch::stable::contiguous(r.held);
    stride_m = r.K;
  }
  r.rows = {r.held.const_data_ptr(), dtype, stride_m, r.held.stride(dim - 1)};
  if (r.K <= 1) r.rows.stride_k = 1;
  return r;
}

// Contiguous strides. May wrap for sizes that no memory holds; torch finds that out from the sizes.
inline std::vector<int64_t> strides_of(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  uint64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i] > 0 ? static_cast<uint64_t>(sizes[i]) : 1) {
    strides[i] = static_cast<int64_t>(stride);
  }
  return strides;
}

// Straight to the allocation: half a microsecond less than new_empty's way through the dispatcher.
inline Tensor empty_at(const std::vector<int64_t>& sizes, ScalarType type, int32_t device_type, int32_t index) {
  const std::vector<int64_t> strides = strides_of(sizes);
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, device_type, index, &made));
  return Tensor(made);
}

}  // namespace
