// torch ops on the CPU, through LibTorch's stable ABI: check, allocate, fill the arguments, call the driver. Schemas, fake kernels
// and references are in python/tersor/ops; each name here has one there.
#include "../core/parallel.h"
#include "torch_on_cpu.h"

namespace {

void run_on_torch_threads(int64_t n, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(context, i);
  });
}

Quantized quantize(const char* name, const XRows& r, const float* absmax, const float* input_scale) {
  auto [q, scale, row_sum] = s8_row_results(r.out_sizes);
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
  Tensor bits = result(sizes, ScalarType::Int);
  sizes.pop_back();
  Tensor scale = result(sizes, ScalarType::Float);
  tersor::check_memory(
      kName, tersor::binarize_rows(tersor::table_or_throw(), r.M, r.K, r.rows, static_cast<const float*>(limits),
                                   static_cast<uint8_t*>(bits.mutable_data_ptr()), static_cast<float*>(scale.mutable_data_ptr())));
  return {bits, scale};
}

using LinearDriver = const char* (*)(const tersor::KernelTable&, int64_t, const tersor::StridedRows&, const tersor::LinearWeights&,
                                     const tersor::Output&);

Tensor float_linear(const char* name, LinearDriver driver, const Tensor& x, const Stored& stored,
                    const OptionalTensor& residual = std::nullopt) {
  const auto& table = tersor::table_or_throw();
  XRows r = rows_of(name, x);
  Keep keep;
  const tersor::LinearWeights w = weights_of(name, stored, r.K, &keep);
  r.out_sizes.back() = w.N;
  tersor::Output out{nullptr, r.rows.dtype};
  out.residual = residual_of(name, residual, r.out_sizes, x.scalar_type(), &out.residual_stride, &keep);
  Tensor y = result(r.out_sizes, x.scalar_type());
  out.y = y.mutable_data_ptr();
  tersor::check_memory(name, driver(table, r.M, r.rows, w, out));
  return y;
}

Tensor linear_dynamic(Tensor x, Tensor weight_packed, Tensor weight_scale, OptionalTensor bias, std::string epilogue, int64_t bits,
                      OptionalTensor residual) {
  return float_linear("linear_dynamic", tersor::linear_dynamic, x, {weight_packed, weight_scale, bias, epilogue, bits}, residual);
}

Tensor linear_static(Tensor x, Tensor weight_packed, Tensor weight_scale, OptionalTensor bias, Tensor input_scale,
                     std::string epilogue, OptionalTensor residual) {
  return float_linear("linear_static", tersor::linear_dynamic, x, {weight_packed, weight_scale, bias, epilogue, 8, &input_scale},
                      residual);
}

Tensor linear_grouped(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor group_scale, OptionalTensor bias,
                      std::string epilogue, OptionalTensor residual) {
  return float_linear("linear_grouped", tersor::linear_dynamic, x,
                      {weight_packed, weight_scale, bias, epilogue, 4, nullptr, &group_scale}, residual);
}

Tensor linear_xnor(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor threshold, OptionalTensor bias, std::string epilogue,
                   OptionalTensor residual) {
  return float_linear("linear_xnor", tersor::linear_xnor, x,
                      {weight_packed, weight_scale, bias, epilogue, 1, nullptr, nullptr, &threshold}, residual);
}

Tensor linear_weight_only(Tensor x, Tensor weight_packed, Tensor weight_scale, OptionalTensor bias, std::string epilogue) {
  return float_linear("linear_weight_only", tersor::linear_weight_only, x, {weight_packed, weight_scale, bias, epilogue});
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
  Tensor acc = result(sizes, ScalarType::Int);
  tersor::check_memory(kName, tersor::linear_s8(table, M, rows, w, {acc.mutable_data_ptr(), Dtype::s32}));
  return acc;
}

Tensor linear_s8(Tensor q, Tensor scale, Tensor row_sum, Tensor weight_packed, Tensor weight_scale, OptionalTensor bias,
                 std::string epilogue, ScalarType out_dtype, int64_t bits, OptionalTensor residual) {
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
  tersor::Output out{nullptr, dtype};
  out.residual = residual_of(kName, residual, sizes, out_dtype, &out.residual_stride, &keep);
  Tensor y = result(sizes, out_dtype);
  out.y = y.mutable_data_ptr();
  tersor::check_memory(kName, tersor::linear_s8(table, M, rows, w, out));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, m) {
  tersor::thread_pool = {[]() -> int64_t { return torch::stable::get_num_threads(); }, run_on_torch_threads};
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
  m.impl("quantize_rows.out", &boxed_out<TORCH_BOX(&quantize_rows), 3>);
  m.impl("quantize_static", TORCH_BOX(&quantize_static));
  m.impl("linear_dynamic", TORCH_BOX(&linear_dynamic));
  m.impl("linear_dynamic.out", &boxed_out<TORCH_BOX(&linear_dynamic), 1>);
  m.impl("linear_static", TORCH_BOX(&linear_static));
  m.impl("binarize_rows", TORCH_BOX(&binarize_rows));
  m.impl("linear_grouped", TORCH_BOX(&linear_grouped));
  m.impl("linear_xnor", TORCH_BOX(&linear_xnor));
  m.impl("linear_weight_only", TORCH_BOX(&linear_weight_only));
  m.impl("linear_acc", TORCH_BOX(&linear_acc));
  m.impl("linear_s8", TORCH_BOX(&linear_s8));
  m.impl("linear_s8.out", &boxed_out<TORCH_BOX(&linear_s8), 1>);
}
