// Few rows: codes x s8 (or signs x signs) without tensor cores, bound by reading the weights once. A block makes one n tile of C
// for kRows rows of A, its warps share K; a lane takes 4 channels (quad lane % 4) of every eighth tile, so that a warp reads 8
// tiles of 64 bytes, 512 in a row. With group scales a lane takes whole groups, so that each group's sum stays an integer of one
// lane.
#pragma once

#include "gemm_xnor.cuh"

namespace tersor::cuda {

constexpr int kGemvWarps = 8, kGemvThreads = 32 * kGemvWarps;
template <int kRows>
constexpr int kGemvSharedBytes = kGemvWarps * kRows * 16 * 4;

// The words of a row of A that meet tile j: kSteps of them, 0 from a_bytes on.
template <int kSteps>
TERSOR_DEVICE void load_words(const uint8_t* row, int64_t j, int64_t a_bytes, uint32_t (&words)[kSteps]) {
  if constexpr (kSteps >= 4) {
#pragma unroll
    for (int i = 0; i < kSteps; i += 4) {
      const int64_t at = (j * kSteps + i) * 4;
      uint4 v = {0, 0, 0, 0};
      if (at < a_bytes) v = ptx::load_global16(row + at);
      words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int64_t at = (j * kSteps + i) * 4;
      words[i] = at < a_bytes ? ptx::load_global4(row + at) : 0;
    }
  }
}

// Tile j of one n tile, four channels of it: added to acc.
template <typename P, int kRows>
TERSOR_DEVICE void multiply_tile(const GemmParams& p, const uint8_t* tiles, int64_t j, int64_t m0, uint32_t (&acc)[kRows][4]) {
  const uint4 v = ptx::load_global16_once(tiles + j * kTileBytes);
  const uint32_t channel[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    if (m0 + m >= p.M) continue;
    uint32_t x[P::kSteps];
    load_words<P::kSteps>(p.a + (m0 + m) * p.lda, j, p.a_bytes, x);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int s = 0; s < P::kSteps; ++s) {
        if constexpr (P::kCountsW) {
          acc[m][n] += 2 * ptx::popcount(channel[n] & x[s]) - ptx::popcount(channel[n]);
        } else {
          acc[m][n] = ptx::dot4_u8s8(P::codes(channel[n], s), x[s], acc[m][n]);
        }
      }
    }
  }
}

// Grid: ceil(N/16), ceil(M/kRows). The blocks a multiprocessor is to hold leave ptxas the registers: by itself it spills one for
// more.
template <typename P, int kRows>
__global__ void __launch_bounds__(kGemvThreads, kRows < 4 ? 3 : 2) gemv_int(const __grid_constant__ GemmParams p) {
  unsigned char* shared = ptx::shared_memory();
  const int lane = ptx::thread_index() % 32, warp = ptx::thread_index() / 32;
  const int64_t n_tile = ptx::block_x(), m0 = ptx::block_y() * kRows;
  const int64_t first = 8 * warp + lane / 4;
  const uint8_t* tiles = p.w + n_tile * p.tiles_k * kTileBytes + lane % 4 * 16;
  uint32_t acc[kRows][4] = {};
  if constexpr (P::kGrouped) {
    float sum[kRows][4] = {};
    // K is below 2^18: divided as 32 bits, for 64 are a call that spills a register.
    const auto size = static_cast<uint32_t>(p.group_size);
    const int64_t groups = static_cast<uint32_t>(p.K) / size, parts = size / 32, group_tiles = size / (4 * P::kSteps);
    for (int64_t group = first; group < groups; group += 8 * kGemvWarps) {
      for (int64_t j = 0; j < group_tiles; ++j) multiply_tile<P, kRows>(p, tiles, group * group_tiles + j, m0, acc);
      const auto* scales = reinterpret_cast<const uint16_t*>(p.group_scale) + (n_tile * groups + group) * 16 + lane % 4 * 4;
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        if (m0 + m >= p.M) continue;
        uint32_t row_sum = 0;
        for (int64_t i = 0; i < parts; ++i)
          row_sum += static_cast<uint32_t>(p.row_sum_32[(m0 + m) * (p.K / 32) + group * parts + i]);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const uint32_t repaired = p.epilogue.repair.mul * acc[m][n] - p.epilogue.repair.row_mul * row_sum;
          sum[m][n] = ptx::add(sum[m][n], ptx::mul(ptx::to_f32(static_cast<int32_t>(repaired)), ptx::from_f16(scales[n])));
          acc[m][n] = 0;
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int n = 0; n < 4; ++n) acc[m][n] = ptx::bits(sum[m][n]);
    }
  } else {
#pragma unroll 4
    for (int64_t j = first; j < p.tiles_k; j += 8 * kGemvWarps) multiply_tile<P, kRows>(p, tiles, j, m0, acc);
  }

  auto plus = [](uint32_t a, uint32_t b) {
    return P::kGrouped ? ptx::bits(ptx::add(ptx::from_bits(a), ptx::from_bits(b))) : a + b;
  };
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      uint32_t v = acc[m][n];
      for (int mask = 4; mask < 32; mask *= 2) v = plus(v, ptx::shuffle_xor(v, mask));
      if (lane < 4) ptx::store_shared4(shared + ((warp * kRows + m) * 16 + lane * 4 + n) * 4, v);
    }
  }
  ptx::barrier();
  const int i = ptx::thread_index();
  if (i >= kRows * 16) return;
  const int64_t m = m0 + i / 16, n = n_tile * 16 + i % 16;
  if (m >= p.M || n >= p.N) return;
  uint32_t v = ptx::load_shared4(shared + i * 4);
  for (int w = 1; w < kGemvWarps; ++w) v = plus(v, ptx::load_shared4(shared + (w * kRows * 16 + i) * 4));
  if (p.partial) {  // a gated unit needs two tiles: sum_partial brings them together
    p.partial[m * p.N + n] = v;
    return;
  }
  store_one(p.epilogue, finish<P::kGrouped>(p.epilogue, v, m, n), m, n);
}

}  // namespace tersor::cuda
