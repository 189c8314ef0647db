// Which kernel runs, in which shape, and with which grid: everything about a launch but the launch itself, which launch.cu and the
// emulator provide as `launch(kernel, grid, threads, shared_bytes, params)`.
#pragma once

#include "gemv_int.cuh"
#include "launch.h"
#include "norm_quantize.cuh"
#include "spmm_24.cuh"

namespace tersor::cuda {

struct Grid {
  int64_t x, y, z;
};

using Small = Shape<16, 1, 2, 6>;   // 16 x 128 of C; weights are what it waits for, so many stages
using Medium = Shape<32, 2, 2, 4>;  // 64 x 128
using Large = Shape<64, 2, 2, 4>;   // 128 x 128

template <typename Launch>
int run_quantize(const QuantizeParams& p, Launch launch) {
  if (p.M == 0) return 0;
  int64_t threads = round_up(ceil_div(p.width, 4), 32);
  threads = threads < 32 ? 32 : threads > kQuantizeThreads ? kQuantizeThreads : threads;
  return launch(quantize_rows, Grid{p.M, 1, 1}, static_cast<int>(threads), kQuantizeSharedBytes, p);
}

template <typename Launch>
int run_binarize(const BinarizeParams& p, Launch launch) {
  if (p.M == 0) return 0;
  return launch(binarize_rows, Grid{p.M, 1, 1}, kBinarizeThreads, kBinarizeSharedBytes, p);
}

template <typename Launch>
int run_norm(const NormParams& p, Launch launch) {
  if (p.M == 0) return 0;
  return launch(norm_quantize, Grid{p.M, 1, 1}, kNormThreads, kNormSharedBytes, p);
}

// What is left to do once the parts are there.
template <bool kFloat, typename Launch>
int run_sum(int error, const GemmParams& p, Launch launch) {
  if (error || !p.partial) return error;
  const int64_t columns = p.epilogue.glu ? p.N / 2 : p.N;
  return launch(sum_partial<kFloat>, Grid{ceil_div(columns, 4 * kSumThreads), p.M, 1}, kSumThreads, 0, p);
}

template <typename P, typename S, typename Launch>
int run_gemm(const GemmParams& p, Launch launch) {
  const Grid grid{ceil_div(p.M, S::kRows), ceil_div(p.N, S::kCols), p.splits};
  return run_sum<P::kGrouped>(launch(gemm_int<P, S>, grid, S::kThreads, Layout<P, S>::kSharedBytes, p), p, launch);
}

template <int kRows, typename Launch>
int run_sparse(const GemmParams& p, Launch launch) {
  const Grid grid{ceil_div(p.M, kRows), ceil_div(p.N, kSparseTiles * kTileN), p.splits};
  return run_sum<false>(launch(spmm_24<kRows>, grid, kSparseThreads, SparseLayout<kRows>::kSharedBytes, p), p, launch);
}

template <typename P, int kRows, typename Launch>
int run_gemv(const GemmParams& p, Launch launch) {
  const Grid grid{ceil_div(p.N, kTileN), ceil_div(p.M, kRows), 1};
  return run_sum<P::kGrouped>(launch(gemv_int<P, kRows>, grid, kGemvThreads, kGemvSharedBytes<kRows>, p), p, launch);
}

template <typename P, typename Launch>
int run_kernel(Kernel kernel, const GemmParams& p, Launch launch) {
  switch (kernel) {
    case Kernel::gemv1:
      return run_gemv<P, 1>(p, launch);
    case Kernel::gemv2:
      return run_gemv<P, 2>(p, launch);
    case Kernel::gemv4:
      return run_gemv<P, 4>(p, launch);
    case Kernel::gemv8:
      if constexpr (P::kSteps <= 2 && !P::kCountsW) return run_gemv<P, 8>(p, launch);
      break;  // worth_gemv8
    case Kernel::small:
      return run_gemm<P, Small>(p, launch);
    case Kernel::medium:
      return run_gemm<P, Medium>(p, launch);
    case Kernel::large:
      // Two sets of accumulators would not fit the registers: plan() never asks for it.
      if constexpr (!P::kGrouped) return run_gemm<P, Large>(p, launch);
      break;
  }
  return -1;
}

// Fills GemmParams from the call and runs it.
template <typename Launch>
int run_linear(const LinearCall& call, const Plan& plan, Launch launch) {
  if (call.M == 0 || call.N == 0) return 0;
  const bool signs = call.width == Width::signs, sparse = call.width == Width::sparse24;
  const int bits = signs ? 1 : sparse ? 8 : static_cast<int>(call.width);
  const int64_t a_row = signs ? ceil_div(call.K, 32) * 4 : call.K;
  GemmParams p{};
  p.M = call.M;
  p.N = call.N;
  p.a = static_cast<const uint8_t*>(call.rows);
  p.lda = call.ld_rows;
  p.a_bytes = round_up(a_row, 16);
  p.w = call.weight_packed;
  p.k_blocks = ceil_div(a_row, kBlockK);
  p.tiles_k = sparse ? p.k_blocks : ceil_div(call.K, tile_k(bits));
  p.splits = plan.splits;
  p.k_unit = 1;
  while (call.group_scale && p.k_unit * kBlockK % call.group_size != 0 && p.k_unit < p.k_blocks) ++p.k_unit;
  p.partial = plan.workspace_bytes > 0 ? static_cast<uint32_t*>(call.workspace) : nullptr;
  const Repair codes{1u << code_shift(bits), 1u << offset_shift(bits), 0}, xnor{2, 2, static_cast<uint32_t>(call.K)}, none{1, 0, 0};
  Epilogue& e = p.epilogue;
  e.repair = signs ? xnor : sparse ? none : codes;
  e.row_sum = call.row_sum;
  e.scale = call.scale;
  e.weight_scale = call.weight_scale;
  e.bias = call.bias;
  e.residual = call.residual;
  e.y = call.y;
  e.ldr = call.ld_residual;
  e.ldy = call.ldy;
  e.bias_dtype = call.bias_dtype;
  e.y_dtype = call.y_dtype;
  e.activation = call.activation;
  e.glu = call.glu;
  p.K = call.K;
  p.group_size = call.group_size;
  p.group_scale = call.group_scale;
  p.row_sum_32 = call.row_sum_32;
  switch (call.width) {
    case Width::bits8:
      return run_kernel<Codes<8, false>>(plan.kernel, p, launch);
    case Width::bits4:
      if (call.group_scale) return run_kernel<Codes<4, true>>(plan.kernel, p, launch);
      return run_kernel<Codes<4, false>>(plan.kernel, p, launch);
    case Width::bits2:
      return run_kernel<Codes<2, false>>(plan.kernel, p, launch);
    case Width::bits1:
      return run_kernel<Codes<1, false>>(plan.kernel, p, launch);
    case Width::signs:
      return run_kernel<Signs>(plan.kernel, p, launch);
    case Width::sparse24:
      return plan.kernel == Kernel::small ? run_sparse<16>(p, launch) : run_sparse<64>(p, launch);
  }
  return -1;
}

}  // namespace tersor::cuda
