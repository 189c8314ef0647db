// torch ops of sparse weights on the CPU, as torch_ops.cpp.
#include "sparse_check.h"
#include "torch_on_cpu.h"

namespace {

// A tensor of bytes of any sizes, contiguous.
tersor::Sizes sizes_of(const char* function, const char* name, const Tensor& t, std::vector<int64_t>* held) {
  check_plain(function, name, t);
  if (t.scalar_type() != ScalarType::Byte) fail(function, name, " has dtype ", torch::headeronly::toString(t.scalar_type()));
  if (!t.is_contiguous()) fail(function, name, " is not contiguous; call .contiguous() first");
  const auto sizes = t.sizes();
  held->assign(sizes.begin(), sizes.end());
  return {held->data(), static_cast<int64_t>(held->size())};
}

Tensor linear_sparse(Tensor x, Tensor weight_packed, Tensor weight_index, Tensor weight_offset, Tensor weight_sum,
                     Tensor weight_scale, OptionalTensor bias, std::string epilogue) {
  constexpr const char* kName = "linear_sparse";
  const auto& table = tersor::table_or_throw();
  XRows r = rows_of(kName, x);
  Keep keep;
  tersor::LinearWeights w = scaled_layer(kName, weight_scale, r.K, &keep);
  add_bias(kName, bias, epilogue, &w, &keep);
  std::vector<int64_t> packed_sizes, index_sizes;
  const tersor::Sizes packed = sizes_of(kName, "weight_packed", weight_packed, &packed_sizes);
  const tersor::Sizes index = sizes_of(kName, "weight_index", weight_index, &index_sizes);
  tersor::SparseWeights s = tersor::sparse_sizes(kName, packed, index, w.N, w.K);
  const int64_t tiles = tersor::ceil_div(w.N, tersor::kTileN);
  s.packed = static_cast<const uint8_t*>(weight_packed.const_data_ptr());
  s.index = static_cast<const uint8_t*>(weight_index.const_data_ptr());
  s.offset = static_cast<const int64_t*>(exact(kName, "weight_offset", weight_offset, ScalarType::Long, {tiles + 1}, &keep));
  s.sum = static_cast<const int32_t*>(exact(kName, "weight_sum", weight_sum, ScalarType::Int, {tiles, tersor::kTileN}, &keep));
  w.sparse = &s;
  r.out_sizes.back() = w.N;
  Tensor y = result(r.out_sizes, x.scalar_type());
  tersor::check_memory(kName, tersor::linear_dynamic(table, r.M, r.rows, w, {y.mutable_data_ptr(), r.rows.dtype}));
  return y;
}

Tensor linear_sparse_float(Tensor x, Tensor weight_packed, Tensor weight_index, Tensor weight_offset, OptionalTensor bias,
                           std::string epilogue) {
  constexpr const char* kName = "linear_sparse_float";
  const auto& table = tersor::table_or_throw();
  XRows r = rows_of(kName, x);
  if (r.K > tersor::kMaxFloatK) fail(kName, "K=", r.K, " is above ", tersor::kMaxFloatK, ", what two bytes of index reach");
  check_plain(kName, "weight_offset", weight_offset);
  if (weight_offset.dim() != 1 || weight_offset.size(0) < 1) fail(kName, "weight_offset is not [N + 1]");
  Keep keep;
  tersor::LinearWeights w{};
  w.N = weight_offset.size(0) - 1;
  w.K = r.K;
  add_bias(kName, bias, epilogue, &w, &keep);
  tersor::SparseFloatWeights s{};
  check_plain(kName, "weight_packed", weight_packed);
  s.entries = weight_packed.dim() == 2 ? weight_packed.size(0) : 0;
  s.values = static_cast<const uint8_t*>(exact(kName, "weight_packed", weight_packed, ScalarType::Byte, {s.entries, 4}, &keep));
  s.index = static_cast<const uint8_t*>(exact(kName, "weight_index", weight_index, ScalarType::Byte, {s.entries, 2}, &keep));
  s.offset = static_cast<const int64_t*>(exact(kName, "weight_offset", weight_offset, ScalarType::Long, {w.N + 1}, &keep));
  w.sparse_float = &s;
  r.out_sizes.back() = w.N;
  Tensor y = result(r.out_sizes, x.scalar_type());
  tersor::check_memory(kName, tersor::linear_weight_only(table, r.M, r.rows, w, {y.mutable_data_ptr(), r.rows.dtype}));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, m) {
  m.impl("linear_sparse", TORCH_BOX(&linear_sparse));
  m.impl("linear_sparse_float", TORCH_BOX(&linear_sparse_float));
}
