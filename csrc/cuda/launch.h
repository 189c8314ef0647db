// The CUDA kernels as plain functions: pointers are device memory, work is put on a stream, nothing waits and nothing is allocated.
// Every function returns 0 or a cudaError_t; error_text() says what to do about it.
#pragma once

#include <cstddef>

#include "../core/kernel_table.h"

namespace tersor::cuda {

enum class Width : int32_t { bits1 = 1, bits2 = 2, bits4 = 4, bits8 = 8, signs = 16, sparse24 = 24 };
enum class Kernel : int32_t { gemv1, gemv2, gemv4, gemv8, small, medium, large };

// What a launch depends on of the GPU.
struct Gpu {
  int sm;  // compute capability, 10 * major + minor
  int multiprocessors;
};

// From sm_100 on the binary mma is emulated by eight int8 ones (docs/cuda.md): signs are multiplied as s8 rows by 1-bit codes.
inline bool signs_as_int8(const Gpu& gpu) { return gpu.sm >= 100; }

// How a layer is computed.
struct Plan {
  Kernel kernel;
  int64_t splits;           // of K
  int64_t workspace_bytes;  // for their parts, and for what a gated unit brings together
};

// The first row that holds decides. Multiprocessors with 100 KiB of shared memory (8.6, 8.9, 12.x) would hold a single block of
// `large`, which asks for 68.
struct PlanRow {
  int sm_from, sm_to;
  int64_t most_rows;  // M up to this
  int64_t least_k;    // K from this on
  bool fills;         // only where its blocks leave no multiprocessor idle
  Kernel kernel;
};
inline constexpr int64_t kAnyRows = INT64_MAX;
inline constexpr PlanRow kPlanRows[] = {
    {0, 999, 1, 0, false, Kernel::gemv1},          {0, 999, 2, 0, false, Kernel::gemv2},
    {0, 999, 4, 0, false, Kernel::gemv4},          {0, 999, 8, 0, false, Kernel::gemv8},
    {0, 999, 16, 0, false, Kernel::small},         {0, 999, 64, 0, false, Kernel::medium},
    {80, 80, kAnyRows, 256, true, Kernel::large},  {87, 87, kAnyRows, 256, true, Kernel::large},
    {90, 119, kAnyRows, 256, true, Kernel::large}, {0, 999, kAnyRows, 0, false, Kernel::medium}};
inline constexpr int64_t plan_rows_of(Kernel k) { return k == Kernel::small ? 16 : k == Kernel::medium ? 64 : 128; }

// 8 rows of fewer bits would wait for dp4a (256 MAC a clock and multiprocessor), of signs for popcount (512), not for memory: A100
// and H100 read up to 14.5 bytes of weights in that clock, 58 codes of 2 bits.
inline bool worth_gemv8(Width width) { return width == Width::bits8 || width == Width::bits4; }

// grouped: scales of groups of K; glu: gate and up tiles in turn.
inline Plan plan(const Gpu& gpu, int64_t M, int64_t N, int64_t K, Width width, bool grouped, bool glu) {
  const bool sparse = width == Width::sparse24;
  const int64_t columns = ceil_div(N, 128);
  Kernel kernel = Kernel::medium;
  for (const PlanRow& row : kPlanRows) {
    if (gpu.sm < row.sm_from || gpu.sm > row.sm_to || M > row.most_rows || K < row.least_k) continue;
    if (sparse && row.kernel != Kernel::small && row.kernel != Kernel::medium) continue;
    if (row.kernel == Kernel::gemv8 && !worth_gemv8(width)) continue;
    if (grouped && row.kernel == Kernel::large) continue;  // two sets of accumulators would not fit the registers
    if (row.fills && ceil_div(M, plan_rows_of(row.kernel)) * columns < gpu.multiprocessors) continue;
    kernel = row.kernel;
    break;
  }
  const int64_t part_bytes = M * N * 4;
  if (kernel <= Kernel::gemv8) return {kernel, 1, glu ? part_bytes : 0};
  // Blocks that leave multiprocessors idle share K, down to 8 k blocks each: below that the parts cost more than they save.
  const int64_t blocks = ceil_div(M, plan_rows_of(kernel)) * columns;
  const int64_t k_blocks = ceil_div(width == Width::signs ? ceil_div(K, 8) : K, 64);
  int64_t splits = blocks < gpu.multiprocessors && blocks > 0 ? gpu.multiprocessors / blocks : 1;
  if (splits > k_blocks / 8) splits = k_blocks / 8;
  if (splits > 16) splits = 16;
  if (splits < 2) return {kernel, 1, 0};
  return {kernel, splits, splits * part_bytes};
}

// One layer on rows that are quantised or binarised already.
struct LinearCall {
  int64_t M, N, K;
  Width width;
  const void* rows;  // [M] s8 rows or rows of bits, ld_rows bytes apart; address and ld_rows multiples of 16, readable up to the
  int64_t ld_rows;   //     next multiple of 16; what stands past K meets code 0
  const int32_t* row_sum;        // [M] sum of q, or set bits of the row
  const float* scale;            // [M]; may be null where y is s32
  const uint8_t* weight_packed;  // tiles, or blocks of spmm_24.cuh; address a multiple of 16
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
  bool glu;  // y is [M][N/2], see Epilogue; no residual, no groups
};

using Stream = void*;  // cudaStream_t

int quantize(const struct QuantizeParams&, Stream);
int binarize(const struct BinarizeParams&, Stream);
int normalize(const struct NormParams&, Stream);
int linear(const LinearCall&, const Plan&, Stream);

// Makes `device` the current one of this library's CUDA runtime, which is not torch's, and says what it is.
int use_device(int device, Gpu* gpu);
const char* error_text(int error);

}  // namespace tersor::cuda
