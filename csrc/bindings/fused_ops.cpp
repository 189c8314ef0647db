// Fused torch ops on the CPU: norm_quantize and the gated linear units.
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
  Quantized rows = empty_s8_rows(r.out_sizes);
  Tensor sum = empty(want_sum ? r.out_sizes : std::vector<int64_t>{0}, type);
  Tensor y = empty(want_y ? r.out_sizes : std::vector<int64_t>{0}, type);
  tersor::check_memory(kName,
                       tersor::norm_quantize(table, r.M, {r.rows.x, r.rows.dtype, r.rows.stride_m}, added, norm, s8_output(rows),
                                             want_sum ? sum.mutable_data_ptr() : nullptr, want_y ? y.mutable_data_ptr() : nullptr));
  return {std::get<0>(rows), std::get<1>(rows), std::get<2>(rows), sum, y};
}

// What a gated layer reads: the sizes of its result, and how to compute it as floats or as rows.
template <typename Input>
struct GluCall {
  const char* name;
  Input rows;
  int64_t M;
  tersor::LinearWeights w;
  std::vector<int64_t> sizes;
  ScalarType type;
  Dtype dtype;
  Keep keep;
};

using FloatGlu = GluCall<tersor::StridedRows>;
using S8Glu = GluCall<tersor::S8Rows>;

FloatGlu float_glu(const char* name, const Tensor& x, const Stored& stored) {
  XRows r = rows_of(name, x);
  FloatGlu call{name, r.rows, r.M, {}, r.out_sizes, x.scalar_type(), r.rows.dtype, {r.held}};
  call.w = glu_weights(name, stored, r.K, &call.keep);
  call.sizes.back() = call.w.N / 2;
  return call;
}

S8Glu s8_glu(const char* name, const Tensor& q, const Tensor& scale, const Tensor& row_sum, const Stored& stored, ScalarType type) {
  S8Glu call{name, {}, 0, {}, {}, type, float_dtype(name, "dtype", type), {}};
  int64_t K = 0;
  call.rows = s8_rows(name, q, row_sum, &call.M, &K, &call.keep, &call.sizes);
  call.rows.scale = static_cast<const float*>(per_row(name, "scale", scale, ScalarType::Float, q, &call.keep));
  call.w = glu_weights(name, stored, K, &call.keep);
  call.sizes.back() = call.w.N / 2;
  return call;
}

const char* multiply(const FloatGlu& c, const tersor::Output& y) {
  return tersor::linear_dynamic(tersor::table_or_throw(), c.M, c.rows, c.w, y);
}
const char* multiply(const S8Glu& c, const tersor::Output& y) {
  return tersor::linear_s8(tersor::table_or_throw(), c.M, c.rows, c.w, y);
}

template <typename Call>
Tensor floats_of(const Call& c) {
  Tensor y = empty(c.sizes, c.type);
  tersor::check_memory(c.name, multiply(c, {y.mutable_data_ptr(), c.dtype}));
  return y;
}

template <typename Call>
Quantized rows_of_product(const Call& c) {
  Quantized rows = empty_s8_rows(c.sizes);
  tersor::check_memory(c.name, tersor::linear_glu_quantize(tersor::table_or_throw(), c.M, c.rows, c.w, c.dtype, s8_output(rows)));
  return rows;
}

Tensor linear_glu(Tensor x, Tensor weight_packed, Tensor weight_scale, OptionalTensor bias, std::string activation, int64_t bits) {
  return floats_of(float_glu("linear_glu", x, {weight_packed, weight_scale, bias, activation, bits}));
}

Tensor linear_glu_s8(Tensor q, Tensor scale, Tensor row_sum, Tensor weight_packed, Tensor weight_scale, OptionalTensor bias,
                     std::string activation, ScalarType dtype, int64_t bits) {
  return floats_of(s8_glu("linear_glu_s8", q, scale, row_sum, {weight_packed, weight_scale, bias, activation, bits}, dtype));
}

Quantized linear_glu_quantize(Tensor x, Tensor weight_packed, Tensor weight_scale, OptionalTensor bias, std::string activation,
                              int64_t bits) {
  return rows_of_product(float_glu("linear_glu_quantize", x, {weight_packed, weight_scale, bias, activation, bits}));
}

Quantized linear_glu_s8_quantize(Tensor q, Tensor scale, Tensor row_sum, Tensor weight_packed, Tensor weight_scale,
                                 OptionalTensor bias, std::string activation, ScalarType dtype, int64_t bits) {
  return rows_of_product(
      s8_glu("linear_glu_s8_quantize", q, scale, row_sum, {weight_packed, weight_scale, bias, activation, bits}, dtype));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersor, CPU, m) {
  m.impl("norm_quantize", TORCH_BOX(&norm_quantize));
  m.impl("linear_glu", TORCH_BOX(&linear_glu));
  m.impl("linear_glu_s8", TORCH_BOX(&linear_glu_s8));
  m.impl("linear_glu_quantize", TORCH_BOX(&linear_glu_quantize));
  m.impl("linear_glu_s8_quantize", TORCH_BOX(&linear_glu_s8_quantize));
}
