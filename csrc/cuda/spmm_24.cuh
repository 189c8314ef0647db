// Weights with two values in every four k (2:4) x s8 rows on sparse tensor cores. Only the first operand of mma.sp can be sparse,
// so the weights are A and what comes out is y transposed, which goes through shared memory on its way.
//
// Weights, 640 bytes for 16 channels x 64 k:
//
//   [ ceil(N/16) ][ ceil(K/64) ][ 32 lanes x 16 bytes of values | 32 lanes x 4 bytes of places ]
//     n tile        k block        registers a[0..3] of mma.sp      its `places`, see ptx.cuh
//
// so that a lane loads its fragments as they lie. A group with fewer than two values holds zeros.
//
// A block makes 128 channels x kRows of C, a warp 32 x kRows, in steps of 64 k. Shared memory, for each of kSparseStages:
//   W [8 n tiles][640 bytes]      x [kRows][64 bytes], chunk c of row r at c ^ (r / 2 % 4): ldmatrix meets no bank twice
#pragma once

#include "gemm_int.cuh"
#include "params.h"

namespace tersor::cuda {

constexpr int kSparseBytes = kBytes24, kSparsePlaces = 512;  // of 16 channels x 64 k, and where their places begin
constexpr int kSparseTiles = 8, kSparseThreads = 128, kSparseStages = 4;
constexpr int kSparseStagedRow = 36;  // words of 32 channels of a row of C: lanes 4 g + t store to bank 8t + g

template <int kRows>
struct SparseLayout {
  static constexpr int kWBytes = kSparseTiles * kSparseBytes, kStageBytes = kWBytes + kRows * kBlockK;
  static constexpr int kStagedBytes = 4 * kRows * kSparseStagedRow * 4;
  static constexpr int kSharedBytes = kSparseStages * kStageBytes > kStagedBytes ? kSparseStages * kStageBytes : kStagedBytes;
};

template <int kRows>
TERSOR_DEVICE void fetch_sparse(const GemmParams& p, unsigned char* stage, int64_t kb, int64_t m0, int64_t t0) {
  using L = SparseLayout<kRows>;
  const int64_t tiles_n = ceil_div(p.N, kTileN);
  constexpr int kChunks = kSparseBytes / 16;
#pragma unroll
  for (int i = ptx::thread_index(); i < kSparseTiles * kChunks; i += kSparseThreads) {
    // Past the last n tile that one again: its products are not stored, and zeros would be places that mma.sp must not see.
    const int64_t wanted = t0 + i / kChunks, n_tile = wanted < tiles_n ? wanted : tiles_n - 1;
    ptx::copy_async16(stage + i * 16, p.w + (n_tile * p.tiles_k + kb) * kSparseBytes + i % kChunks * 16, true);
  }
#pragma unroll
  for (int i = ptx::thread_index(); i < kRows * 4; i += kSparseThreads) {
    const int row = i / 4, chunk = i % 4;
    const int64_t m = m0 + row, k = kb * kBlockK + chunk * 16;
    const bool valid = m < p.M && k < p.a_bytes;
    ptx::copy_async16(stage + L::kWBytes + (row * 4 + (chunk ^ (row / 2 % 4))) * 16, valid ? p.a + m * p.lda + k : p.a, valid);
  }
}

// Grid: m blocks, n blocks, splits; kSparseThreads. tiles_k of the parameters counts blocks of 64 k.
template <int kRows>
__global__ void __launch_bounds__(kSparseThreads, 3) spmm_24(const __grid_constant__ GemmParams p) {
  using L = SparseLayout<kRows>;
  unsigned char* shared = ptx::shared_memory();
  const int lane = ptx::thread_index() % 32, warp = ptx::thread_index() / 32, g = lane / 4, t = lane % 4;
  const int64_t m0 = ptx::block_x() * kRows, t0 = ptx::block_y() * kSparseTiles, z = ptx::block_z();
  const int64_t first = z * p.k_blocks / p.splits, last = (z + 1) * p.k_blocks / p.splits;

  uint32_t acc[2][kRows / 8][4] = {};
#pragma unroll
  for (int s = 0; s + 1 < kSparseStages; ++s) {
    if (first + s < last) fetch_sparse<kRows>(p, shared + s * L::kStageBytes, first + s, m0, t0);
    ptx::copy_async_commit();
  }
  for (int64_t kb = first; kb < last; ++kb) {
    ptx::copy_async_wait<kSparseStages - 2>();
    // As in gemm_int: the copies of kb are there, and every warp has done with the stage that is filled next.
    ptx::barrier();
    const int64_t next = kb + kSparseStages - 1;
    if (next < last) fetch_sparse<kRows>(p, shared + (next - first) % kSparseStages * L::kStageBytes, next, m0, t0);
    ptx::copy_async_commit();
    const unsigned char* stage = shared + (kb - first) % kSparseStages * L::kStageBytes;
    uint32_t a[2][4], places[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned char* tile = stage + (2 * warp + i) * kSparseBytes;
      const uint4 v = ptx::load_shared16(tile + lane * 16);
      a[i][0] = v.x, a[i][1] = v.y, a[i][2] = v.z, a[i][3] = v.w;
      places[i] = ptx::load_shared4(tile + kSparsePlaces + lane * 4);
    }
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      const int row = 8 * j + lane % 8;  // whose chunk lane / 8 this lane names
      uint32_t b[4];
      ptx::load_matrices(b, stage + L::kWBytes + (row * 4 + (lane / 8 ^ (row / 2 % 4))) * 16);
#pragma unroll
      for (int i = 0; i < 2; ++i) ptx::mma_sparse_s8s8(acc[i][j], a[i], b, places[i]);
    }
  }
  ptx::copy_async_wait<0>();
  ptx::barrier();

  unsigned char* staged = shared + warp * (kRows * kSparseStagedRow * 4);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = 8 * j + 2 * t + r % 2, channel = 16 * i + 8 * (r / 2) + g;
        ptx::store_shared4(staged + (row * kSparseStagedRow + channel) * 4, acc[i][j][r]);
      }
    }
  }
  ptx::warp_barrier();
#pragma unroll 1
  for (int i = lane; i < kRows * 8; i += 32) {
    const int64_t m = m0 + i / 8, n = t0 * kTileN + warp * 32 + i % 8 * 4;
    if (m >= p.M || n >= p.N) continue;
    const uint4 v = ptx::load_shared16(staged + (i / 8 * kSparseStagedRow + i % 8 * 4) * 4);
    if (p.partial) {
      const uint32_t raw[4] = {v.x, v.y, v.z, v.w};
      for (int j = 0; j < 4 && n + j < p.N; ++j) p.partial[(z * p.M + m) * p.N + n + j] = raw[j];
    } else {
      finish_four<false>(p.epilogue, v, m, n, p.N);
    }
  }
}

}  // namespace tersor::cuda
