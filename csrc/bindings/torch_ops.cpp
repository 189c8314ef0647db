// torch ops on the CPU, through LibTorch's stable ABI: check, allocate, fill the arguments, call the driver. Schemas, fake kernels
// and references are in python/tersor/ops; each name here has one there.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../core/huge_pages.h"
#include "../core/linear.h"
#include "../core/parallel.h"
#include "check.h"

namespace {

using tersor::Dtype;
using tersor::fail;
using torch::headeronly::Layout;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

void run_on_torch_threads(int64_t n, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(context, i);
  });
}

Dtype float_dtype(const char* function, const char* name, ScalarType type) {
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

void check_plain(const char* function, const char* name, const Tensor& t) {
  if (!t.is_cpu()) fail(function, name, " is not on the CPU; move every tensor of the call to one device");
  if (t.layout() != Layout::Strided) fail(function, name, " is sparse; call .to_dense() first");
}

// Copies that live as long as the call.
using Keep = std::vector<Tensor>;

bool misaligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % static_cast<uintptr_t>(t.element_size()) != 0;
}

// A tensor over a mapped file can begin at any byte; kernels take floats and int32 where their type may lie.
const void* aligned(const Tensor& t, Keep* keep) {
  if (!misaligned(t)) return t.const_data_ptr();
  keep->push_back(torch::stable::clone(t));
  return keep->back().const_data_ptr();
}

// One tensor of exactly this dtype and these sizes, contiguous.
const void* exact(const char* function, const char* name, const Tensor& t, ScalarType type, std::initializer_list<int64_t> sizes,
                  Keep* keep) {
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
const void* per_row(const char* function, const char* name, const Tensor& t, ScalarType type, const Tensor& rows, Keep* keep) {
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

bool collapse(int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t* stride_m) {
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

XRows rows_of(const char* function, const Tensor& x) {
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

const uint8_t* tiles_of(const char* function, const Tensor& weight_packed, int64_t N, int64_t K, int bits, Keep* keep) {
  return static_cast<const uint8_t*>(
      exact(function, "weight_packed", weight_packed, ScalarType::Byte,
            {tersor::ceil_div(N, tersor::kTileN), tersor::ceil_div(K, tersor::tile_k(bits)), tersor::kTileBytes}, keep));
}

// The stored tensors of a layer.
struct Stored {
  const Tensor& weight_packed;
  const Tensor& weight_scale;
  const OptionalTensor& bias;
  const std::string& epilogue;
  int64_t bits = 8;
  const Tensor* input_scale = nullptr;
  const Tensor* group_scale = nullptr;
  const Tensor* threshold = nullptr;
};

tersor::LinearWeights weights_of(const char* function, const Stored& s, int64_t K, Keep* keep) {
  tersor::LinearWeights w{};
  check_plain(function, "weight_scale", s.weight_scale);
  if (s.weight_scale.dim() != 1) fail(function, "weight_scale has ", s.weight_scale.dim(), " dimensions, expected [N]");
  w.N = s.weight_scale.size(0);
  w.K = K;
  w.bits = tersor::check_bits(function, s.bits);
  w.weight_scale = static_cast<const float*>(exact(function, "weight_scale", s.weight_scale, ScalarType::Float, {w.N}, keep));
  w.weight_packed = tiles_of(function, s.weight_packed, w.N, K, w.bits, keep);
  if (s.bias) {
    w.bias_dtype = float_dtype(function, "bias", s.bias->scalar_type());
    w.bias = exact(function, "bias", *s.bias, s.bias->scalar_type(), {w.N}, keep);
  }
  w.activation = tersor::activation_from(function, s.epilogue);
  if (s.input_scale) {
    w.input_scale = static_cast<const float*>(exact(function, "input_scale", *s.input_scale, ScalarType::Float, {}, keep));
  }
  if (s.group_scale) {
    check_plain(function, "group_scale", *s.group_scale);
    if (s.group_scale->dim() != 3) fail(function, "group_scale has ", s.group_scale->dim(), " dimensions, expected 3");
    const int64_t groups = s.group_scale->size(1);
    w.group_size = tersor::check_groups(function, K, groups);
    w.group_scale =
        static_cast<const uint8_t*>(exact(function, "group_scale", *s.group_scale, ScalarType::Byte,
                                          {tersor::ceil_div(w.N, tersor::kTileN), groups, tersor::kGroupScaleBytes}, keep));
  }
  if (s.threshold)
    w.threshold = static_cast<const float*>(exact(function, "threshold", *s.threshold, ScalarType::Float, {K}, keep));
  return w;
}

Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) {
  // Straight to the CPU allocation: half a microsecond less than new_empty's way through the dispatcher.
  std::vector<int64_t> strides(sizes.size());
  uint64_t stride = 1;  // may wrap for sizes that no memory holds; torch finds that out from the sizes
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i] > 0 ? static_cast<uint64_t>(sizes[i]) : 1) {
    strides[i] = static_cast<int64_t>(stride);
  }
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &made));
  Tensor fresh(made);
  const int64_t bytes = fresh.numel() * fresh.element_size();
  if (bytes >= tersor::kFreshBytes) tersor::expect_huge_pages(fresh.const_data_ptr(), bytes);
  return fresh;
}

