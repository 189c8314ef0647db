// Whole layers over the kernel table: blocks the rows for the caches, splits the work over threads, lends scratch. A binding checks
// its arguments, fills one of these structs and calls the function; each returns null, or a message when memory ran out.
#pragma once

#include "kernel_table.h"

namespace tersor {

struct LinearWeights {
  int64_t N, K;
  const uint8_t* weight_packed;
  const float* weight_scale;  // [N]; may be null where y_dtype is s32
  const float* input_scale;   // [1]: one scale for all rows of x; null: each row's own
  const void* bias;           // [N] or null
  Dtype bias_dtype;
  Activation activation;
  int bits = 8;                          // of a code: 8, 4, 2 or 1
  const uint8_t* group_scale = nullptr;  // 4 bits only; null: one scale for a channel
  int64_t group_size = 0;
  const float* threshold = nullptr;                  // [K] of linear_xnor
  const SparseWeights* sparse = nullptr;             // in place of weight_packed
  const SparseFloatWeights* sparse_float = nullptr;  // of linear_weight_only, in place of weight_packed and weight_scale
};

struct Output {
  void* y;  // [M][N] contiguous
  Dtype dtype;
};

// Rows of any strides: element (m, k) is at x + (m * stride_m + k * stride_k) elements.
struct StridedRows {
  const void* x;
  Dtype dtype;
  int64_t stride_m, stride_k;
};

struct S8Rows {
  const int8_t* q;  // [M][K], row stride ldq bytes; nothing past K is read
  int64_t ldq;
  const float* scale;      // [M]; may be null where the output is s32
  const int32_t* row_sum;  // [M]
};

// quantize_x over all rows.
const char* quantize_rows(const KernelTable&, int64_t M, int64_t K, const StridedRows&, const float* absmax,
                          const float* input_scale, int8_t* q, float* scale, int32_t* row_sum);

// Quantises x, each row by its own scale or all by w.input_scale, and multiplies.
const char* linear_dynamic(const KernelTable&, int64_t M, const StridedRows&, const LinearWeights&, const Output&);

// The same on rows that are already quantised; Dtype::s32 gives the accumulators.
const char* linear_s8(const KernelTable&, int64_t M, const S8Rows&, const LinearWeights&, const Output&);

// binarize_x over all rows; bits [M][4 * ceil(K/32)].
const char* binarize_rows(const KernelTable&, int64_t M, int64_t K, const StridedRows&, const float* threshold, uint8_t* bits,
                          float* scale);

// Signs x signs: binarises x against w.threshold and counts the bits that differ from 1-bit tiles.
const char* linear_xnor(const KernelTable&, int64_t M, const StridedRows&, const LinearWeights&, const Output&);

// x stays float; weights are expanded a cache block at a time, never as [N,K].
const char* linear_weight_only(const KernelTable&, int64_t M, const StridedRows&, const LinearWeights&, const Output&);

}  // namespace tersor
