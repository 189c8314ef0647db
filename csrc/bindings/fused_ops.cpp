// Fused torch ops on the CPU: norm_quantize, gated linear units, and layers whose result is int8 rows.
#include "torch_on_cpu.h"

namespace {

// x [..., K] as rows whose elements are contiguous.
XRows dense_rows(const char* function, const Tensor& x) {
  XRows r = rows_of(function, x);
  return r.rows.stride_k == 1 ? r : rows_of(function, torch::stable::contiguous(x));
}

tersor::S8Output s8_output(Quantized& rows) {
  return {static_cast<int8_t*>(std::get<0>(rows).mutable_data_ptr()), static_cast<float*>(std::get<1>(rows).mutable_data_ptr()),
          static_cast<int32_t*>(std::get<2>(rows).mutable_data_ptr())};
}

using Normed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // q, scale, row_sum, sum, y

Normed norm_quantize(Tensor x, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias, double eps, std::string kind,
                     bool want_sum, bool want_y) {
  constexpr const char* kName = "norm_quantize";
  const auto& table = tersor::table_or_throw();
  const XRows r = dense_rows(kName, x);
  const ScalarType type = x.scalar_type();
  Keep keep;
  const tersor::Norm norm = norm_of(kName, r.K, weight, bias, eps, kind, &keep);
  tersor::Rows added{nullptr, r.rows.dtype, 0};
  added.x = residual_of(kName, residual, r.out_sizes, type, &added.ld, &keep);
  Quantized rows = s8_row_results(r.out_sizes);
  Tensor sum = result(want_sum ? r.out_sizes : std::vector<int64_t>{0}, type);
  Tensor y = result(want_y ? r.out_sizes : std::vector<int64_t>{0}, type);
  tersor::check_memory(kName,
                       tersor::norm_quantize(table, r.M, {r.rows.x, r.rows.dtype, r.rows.stride_m}, added, norm, s8_output(rows),
                                             want_sum ? sum.mutable_data_ptr() : nullptr, want_y ? y.mutable_data_ptr() : nullptr));
  return {std::get<0>(rows), std::get<1>(rows), std::get<2>(rows), sum, y};
}

// A layer on float or int8 rows: the sizes of its result, and how to compute it as floats or as rows.
template <typename Input>
struct LayerCall {
  const char* name;
  Input rows;
  int64_t M;
  tersor::LinearWeights w;
  std::vector<int64_t> sizes;
  ScalarType type;
  Dtype dtype;
  Keep keep;