using Quantized = std::tuple<Tensor, Tensor, Tensor>;  // q, scale, row_sum

Quantized quantize(const char* name, const XRows& r, const float* absmax, const float* input_scale) {
  const std::vector<int64_t> lead(r.out_sizes.begin(), r.out_sizes.end() - 1);
  Tensor q = empty(r.out_sizes, ScalarType::Char);
  Tensor scale = empty(lead, ScalarType::Float);
  Tensor row_sum = empty(lead, ScalarType::Int);
  tersor::check_memory(
      name, tersor::quantize_rows(tersor::table_or_throw(), r.M, r.K, r.rows, absmax, input_scale,
                                  static_cast<int8_t*>(q.mutable_data_ptr()), static_cast<float*>(scale.mutable_data_ptr()),
                                  static_cast<int32_t*>(row_sum.mutable_data_ptr())));
  return {q, scale, row_sum};
}

Quantized quantize_rows(Tensor x, OptionalTensor absmax) {
  constexpr const char* kName = "quantize_rows";
  const XRows r = rows_of(kName, x);
  Keep keep;
  const auto* given = absmax ? static_cast<const float*>(per_row(kName, "absmax", *absmax, ScalarType::Float, x, &keep)) : nullptr;
  return quantize(kName, r, given, nullptr);
}

Quantized quantize_static(Tensor x, Tensor input_scale) {
  constexpr const char* kName = "quantize_static";
  const XRows r = rows_of(kName, x);
  Keep keep;
  return quantize(kName, r, nullptr,
                  static_cast<const float*>(exact(kName, "input_scale", input_scale, ScalarType::Float, {}, &keep)));
}

using Binarized = std::tuple<Tensor, Tensor>;  // bits, scale

Binarized binarize_rows(Tensor x, Tensor threshold) {
  constexpr const char* kName = "binarize_rows";
  const XRows r = rows_of(kName, x);
  Keep keep;
  const void* limits = exact(kName, "threshold", threshold, ScalarType::Float, {r.K}, &keep);
  std::vector<int64_t> sizes = r.out_sizes;
  sizes.back() = tersor::ceil_div(r.K, tersor::tile_k(1));
  Tensor bits = empty(sizes, ScalarType::Int);
  sizes.pop_back();
  Tensor scale = empty(sizes, ScalarType::Float);
  tersor::check_memory(
      kName, tersor::binarize_rows(tersor::table_or_throw(), r.M, r.K, r.rows, static_cast<const float*>(limits),
                                   static_cast<uint8_t*>(bits.mutable_data_ptr()), static_cast<float*>(scale.mutable_data_ptr())));
  return {bits, scale};
}

using LinearDriver = const char* (*)(const tersor::KernelTable&, int64_t, const tersor::StridedRows&, const tersor::LinearWeights&,
                                     const tersor::Output&);

Tensor float_linear(const char* name, LinearDriver driver, const Tensor& x, const Stored& stored) {
  const auto& table = tersor::table_or_throw();
  XRows r = rows_of(name, x);
  Keep keep;
  const tersor::LinearWeights w = weights_of(name, stored, r.K, &keep);
  r.out_sizes.back() = w.N;
  Tensor y = empty(r.out_sizes, x.scalar_type());
  tersor::check_memory(name, driver(table, r.M, r.rows, w, {y.mutable_data_ptr(), r.rows.dtype}));
  return y;
}

Tensor linear_dynamic(Tensor x, Tensor weight_packed, Tensor weight_scale, OptionalTensor bias, std::string epilogue,
                      int64_t bits) {
  return float_linear("linear_dynamic", tersor::linear_dynamic, x, {weight_packed, weight_scale, bias, epilogue, bits});
}

Tensor linear_static(Tensor x, Tensor weight_packed, Tensor weight_scale, OptionalTensor bias, Tensor input_scale,
                     std::string epilogue) {
  return float_linear("linear_static", tersor::linear_dynamic, x, {weight_packed, weight_scale, bias, epilogue, 8, &input_scale});
}

Tensor linear_grouped(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor group_scale, OptionalTensor bias,
                      std::string epilogue) {
  return float_linear("linear_grouped", tersor::linear_dynamic, x,
                      {weight_packed, weight_scale, bias, epilogue, 4, nullptr, &group_scale});
}

