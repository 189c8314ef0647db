// What the torch bindings of layers share: stored tensors, int8 rows and residuals as the drivers take them.
#pragma once

#include "../core/fused.h"
#include "torch_results.h"

namespace {

inline const uint8_t* tiles_of(const char* function, const Tensor& weight_packed, int64_t N, int64_t K, int bits, Keep* keep) {
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

// A layer [N, K] with the scale of each channel, which says what N is.
inline tersor::LinearWeights scaled_layer(const char* function, const Tensor& weight_scale, int64_t K, Keep* keep) {
  tersor::LinearWeights w{};
  check_plain(function, "weight_scale", weight_scale);
  if (weight_scale.dim() != 1) fail(function, "weight_scale has ", weight_scale.dim(), " dimensions, expected [N]");
  w.N = weight_scale.size(0);
  w.K = K;
  w.weight_scale = static_cast<const float*>(exact(function, "weight_scale", weight_scale, ScalarType::Float, {w.N}, keep));
  return w;
}

inline void add_bias(const char* function, const OptionalTensor& bias, const std::string& epilogue, tersor::LinearWeights* w,
                     Keep* keep) {
  if (bias) {
    w->bias_dtype = float_dtype(function, "bias", bias->scalar_type());
    w->bias = exact(function, "bias", *bias, bias->scalar_type(), {w->N}, keep);
  }
  w->activation = tersor::activation_from(function, epilogue);
}

inline tersor::LinearWeights weights_of(const char* function, const Stored& s, int64_t K, Keep* keep) {
  tersor::LinearWeights w = scaled_layer(function, s.weight_scale, K, keep);
  w.bits = tersor::check_bits(function, s.bits);
  w.weight_packed = tiles_of(function, s.weight_packed, w.N, K, w.bits, keep);
  add_bias(function, s.bias, s.epilogue, &w, keep);
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

// What is added to y [..., N]: a tensor of its sizes and dtype; null where none is given. *stride: of its rows, which are
// contiguous.
inline const void* residual_of(const char* function, const OptionalTensor& residual, const std::vector<int64_t>& sizes,
                               ScalarType type, int64_t* stride, Keep* keep) {
  if (!residual) return nullptr;
  check_plain(function, "residual", *residual);
  const auto have = residual->sizes();
  bool same = residual->scalar_type() == type && have.size() == sizes.size();
  for (size_t i = 0; same && i < sizes.size(); ++i) same = have[i] == sizes[i];
  if (!same) {
    std::ostringstream text;
    for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
    fail(function, "residual must be ", torch::headeronly::toString(type), " [", text.str(), "], as the result");
  }
  const int64_t dim = static_cast<int64_t>(sizes.size());
  const bool in_rows = sizes.back() <= 1 || residual->stride(dim - 1) == 1;
  if (in_rows && !misaligned(*residual) && collapse(dim, sizes.data(), residual->strides().data(), stride)) {
    return residual->const_data_ptr();
  }
  keep->push_back(torch::stable::contiguous(misaligned(*residual) ? torch::stable::clone(*residual) : *residual));
  *stride = sizes.back();
  return keep->back().const_data_ptr();
}

// q [..., K] int8 with any row stride; row_sum (and scale) one for each row, contiguous.
inline tersor::S8Rows s8_rows(const char* function, const Tensor& q, const Tensor& row_sum, int64_t* M, int64_t* K, Keep* keep,
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

using Quantized = std::tuple<Tensor, Tensor, Tensor>;  // q, scale, row_sum

inline Quantized s8_row_results(const std::vector<int64_t>& sizes) {
  const std::vector<int64_t> lead(sizes.begin(), sizes.end() - 1);
  // One after the other: the order of a braced list is that of the results.
  return {result(sizes, ScalarType::Char), result(lead, ScalarType::Float), result(lead, ScalarType::Int)};
}

inline tersor::LinearWeights glu_weights(const char* function, const Stored& stored, int64_t K, Keep* keep) {
  tersor::LinearWeights w = weights_of(function, stored, K, keep);
  if (w.N % (2 * tersor::kTileN))
    fail(function, "weight_scale has ", w.N, " channels, expected a multiple of 32: gate and up in turn");
  w.glu = true;
  return w;
}

inline tersor::Norm norm_of(const char* function, int64_t K, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                            const std::string& kind, Keep* keep) {
  tersor::Norm norm{};
  norm.K = K;
  norm.eps = static_cast<float>(eps);
  norm.rms = kind == "rms";
  if (!norm.rms && kind != "layer") fail(function, "kind is '", kind, "', expected layer or rms");
  if (norm.rms && bias) fail(function, "bias is given, expected None for kind='rms'");
  auto vector_of = [&](const char* name, const OptionalTensor& t, Dtype* dtype) -> const void* {
    if (!t) return nullptr;
    *dtype = float_dtype(function, name, t->scalar_type());
    return exact(function, name, *t, t->scalar_type(), {K}, keep);
  };
  norm.weight = vector_of("weight", weight, &norm.weight_dtype);
  norm.bias = vector_of("bias", bias, &norm.bias_dtype);
  return norm;
}

}  // namespace