  void add_layer(const Stored& stored, int64_t K, bool glu) {
    w = glu ? glu_weights(name, stored, K, &keep) : weights_of(name, stored, K, &keep);
    sizes.back() = glu ? w.N / 2 : w.N;
  }
};

using FloatCall = LayerCall<tersor::StridedRows>;
using S8Call = LayerCall<tersor::S8Rows>;

FloatCall on_floats(const char* name, const Tensor& x, const Stored& stored, bool glu) {
  XRows r = rows_of(name, x);
  FloatCall call{name, r.rows, r.M, {}, r.out_sizes, x.scalar_type(), r.rows.dtype, {r.held}};
  call.add_layer(stored, r.K, glu);
  return call;
}

S8Call on_s8(const char* name, const Tensor& q, const Tensor& scale, const Tensor& row_sum, const Stored& stored, ScalarType type,
             bool glu) {
  S8Call call{name, {}, 0, {}, {}, type, float_dtype(name, glu ? "dtype" : "out_dtype", type), {}};
  int64_t K = 0;
  call.rows = s8_rows(name, q, row_sum, &call.M, &K, &call.keep, &call.sizes);
  call.rows.scale = static_cast<const float*>(per_row(name, "scale", scale, ScalarType::Float, q, &call.keep));
  call.add_layer(stored, K, glu);
  return call;
}

const char* multiply(const FloatCall& c, const tersor::Output& y) {
  return tersor::linear_dynamic(tersor::table_or_throw(), c.M, c.rows, c.w, y);
}
const char* multiply(const S8Call& c, const tersor::Output& y) {
  return tersor::linear_s8(tersor::table_or_throw(), c.M, c.rows, c.w, y);
}

template <typename Call>
Tensor floats_of(const Call& c) {
  Tensor y = result(c.sizes, c.type);
  tersor::check_memory(c.name, multiply(c, {y.mutable_data_ptr(), c.dtype}));
  return y;
}

template <typename Call>
Quantized quantized(const Call& c) {
  Quantized rows = s8_row_results(c.sizes);
  tersor::check_memory(c.name, tersor::linear_quantize(tersor::table_or_throw(), c.M, c.rows, c.w, c.dtype, s8_output(rows)));
  return rows;
}

Tensor linear_glu(Tensor x, Tensor weight_packed, Tensor weight_scale, OptionalTensor bias, std::string activation, int64_t bits) {
  return floats_of(on_floats("linear_glu", x, {weight_packed, weight_scale, bias, activation, bits}, true));
}

Tensor linear_glu_s8(Tensor q, Tensor scale, Tensor row_sum, Tensor weight_packed, Tensor weight_scale, OptionalTensor bias,
                     std::string activation, ScalarType dtype, int64_t bits) {
  return floats_of(on_s8("linear_glu_s8", q, scale, row_sum, {weight_packed, weight_scale, bias, activation, bits}, dtype, true));
}

Quantized linear_glu_quantize(Tensor x, Tensor weight_packed, Tensor weight_scale, OptionalTensor bias, std::string activation,
                              int64_t bits) {
  return quantized(on_floats("linear_glu_quantize", x, {weight_packed, weight_scale, bias, activation, bits}, true));
}

Quantized linear_glu_s8_quantize(Tensor q, Tensor scale, Tensor row_sum, Tensor weight_packed, Tensor weight_scale,
                                 OptionalTensor bias, std::string activation, ScalarType dtype, int64_t bits) {
  return quantized(
      on_s8("linear_glu_s8_quantize", q, scale, row_sum, {weight_packed, weight_scale, bias, activation, bits}, dtype, true));
}

Quantized linear_dynamic_quantize(Tensor x, Tensor weight_packed, Tensor weight_scale, OptionalTensor bias, std::string epilogue,
                                  int64_t bits) {
  return quantized(on_floats("linear_dynamic_quantize", x, {weight_packed, weight_scale, bias, epilogue, bits}, false));
}

Quantized linear_s8_quantize(Tensor q, Tensor scale, Tensor row_sum, Tensor weight_packed, Tensor weight_scale, OptionalTensor bias,
                             std::string epilogue, ScalarType out_dtype, int64_t bits) {
  return quantized(
      on_s8("linear_s8_quantize", q, scale, row_sum, {weight_packed, weight_scale, bias, epilogue, bits}, out_dtype, false));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, m) {
  m.impl("norm_quantize", TORCH_BOX(&norm_quantize));
  m.impl("norm_quantize.out", &boxed_out<TORCH_BOX(&norm_quantize), 5>);
  m.impl("linear_glu", TORCH_BOX(&linear_glu));
  m.impl("linear_glu.out", &boxed_out<TORCH_BOX(&linear_glu), 1>);
  m.impl("linear_glu_s8", TORCH_BOX(&linear_glu_s8));
  m.impl("linear_glu_s8.out", &boxed_out<TORCH_BOX(&linear_glu_s8), 1>);
  m.impl("linear_glu_quantize", TORCH_BOX(&linear_glu_quantize));
  m.impl("linear_glu_quantize.out", &boxed_out<TORCH_BOX(&linear_glu_quantize), 3>);
  m.impl("linear_glu_s8_quantize", TORCH_BOX(&linear_glu_s8_quantize));
  m.impl("linear_glu_s8_quantize.out", &boxed_out<TORCH_BOX(&linear_glu_s8_quantize), 3>);
  m.impl("linear_dynamic_quantize", TORCH_BOX(&linear_dynamic_quantize));
  m.impl("linear_dynamic_quantize.out", &boxed_out<TORCH_BOX(&linear_dynamic_quantize), 3>);
  m.impl("linear_s8_quantize", TORCH_BOX(&linear_s8_quantize));
  m.impl("linear_s8_quantize.out", &boxed_out<TORCH_BOX(&linear_s8_quantize), 3>);
}
