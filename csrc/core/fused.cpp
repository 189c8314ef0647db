#include "fused.h"

#include "parallel.h"
#include "scratch.h"

namespace tersor {
namespace {

constexpr const char* kOutOfMemory = "out of memory for scratch";
// Elements of a norm below which a second thread costs more than it brings: about 5 us of work.
constexpr int64_t kMinThreadElements = int64_t{1} << 15;
// Rows of a layer that are multiplied before they are quantised, for each thread: a block of linear.cpp.
constexpr int64_t kLayerRows = 64;

// The drivers of linear.cpp, which run meanwhile, have their own.
thread_local Scratch thread_scratch;

template <typename Linear>
const char* quantize_result(const KernelTable& kt, int64_t M, int64_t F, Dtype dtype, const S8Output& out, Linear linear) {
  const int64_t most = kLayerRows * thread_pool.threads(), block = M < most ? M : most;
  void* y = thread_scratch.get(block * F * dtype_bytes(dtype));
  if (!y && block * F > 0) return kOutOfMemory;
  for (int64_t m = 0; m < M; m += block) {
    const int64_t rows = m + block < M ? block : M - m;
    if (const char* error = linear(m, rows, Output{y, dtype})) return error;
    const char* error =
        quantize_rows(kt, rows, F, {y, dtype, F, 1}, nullptr, nullptr, out.q + m * F, out.scale + m, out.row_sum + m);
    if (error) return error;
  }
  return nullptr;
}

int64_t result_features(const LinearWeights& w) { return w.glu ? w.N / 2 : w.N; }

}  // namespace

const char* norm_quantize(const KernelTable& kt, int64_t M, const Rows& x, const Rows& residual, const Norm& norm,
                          const S8Output& out, void* sum, void* y) {
  if (M == 0) return nullptr;
  const int64_t K = norm.K, bytes = dtype_bytes(x.dtype), weights = round_up(K, kTileN);
  int64_t pieces = M * K / kMinThreadElements, threads = thread_pool.threads();
  if (pieces > threads) pieces = threads;
  if (pieces > M) pieces = M;
  if (pieces < 1) pieces = 1;
  const int64_t slice = NormArgs::scratch_floats(K, residual.x != nullptr);
  auto* scratch = reinterpret_cast<float*>(thread_scratch.get((slice * pieces + 2 * weights) * 4));
  if (!scratch && K > 0) return kOutOfMemory;
  float* wide = scratch + slice * pieces;
  auto widen = [&](const void* v, Dtype dtype, float absent, float* to) -> const float* {
    if (v && dtype == Dtype::f32) return static_cast<const float*>(v);
    if (v) kt.widen_x.run(v, dtype, K, to);
    for (int64_t k = 0; k < K && !v; ++k) to[k] = absent;
    return to;
  };
  const float* weight = widen(norm.weight, norm.weight_dtype, 1.0f, wide);
  const float* bias = norm.rms ? nullptr : widen(norm.bias, norm.bias_dtype, 0.0f, wide + weights);
  auto row = [&](const Rows& rows, int64_t m) -> Rows {
    return {rows.x ? static_cast<const char*>(rows.x) + m * rows.ld * bytes : nullptr, rows.dtype, rows.ld};
  };
  auto piece = [&](int64_t i) {
    const int64_t m = M * i / pieces, end = M * (i + 1) / pieces;
    auto at = [&](void* rows) { return rows ? static_cast<char*>(rows) + m * K * bytes : nullptr; };
    kt.norm_quantize_x.run({row(x, m), row(residual, m), end - m, K, weight, bias, norm.eps, norm.rms, out.q + m * K, out.scale + m,
                            out.row_sum + m, at(sum), at(y), scratch + i * slice});
  };
  parallel_for(pieces, piece);
  return nullptr;
}

const char* linear_quantize(const KernelTable& kt, int64_t M, const StridedRows& x, const LinearWeights& w, Dtype dtype,
                            const S8Output& out) {
  return quantize_result(kt, M, result_features(w), dtype, out, [&](int64_t m, int64_t rows, const Output& y) {
    const void* from = static_cast<const char*>(x.x) + m * x.stride_m * dtype_bytes(x.dtype);
    return linear_dynamic(kt, rows, {from, x.dtype, x.stride_m, x.stride_k}, w, y);
  });
}

const char* linear_quantize(const KernelTable& kt, int64_t M, const S8Rows& x, const LinearWeights& w, Dtype dtype,
                            const S8Output& out) {
  return quantize_result(kt, M, result_features(w), dtype, out, [&](int64_t m, int64_t rows, const Output& y) {
    return linear_s8(kt, rows, {x.q + m * x.ldq, x.ldq, x.scale + m, x.row_sum + m}, w, y);
  });
}

}  // namespace tersor
