// Parameters of the kernels that work on rows alone; see the .cuh of each.
#pragma once

#include "../core/kernel_table.h"

namespace tersor::cuda {

struct QuantizeParams {
  const void* x;  // element (m, k) at x + (m * stride_m + k * stride_k) elements
  Dtype dtype;
  int64_t stride_m, stride_k;
  int64_t M, K;
  const float* absmax;       // [M] or null: taken in place of the row's own
  const float* input_scale;  // [1] or null: the scale of every row
  int8_t* q;                 // [M][ldq]
  int64_t ldq;
  int64_t width;        // bytes of each row that are written, >= K: zeros from K on
  float* scale;         // [M]
  int32_t* row_sum;     // [M]
  int32_t* row_sum_32;  // [M][ceil(K/32)] sums of q over 32 k, or null
};

struct BinarizeParams {
  const void* x;
  Dtype dtype;
  int64_t stride_m, stride_k;  // elements
  int64_t M, K;
  const float* threshold;  // [K]
  uint32_t* bits;          // [M][ld_words], element k = 4j + b of a word at bit 8b + j; or null
  int64_t ld_words;        // words of each row: >= ceil(K/32), zeros past it
  int8_t* signs;           // [M][32 * ld_words] of -1, +1 and zeros past K; or null
  float* scale;            // [M]
  int32_t* popcount;       // [M] or null: set bits, with `signs` the sum of the row
};

struct NormParams {
  const void* x;  // element (m, k) at x + (m * stride_m + k * stride_k) elements
  Dtype dtype;    // of x, residual, sum and y
  int64_t stride_m, stride_k;
  const void* residual;  // [M][ld_residual] or null
  int64_t ld_residual;
  int64_t M, K;
  const void* weight;  // [K] or null: 1
  const void* bias;    // [K] or null: 0; not read for rms
  Dtype weight_dtype, bias_dtype;
  float eps;
  bool rms;
  int8_t* q;         // [M][K]
  float* scale;      // [M]
  int32_t* row_sum;  // [M]
  void* sum;         // [M][K] or null
  void* y;           // [M][K] or null
};

// A block of 16 channels x 64 k of 2:4 weights: 512 bytes of values, 128 of places (spmm_24.cuh).
inline constexpr int64_t kBytes24 = 640;

}  // namespace tersor::cuda
