// What is done between layers, over the kernel table: a norm whose result is needed as int8 rows, and layers with rows on either
// side. Each returns null, or a message when memory ran out.
#pragma once

#include "linear.h"

namespace tersor {

struct Norm {
  int64_t K;
  const void* weight;  // [K] or null
  Dtype weight_dtype;
  const void* bias;  // [K] or null
  Dtype bias_dtype;
  float eps;
  bool rms;
};

// Int8 rows that are written: [M][K] contiguous.
struct S8Output {
  int8_t* q;
  float* scale;
  int32_t* row_sum;
};

// norm_quantize_x over all rows; residual.x null: none. sum, y: [M][K] contiguous in the dtype of x, or null.
const char* norm_quantize(const KernelTable&, int64_t M, const Rows& x, const Rows& residual, const Norm&, const S8Output&,
                          void* sum, void* y);

// linear_dynamic or linear_s8 without a residual, the result rounded to `dtype` and quantised: rows of N, of N/2 with w.glu.
const char* linear_quantize(const KernelTable&, int64_t M, const StridedRows&, const LinearWeights&, Dtype, const S8Output&);
const char* linear_quantize(const KernelTable&, int64_t M, const S8Rows&, const LinearWeights&, Dtype, const S8Output&);

}  // namespace tersor
