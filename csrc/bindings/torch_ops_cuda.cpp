// torch ops on CUDA, a library of its own: check, allocate, fill the arguments, launch. Schemas, fake kernels and references are in
// python/tersor/ops; ops that are not here run as their reference.
#include "../cuda/params.h"
#include "torch_on_cuda.h"

namespace {

using tersor::ceil_div;
using tersor::round_up;
using tersor::cuda::LinearCall;
using tersor::cuda::Width;

constexpr int64_t kWide = 16;  // bytes of the widest load

template <typename T = void>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Tiles and group scales are read 16 bytes at a time; a view into a larger tensor can begin elsewhere.
const uint8_t* wide(const uint8_t* p, const Tensor& t, Keep* keep) {
  if (reinterpret_cast<uintptr_t>(p) % kWide == 0) return p;
  keep->push_back(torch::stable::clone(t));
  return static_cast<const uint8_t*>(keep->back().const_data_ptr());
}

tersor::cuda::QuantizeParams quantize_params(const XRows& r) {
  tersor::cuda::QuantizeParams p{};
  p.x = r.rows.x;
  p.dtype = r.rows.dtype;
  p.stride_m = r.rows.stride_m;
  p.stride_k = r.rows.stride_k;
  p.M = r.M;
  p.K = r.K;
  return p;
}

Quantized quantize(CudaCall& call, const XRows& r, const float* absmax, const float* input_scale) {
  auto rows = s8_row_results(r.out_sizes);
  tersor::cuda::QuantizeParams p = quantize_params(r);
  p.absmax = absmax;
  p.input_scale = input_scale;
  p.q = data<int8_t>(std::get<0>(rows));
  p.ldq = p.width = r.K;
  p.scale = data<float>(std::get<1>(rows));
  p.row_sum = data<int32_t>(std::get<2>(rows));
  call.check(tersor::cuda::quantize(p, call.stream));
  return rows;
}

Quantized quantize_rows(Tensor x, OptionalTensor absmax) {
  constexpr const char* kName = "quantize_rows";
  CudaCall call(kName, x);
  const XRows r = rows_of(kName, x);
  const void* given = absmax ? per_row(kName, "absmax", *absmax, ScalarType::Float, x, &call.keep) : nullptr;
  return quantize(call, r, static_cast<const float*>(given), nullptr);
}

Quantized quantize_static(Tensor x, Tensor input_scale) {
  constexpr const char* kName = "quantize_static";
  CudaCall call(kName, x);
  const XRows r = rows_of(kName, x);
  const void* scale = exact(kName, "input_scale", input_scale, ScalarType::Float, {}, &call.keep);
  return quantize(call, r, nullptr, static_cast<const float*>(scale));
}

std::tuple<Tensor, Tensor> binarize_rows(Tensor x, Tensor threshold) {
  constexpr const char* kName = "binarize_rows";
  CudaCall call(kName, x);
  const XRows r = rows_of(kName, x);
  const void* limits = exact(kName, "threshold", threshold, ScalarType::Float, {r.K}, &call.keep);
  std::vector<int64_t> sizes = r.out_sizes;
  sizes.back() = ceil_div(r.K, tersor::tile_k(1));
  Tensor bits = empty(sizes, ScalarType::Int);
  const int64_t words = sizes.back();
  sizes.pop_back();
  Tensor scale = empty(sizes, ScalarType::Float);
  const tersor::cuda::BinarizeParams p{r.rows.x,
                                       r.rows.dtype,
                                       r.rows.stride_m,
                                       r.rows.stride_k,
                                       r.M,
                                       r.K,
                                       static_cast<const float*>(limits),
                                       data<uint32_t>(bits),
                                       words,
                                       nullptr,
                                       data<float>(scale),
                                       nullptr};
  call.check(tersor::cuda::binarize(p, call.stream));
  return {bits, scale};
}

// ---- layers -------------------------------------------------------------------------------------------------------------------

// The rows of a layer, quantised into scratch whose rows are padded to what the kernels read.
void quantize_into(CudaCall& call, const XRows& r, const tersor::LinearWeights& w, LinearCall* c) {
  c->ld_rows = round_up(r.K, kWide);
  const int64_t parts = w.group_scale ? r.K / 32 : 0;
  tersor::cuda::QuantizeParams p = quantize_params(r);
  p.input_scale = w.input_scale;
  p.q = static_cast<int8_t*>(call.scratch(r.M * c->ld_rows));
  p.ldq = p.width = c->ld_rows;
  p.scale = static_cast<float*>(call.scratch(r.M * 4));
  p.row_sum = static_cast<int32_t*>(call.scratch(r.M * 4));
  p.row_sum_32 = static_cast<int32_t*>(call.scratch(r.M * parts * 4));
  call.check(tersor::cuda::quantize(p, call.stream));
  c->rows = p.q;
  c->scale = p.scale;
  c->row_sum = p.row_sum;
  c->row_sum_32 = p.row_sum_32;
}

// Signs as bits, or as s8 rows for 1-bit codes where the GPU has no binary mma. After take_weights: the width is decided here.
void binarize_into(CudaCall& call, const XRows& r, const tersor::LinearWeights& w, LinearCall* c) {
  const bool as_int8 = signs_as_int8(call.gpu);
  c->width = as_int8 ? Width::bits1 : Width::signs;
  const int64_t words = as_int8 ? ceil_div(r.K, 32) : round_up(ceil_div(r.K, 32), 4);
  c->ld_rows = words * (as_int8 ? 32 : 4);
  void* rows = call.scratch(r.M * c->ld_rows);
  const tersor::cuda::BinarizeParams p{r.rows.x,
                                       r.rows.dtype,
                                       r.rows.stride_m,
                                       r.rows.stride_k,
                                       r.M,
                                       r.K,
                                       w.threshold,
                                       as_int8 ? nullptr : static_cast<uint32_t*>(rows),
                                       words,
                                       as_int8 ? static_cast<int8_t*>(rows) : nullptr,
                                       static_cast<float*>(call.scratch(r.M * 4)),
                                       static_cast<int32_t*>(call.scratch(r.M * 4))};
  call.check(tersor::cuda::binarize(p, call.stream));
  c->rows = rows;
  c->scale = p.scale;
  c->row_sum = p.popcount;
}

// int8 rows as the caller gave them: where they lie as the kernels read them, or copied so.
void take_rows(const char* name, CudaCall& call, const Tensor& q, const Tensor* scale, const Tensor& row_sum, LinearCall* c,
               std::vector<int64_t>* sizes) {
  const tersor::S8Rows rows = s8_rows(name, q, row_sum, &c->M, &c->K, &call.keep, sizes);
  c->rows = rows.q;
  c->ld_rows = rows.ldq;
  c->row_sum = rows.row_sum;
  if (scale) c->scale = static_cast<const float*>(per_row(name, "scale", *scale, ScalarType::Float, q, &call.keep));
  const bool one_row = c->M <= 1;
  if (c->K % kWide == 0 && reinterpret_cast<uintptr_t>(rows.q) % kWide == 0 && (one_row || rows.ldq % kWide == 0)) {
    if (one_row) c->ld_rows = c->K;
    return;
  }
  c->ld_rows = round_up(c->K, kWide);
  Tensor padded = empty({c->M, c->ld_rows}, ScalarType::Char);
  Tensor part = torch::stable::narrow(padded, 1, 0, c->K);
  torch::stable::copy_(part, torch::stable::reshape(q, {c->M, c->K}));
  call.keep.push_back(padded);
  c->rows = padded.const_data_ptr();
}

void take_weights(CudaCall& call, const Stored& stored, const tersor::LinearWeights& w, LinearCall* c) {
  c->N = w.N;
  c->K = w.K;
  c->width = static_cast<Width>(w.bits);
  c->weight_packed = wide(w.weight_packed, stored.weight_packed, &call.keep);
  c->weight_scale = w.weight_scale;
  c->bias = w.bias;
  c->bias_dtype = w.bias_dtype;
  c->activation = w.activation;
  c->glu = w.glu;
  if (w.group_scale) {
    c->group_scale = wide(w.group_scale, *stored.group_scale, &call.keep);
    c->group_size = w.group_size;
  }
}

// y [..., columns], and everything still missing of the call.
Tensor multiply(const char* name, CudaCall& call, LinearCall* c, std::vector<int64_t> sizes, ScalarType type, Dtype dtype,
                const OptionalTensor& residual = std::nullopt) {
  const int64_t columns = c->glu ? c->N / 2 : c->N;
  sizes.back() = columns;
  c->ldy = columns;
  c->y_dtype = dtype;
  c->residual = residual_of(name, residual, sizes, type, &c->ld_residual, &call.keep);
  Tensor y = empty(sizes, type);
  c->y = y.mutable_data_ptr();
  const tersor::cuda::Plan plan = tersor::cuda::plan(call.gpu, c->M, c->N, c->K, c->width, c->group_scale != nullptr, c->glu);
  c->workspace = call.scratch(plan.workspace_bytes);
  call.check(tersor::cuda::linear(*c, plan, call.stream));
  return y;
}

Tensor float_linear(const char* name, const Tensor& x, const Stored& stored, const OptionalTensor& residual = std::nullopt,
                    bool glu = false) {
  CudaCall call(name, x);
  const XRows r = rows_of(name, x);
  call.keep.push_back(r.held);
  const tersor::LinearWeights w = glu ? glu_weights(name, stored, r.K, &call.keep) : weights_of(name, stored, r.K, &call.keep);
  LinearCall c{};
  c.M = r.M;
  take_weights(call, stored, w, &c);
  stored.threshold ? binarize_into(call, r, w, &c) : quantize_into(call, r, w, &c);
  return multiply(name, call, &c, r.out_sizes, x.scalar_type(), r.rows.dtype, residual);
}

Tensor s8_linear(const char* name, const Tensor& q, const Tensor& scale, const Tensor& row_sum, const Stored& stored,
                 ScalarType type, const OptionalTensor& residual = std::nullopt, bool glu = false) {
  CudaCall call(name, q);
  LinearCall c{};
  std::vector<int64_t> sizes;
  take_rows(name, call, q, &scale, row_sum, &c, &sizes);
  const Dtype dtype = float_dtype(name, glu ? "dtype" : "out_dtype", type);
  const tersor::LinearWeights w = glu ? glu_weights(name, stored, c.K, &call.keep) : weights_of(name, stored, c.K, &call.keep);
  take_weights(call, stored, w, &c);
  return multiply(name, call, &c, sizes, type, dtype, residual);
}

Tensor linear_dynamic(Tensor x, Tensor weight_packed, Tensor weight_scale, OptionalTensor bias, std::string epilogue, int64_t bits,
                      OptionalTensor residual) {
  return float_linear("linear_dynamic", x, {weight_packed, weight_scale, bias, epilogue, bits}, residual);
}

Tensor linear_static(Tensor x, Tensor weight_packed, Tensor weight_scale, OptionalTensor bias, Tensor input_scale,
                     std::string epilogue, OptionalTensor residual) {
  return float_linear("linear_static", x, {weight_packed, weight_scale, bias, epilogue, 8, &input_scale}, residual);
}

Tensor linear_grouped(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor group_scale, OptionalTensor bias,
                      std::string epilogue, OptionalTensor residual) {
  return float_linear("linear_grouped", x, {weight_packed, weight_scale, bias, epilogue, 4, nullptr, &group_scale}, residual);
}

Tensor linear_xnor(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor threshold, OptionalTensor bias, std::string epilogue,
                   OptionalTensor residual) {
  return float_linear("linear_xnor", x, {weight_packed, weight_scale, bias, epilogue, 1, nullptr, nullptr, &threshold}, residual);
}

Tensor linear_s8(Tensor q, Tensor scale, Tensor row_sum, Tensor weight_packed, Tensor weight_scale, OptionalTensor bias,
                 std::string epilogue, ScalarType out_dtype, int64_t bits, OptionalTensor residual) {
  return s8_linear("linear_s8", q, scale, row_sum, {weight_packed, weight_scale, bias, epilogue, bits}, out_dtype, residual);
}

Tensor linear_acc(Tensor q, Tensor row_sum, Tensor weight_packed, int64_t out_features, int64_t bits) {
  constexpr const char* kName = "linear_acc";
  CudaCall call(kName, q);
  LinearCall c{};
  std::vector<int64_t> sizes;
  take_rows(kName, call, q, nullptr, row_sum, &c, &sizes);
  tersor::check_out_features(kName, out_features);
  c.N = out_features;
  c.width = static_cast<Width>(tersor::check_bits(kName, bits));
  const uint8_t* tiles = tiles_of(kName, weight_packed, c.N, c.K, static_cast<int>(bits), &call.keep);
  c.weight_packed = wide(tiles, weight_packed, &call.keep);
  return multiply(kName, call, &c, sizes, ScalarType::Int, Dtype::s32);
}

Tensor linear_glu(Tensor x, Tensor weight_packed, Tensor weight_scale, OptionalTensor bias, std::string activation, int64_t bits) {
  return float_linear("linear_glu", x, {weight_packed, weight_scale, bias, activation, bits}, std::nullopt, true);
}

Tensor linear_glu_s8(Tensor q, Tensor scale, Tensor row_sum, Tensor weight_packed, Tensor weight_scale, OptionalTensor bias,
                     std::string activation, ScalarType dtype, int64_t bits) {
  return s8_linear("linear_glu_s8", q, scale, row_sum, {weight_packed, weight_scale, bias, activation, bits}, dtype, std::nullopt,
                   true);
}

Quantized linear_glu_quantize(Tensor x, Tensor weight_packed, Tensor weight_scale, OptionalTensor bias, std::string activation,
                              int64_t bits) {
  return quantize_rows(
      float_linear("linear_glu_quantize", x, {weight_packed, weight_scale, bias, activation, bits}, std::nullopt, true),
      std::nullopt);
}

Quantized linear_glu_s8_quantize(Tensor q, Tensor scale, Tensor row_sum, Tensor weight_packed, Tensor weight_scale,
                                 OptionalTensor bias, std::string activation, ScalarType dtype, int64_t bits) {
  return quantize_rows(s8_linear("linear_glu_s8_quantize", q, scale, row_sum, {weight_packed, weight_scale, bias, activation, bits},
                                 dtype, std::nullopt, true),
                       std::nullopt);
}

Quantized linear_dynamic_quantize(Tensor x, Tensor weight_packed, Tensor weight_scale, OptionalTensor bias, std::string epilogue,
                                  int64_t bits) {
  return quantize_rows(float_linear("linear_dynamic_quantize", x, {weight_packed, weight_scale, bias, epilogue, bits}),
                       std::nullopt);
}

Quantized linear_s8_quantize(Tensor q, Tensor scale, Tensor row_sum, Tensor weight_packed, Tensor weight_scale, OptionalTensor bias,
                             std::string epilogue, ScalarType out_dtype, int64_t bits) {
  return quantize_rows(
      s8_linear("linear_s8_quantize", q, scale, row_sum, {weight_packed, weight_scale, bias, epilogue, bits}, out_dtype),
      std::nullopt);
}

Tensor linear_sparse_pairs(Tensor x, Tensor weight_packed, Tensor weight_scale, OptionalTensor bias, std::string epilogue) {
  constexpr const char* kName = "linear_sparse_pairs";
  CudaCall call(kName, x);
  const XRows r = rows_of(kName, x);
  tersor::LinearWeights w = scaled_layer(kName, weight_scale, r.K, &call.keep);
  add_bias(kName, bias, epilogue, &w, &call.keep);
  w.weight_packed =
      static_cast<const uint8_t*>(exact(kName, "weight_packed", weight_packed, ScalarType::Byte,
                                        {ceil_div(w.N, tersor::kTileN), ceil_div(r.K, 64), tersor::cuda::kBytes24}, &call.keep));
  LinearCall c{};
  c.M = r.M;
  take_weights(call, {weight_packed, weight_scale, bias, epilogue}, w, &c);
  c.width = Width::sparse24;
  quantize_into(call, r, w, &c);
  return multiply(kName, call, &c, r.out_sizes, x.scalar_type(), r.rows.dtype);
}

using Normed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // q, scale, row_sum, sum, y

Normed norm_quantize(Tensor x, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias, double eps, std::string kind,
                     bool want_sum, bool want_y) {
  constexpr const char* kName = "norm_quantize";
  CudaCall call(kName, x);
  const XRows r = rows_of(kName, x);
  const ScalarType type = x.scalar_type();
  const tersor::Norm norm = norm_of(kName, r.K, weight, bias, eps, kind, &call.keep);
  tersor::cuda::NormParams p{};
  p.x = r.rows.x;
  p.dtype = r.rows.dtype;
  p.stride_m = r.rows.stride_m;
  p.stride_k = r.rows.stride_k;
  p.residual = residual_of(kName, residual, r.out_sizes, type, &p.ld_residual, &call.keep);
  p.M = r.M;
  p.K = r.K;
  p.weight = norm.weight;
  p.bias = norm.bias;
  p.weight_dtype = norm.weight_dtype;
  p.bias_dtype = norm.bias_dtype;
  p.eps = norm.eps;
  p.rms = norm.rms;
  Quantized rows = s8_row_results(r.out_sizes);
  Tensor sum = empty(want_sum ? r.out_sizes : std::vector<int64_t>{0}, type);
  Tensor y = empty(want_y ? r.out_sizes : std::vector<int64_t>{0}, type);
  p.q = data<int8_t>(std::get<0>(rows));
  p.scale = data<float>(std::get<1>(rows));
  p.row_sum = data<int32_t>(std::get<2>(rows));
  p.sum = want_sum ? data(sum) : nullptr;
  p.y = want_y ? data(y) : nullptr;
  call.check(tersor::cuda::normalize(p, call.stream));
  return {std::get<0>(rows), std::get<1>(rows), std::get<2>(rows), sum, y};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersor, CUDA, m) {
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
  m.impl("quantize_static", TORCH_BOX(&quantize_static));
  m.impl("binarize_rows", TORCH_BOX(&binarize_rows));
  m.impl("linear_dynamic", TORCH_BOX(&linear_dynamic));
  m.impl("linear_static", TORCH_BOX(&linear_static));
  m.impl("linear_grouped", TORCH_BOX(&linear_grouped));
  m.impl("linear_xnor", TORCH_BOX(&linear_xnor));
  m.impl("linear_acc", TORCH_BOX(&linear_acc));
  m.impl("linear_s8", TORCH_BOX(&linear_s8));
  m.impl("linear_glu", TORCH_BOX(&linear_glu));
  m.impl("linear_glu_s8", TORCH_BOX(&linear_glu_s8));
  m.impl("linear_glu_quantize", TORCH_BOX(&linear_glu_quantize));
  m.impl("linear_glu_s8_quantize", TORCH_BOX(&linear_glu_s8_quantize));
  m.impl("linear_dynamic_quantize", TORCH_BOX(&linear_dynamic_quantize));
  m.impl("linear_s8_quantize", TORCH_BOX(&linear_s8_quantize));
  m.impl("linear_sparse_pairs", TORCH_BOX(&linear_sparse_pairs));
  m.impl("norm_quantize", TORCH_BOX(&norm_quantize));
}
