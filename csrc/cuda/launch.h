// The CUDA kernels as plain functions: pointers are device memory, work is put on a stream, nothing waits and nothing is allocated.
// Every function returns 0 or a cudaError_t; error_text() says what to do about it.
#pragma once

#include <cstddef>

#include "../core/kernel_table.h"

namespace tersor::cuda {

enum class Width : int32_t { bits1 = 1, bits2 = 2, bits4 = 4, bits8 = 8, signs = 16 };
enum class Kernel : int32_t { gemv1, gemv2, gemv4, small, medium, large };

// How a layer is computed; depends on nothing but the shape and the number of multiprocessors.
struct Plan {
  Kernel kernel;
  int64_t splits;           // of K
  int64_t workspace_bytes;  // for their parts
};

inline Plan plan(int multiprocessors, int64_t M, int64_t N, int64_t K, bool signs, bool grouped) {
  if (M <= 4) return {M == 1 ? Kernel::gemv1 : M == 2 ? Kernel::gemv2 : Kernel::gemv4, 1, 0};
  const int64_t columns = ceil_div(N, 128);
  const bool large = !grouped && M > 64 && ceil_div(M, 128) * columns >= multiprocessors;
  const Kernel kernel = M <= 16 ? Kernel::small : large ? Kernel::large : Kernel::medium;
  const int64_t rows = kernel == Kernel::small ? 16 : kernel == Kernel::medium ? 64 : 128;
  // Blocks that leave multiprocessors idle share K, down to 8 k blocks each: below that the parts cost more than they save.
  const int64_t blocks = ceil_div(M, rows) * columns, k_blocks = ceil_div(signs ? ceil_div(K, 8) : K, 64);
  int64_t splits = blocks < multiprocessors && blocks > 0 ? multiprocessors / blocks : 1;
  if (splits > k_blocks / 8) splits = k_blocks / 8;
  if (splits > 16) splits = 16;
  if (splits < 2) return {kernel, 1, 0};
  return {kernel, splits, splits * M * N * 4};
}

// One layer on rows that are quantised or binarised already.
struct LinearCall {
  int64_t M, N, K;
  Width width;
  const void* rows;  // [M] s8 rows or rows of bits, ld_rows bytes apart; address and ld_rows multiples of 16, readable up to the
  int64_t ld_rows;   //     next multiple of 16; what stands past K meets code 0
  const int32_t* row_sum;        // [M] sum of q, or set bits of the row
  const float* scale;            // [M]; may be null where y is s32
  const uint8_t* weight_packed;  // tiles, address a multiple of 16
  const float* weight_scale;     // [N]
  const void* bias;              // [N] or null
  const void* residual;          // [M][ld_residual] of y_dtype or null
  int64_t ld_residual;
  const uint8_t* group_scale;  // bits4: [ceil(N/16)][K / group_size][32], address a multiple of 16; or null
  int64_t group_size;
  const int32_t* row_sum_32;  // [M][K/32] where there are groups
  void* workspace;            // workspace_bytes of the plan
  void* y;                    // [M][ldy]
  int64_t ldy;
  Dtype bias_dtype, y_dtype;
  Activation activation;
};

using Stream = void*;  // cudaStream_t

int quantize(const struct QuantizeParams&, Stream);
int binarize(const struct BinarizeParams&, Stream);
int linear(const LinearCall&, const Plan&, Stream);
int multiprocessors(int device, int* count);
const char* error_text(int error);

}  // namespace tersor::cuda