Tensor linear_xnor(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor threshold, OptionalTensor bias,
                   std::string epilogue) {
  return float_linear("linear_xnor", tersor::linear_xnor, x,
                      {weight_packed, weight_scale, bias, epilogue, 1, nullptr, nullptr, &threshold});
}

Tensor linear_weight_only(Tensor x, Tensor weight_packed, Tensor weight_scale, OptionalTensor bias, std::string epilogue) {
  return float_linear("linear_weight_only", tersor::linear_weight_only, x, {weight_packed, weight_scale, bias, epilogue});
}

// q [..., K] int8 with any row stride; row_sum (and scale) one for each row, contiguous.
tersor::S8Rows s8_rows(const char* function, const Tensor& q, const Tensor& row_sum, int64_t* M, int64_t* K, Keep* keep,
                       std::vector<int64_t>* out_sizes) {
  check_plain(function, "q", q);
  if (q.scalar_type() != ScalarType::Char) fail(function, "q must be int8");
  const auto sizes = q.sizes();
  const int64_t dim = static_cast<int64_t>(sizes.size());
  if (dim == 0) fail(function, "q is 0-dimensional, expected [..., K]");
  out_sizes->assign(sizes.begin(), sizes.end());
  *K = sizes[dim - 1];
  tersor::check_k(function, *K);
  *M = 1;
  for (int64_t d = 0; d < dim - 1; ++d) *M *= sizes[d];
  int64_t ldq = 0;
  Tensor held = q;
  if ((*K > 1 && q.stride(dim - 1) != 1) || !collapse(dim, sizes.data(), q.strides().data(), &ldq)) {
    held = torch::stable::contiguous(q);
    ldq = *K;
    keep->push_back(held);
  }
  const void* sums = per_row(function, "row_sum", row_sum, ScalarType::Int, q, keep);
  return {static_cast<const int8_t*>(held.const_data_ptr()), ldq, nullptr, static_cast<const int32_t*>(sums)};
}

Tensor linear_acc(Tensor q, Tensor row_sum, Tensor weight_packed, int64_t out_features, int64_t bits) {
  constexpr const char* kName = "linear_acc";
  const auto& table = tersor::table_or_throw();
  int64_t M = 0, K = 0;
  Keep keep;
  std::vector<int64_t> sizes;
  const tersor::S8Rows rows = s8_rows(kName, q, row_sum, &M, &K, &keep, &sizes);
  tersor::check_out_features(kName, out_features);
  tersor::LinearWeights w{};
  w.N = out_features;
  w.K = K;
  w.bits = tersor::check_bits(kName, bits);
  w.weight_packed = tiles_of(kName, weight_packed, w.N, K, w.bits, &keep);
  sizes.back() = w.N;
  Tensor acc = empty(sizes, ScalarType::Int);
  tersor::check_memory(kName, tersor::linear_s8(table, M, rows, w, {acc.mutable_data_ptr(), Dtype::s32}));
  return acc;
}

Tensor linear_s8(Tensor q, Tensor scale, Tensor row_sum, Tensor weight_packed, Tensor weight_scale, OptionalTensor bias,
                 std::string epilogue, ScalarType out_dtype, int64_t bits) {
  constexpr const char* kName = "linear_s8";
  const auto& table = tersor::table_or_throw();
  int64_t M = 0, K = 0;
  Keep keep;
  std::vector<int64_t> sizes;
  tersor::S8Rows rows = s8_rows(kName, q, row_sum, &M, &K, &keep, &sizes);
  rows.scale = static_cast<const float*>(per_row(kName, "scale", scale, ScalarType::Float, q, &keep));
  const Dtype dtype = float_dtype(kName, "out_dtype", out_dtype);
  const tersor::LinearWeights w = weights_of(kName, {weight_packed, weight_scale, bias, epilogue, bits}, K, &keep);
  sizes.back() = w.N;
  Tensor y = empty(sizes, out_dtype);
  tersor::check_memory(kName, tersor::linear_s8(table, M, rows, w, {y.mutable_data_ptr(), dtype}));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, m) {
  tersor::thread_pool = {[]() -> int64_t { return torch::stable::get_num_threads(); }, run_on_torch_threads};
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
  m.impl("quantize_static", TORCH_BOX(&quantize_static));
  m.impl("linear_dynamic", TORCH_BOX(&linear_dynamic));
  m.impl("linear_static", TORCH_BOX(&linear_static));
  m.impl("binarize_rows", TORCH_BOX(&binarize_rows));
  m.impl("linear_grouped", TORCH_BOX(&linear_grouped));
  m.impl("linear_xnor", TORCH_BOX(&linear_xnor));
  m.impl("linear_weight_only", TORCH_BOX(&linear_weight_only));
  m.impl("linear_acc", TORCH_BOX(&linear_acc));
  m.impl("linear_s8", TORCH_BOX(&linear_s8));
}
