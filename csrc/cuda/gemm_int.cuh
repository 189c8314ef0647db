// Codes of 8, 4, 2 or 1 bits x s8 rows on tensor cores, from the tiles as they are stored.
//
// A block makes kRows x (64 * kWarpsN) of C, a warp kWarpRows x 64, in steps of 64 k ("k block": 64 bytes of a row of A).
//
// The order of k inside a k block, and of channels inside the 64 of a warp, is free as long as A and W agree, and is chosen so that
// every access to shared memory is one of 16 bytes without a bank conflict:
//
//   k          lane t owns k = 16t .. 16t+15. One 16-byte load is its part of a row of A for two mma (K = 32 each): word i of it
//              is a[0] (i = 0, 2) or a[2] (i = 1, 3) of mma i/2, and rows g + 8 give a[1], a[3].
//   channels   lane g loads 4 neighbouring channels of a tile at once: quad q = g % 4 of n tile g/4 + 2h, h = 0, 1. Channel c of
//              the quad is column g of mma 4h + c, so that in C a lane holds columns 2t and 2t+1 of it, that is
//
//                 n = 32h + 8t + c  and  32h + 8t + 4 + c,    c = 0..3: 8 neighbouring channels of a row
//
// Group scales may have 32 k to a group, which must not share an mma with others: there lane t owns k = 32s + 8t .. +7, s = 0, 1.
//
// Shared memory, for each of kStages:   A [kRows][64 bytes]      W [n tiles][8 * bits chunks of 16 bytes]
// A tile is 4 chunks (quads), two tiles a line of 128 bytes. The lanes that load together stand lines apart: chunk c of line l lies
// at c ^ swizzle(l).
#pragma once

#include "epilogue.cuh"

namespace tersor::cuda {

struct GemmParams {
  int64_t M, N;
  const uint8_t* a;  // [M] rows of lda bytes, readable up to a_bytes, both multiples of 16, aligned to 16
  int64_t lda, a_bytes;
  const uint8_t* w;        // tiles, aligned to 16
  int64_t tiles_k;         // ceil(K/kt)
  int64_t k_blocks;        // of 64 bytes of a
  int64_t splits, k_unit;  // blockIdx.z takes its share of the k blocks, in units of k_unit: whole groups
  uint32_t* partial;       // null, or [splits][M][N]: what a block has summed goes here, raw
  Epilogue epilogue;
  // Group scales only
  int64_t K, group_size;
  const uint8_t* group_scale;  // [ceil(N/16)][K / group_size][16] float16, aligned to 16
  const int32_t* row_sum_32;   // [M][K/32]
};

constexpr int kBlockK = 64;     // bytes of a row of A in a step
constexpr int kWarpN = 64;      // channels of a warp
constexpr int kStagedRow = 68;  // words of a row of C on its way out: 64 + 4, so that 8 lanes' 16-byte stores meet no bank twice

// What a warp multiplies: codes of kBits, groups of k with scales of their own or not.
template <int kBits_, bool kGrouped_>
struct Codes {
  static constexpr int kBits = kBits_;
  static constexpr bool kGrouped = kGrouped_;
  static constexpr bool kCountsW = false;
  static constexpr int kSteps = 8 / kBits;  // words of four codes in a channel's word
  static TERSOR_DEVICE uint32_t codes(uint32_t word, int step) {
    constexpr uint32_t kMask = 0x01010101u * ((1u << kBits) - 1);
    return word >> kBits * step & kMask;
  }
  static TERSOR_DEVICE void mma(uint32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::mma_s8u8(d, a, b); }
};

template <int kWarpRows_, int kWarpsM_, int kWarpsN_, int kStages_>
struct Shape {
  static constexpr int kWarpRows = kWarpRows_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kStages = kStages_;
  static constexpr int kRows = kWarpRows * kWarpsM, kCols = kWarpN * kWarpsN, kThreads = 32 * kWarpsM * kWarpsN;
};

template <typename P, typename S>
struct Layout {
  static constexpr int kTiles = S::kCols / 16;
  static constexpr int kTileChunks = 8 * P::kBits;  // of an n tile in a k block
  static constexpr int kABytes = S::kRows * kBlockK, kWBytes = kTiles * kTileChunks * 16;
  // Blocks that share a multiprocessor by their registers. Said to ptxas, or it spills to fit a fourth.
  static constexpr int kBlocks = S::kWarpRows == 64 || P::kGrouped ? 2 : 3;
  static constexpr int kStageBytes = kABytes + kWBytes;
  static constexpr int kStagedBytes = S::kWarpsM * S::kWarpsN * S::kWarpRows * kStagedRow * 4;
  static constexpr int kSharedBytes = S::kStages * kStageBytes > kStagedBytes ? S::kStages * kStageBytes : kStagedBytes;

  // Word i of a lane is words of four k number word(t, i) of the k block.
  static TERSOR_DEVICE int word(int t, int i) { return P::kGrouped ? 8 * (i >> 1) + 2 * t + (i & 1) : 4 * t + i; }
  // Chunk q of tile j of an n tile: two tiles a line.
  static TERSOR_DEVICE int chunk(int j, int q) {
    const int line = j >> 1;
    return 8 * line + (((j & 1) * 4 + q) ^ 2 * ((P::kBits == 8 ? line >> 1 : line) & 3));
  }
};

// k block kb into a stage: A rows from m0, W tiles from n tile t0. What does not exist is filled with zeros.
template <typename P, typename S>
TERSOR_DEVICE void fetch(const GemmParams& p, unsigned char* stage, int64_t kb, int64_t m0, int64_t t0) {
  using L = Layout<P, S>;
  const int thread = ptx::thread_index();
#pragma unroll
  for (int i = thread; i < S::kRows * 4; i += S::kThreads) {
    const int64_t m = m0 + i / 4, k = kb * kBlockK + i % 4 * 16;
    const bool valid = m < p.M && k < p.a_bytes;
    ptx::copy_async16(stage + i * 16, valid ? p.a + m * p.lda + k : p.a, valid);
  }
  const int64_t tiles_n = ceil_div(p.N, kTileN), tile0 = kb * (L::kTileChunks / 4);
#pragma unroll
  for (int i = thread; i < L::kTiles * L::kTileChunks; i += S::kThreads) {
    const int nt = i / L::kTileChunks, c = i % L::kTileChunks;
    const int64_t n_tile = t0 + nt, tile = tile0 + c / 4;
    const bool valid = n_tile < tiles_n && tile < p.tiles_k;
    const uint8_t* from = p.w + (valid ? (n_tile * p.tiles_k + tile) * kTileBytes + c % 4 * 16 : 0);
    ptx::copy_async16(stage + L::kABytes + (nt * L::kTileChunks + L::chunk(c / 4, c % 4)) * 16, from, valid);
  }
}

template <typename P, typename S>
struct Accumulators {
  static constexpr int kMmaRows = S::kWarpRows / 16;
  uint32_t acc[kMmaRows][8][4];
  float sum[P::kGrouped ? kMmaRows : 1][8][4];  // over groups
  uint32_t count[P::kCountsW ? 8 : 1];          // set bits of W, column g of each mma, this lane's k
};

// This warp's rows of A, for the two mma of a k block. The 8-byte loads of the grouped order meet each bank twice.
template <typename P, typename S>
TERSOR_DEVICE void load_a(const unsigned char* stage, int warp_m, uint32_t (&a)[2][S::kWarpRows / 16][4]) {
  const int lane = ptx::thread_index() % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < S::kWarpRows / 16; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const unsigned char* row = stage + (warp_m * S::kWarpRows + 16 * i + 8 * r + g) * kBlockK;
      uint4 v;
      if constexpr (P::kGrouped) {
        const uint2 low = ptx::load_shared8(row + 8 * t), high = ptx::load_shared8(row + 32 + 8 * t);
        v = {low.x, low.y, high.x, high.y};
      } else {
        v = ptx::load_shared16(row + 16 * t);
      }
      a[0][i][r] = v.x;
      a[0][i][2 + r] = v.y;
      a[1][i][r] = v.z;
      a[1][i][2 + r] = v.w;
    }
  }
}

// One mma (K = 32) of each of the warp's 16 x 8 blocks.
template <typename P, typename S>
TERSOR_DEVICE void multiply(const unsigned char* stage, int half, int warp_n, const uint32_t (&a)[2][S::kWarpRows / 16][4],
                            Accumulators<P, S>& c) {
  using L = Layout<P, S>;
  const int lane = ptx::thread_index() % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const unsigned char* tiles = stage + L::kABytes + (warp_n * 4 + (g >> 2) + 2 * h) * L::kTileChunks * 16;
    uint32_t b[4][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned word = L::word(t, 2 * half + i), step = word % P::kSteps;
      const uint4 v = ptx::load_shared16(tiles + L::chunk(word / P::kSteps, g & 3) * 16);
      b[0][i] = P::codes(v.x, step);
      b[1][i] = P::codes(v.y, step);
      b[2][i] = P::codes(v.z, step);
      b[3][i] = P::codes(v.w, step);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (P::kCountsW) c.count[4 * h + j] += ptx::popcount(b[j][0]) + ptx::popcount(b[j][1]);
#pragma unroll
      for (int i = 0; i < S::kWarpRows / 16; ++i) P::mma(c.acc[i][4 * h + j], a[half][i], b[j]);
    }
  }
}

// A group is complete: f32(acc_g) * group_scale is added to the sum over groups, and acc begins at 0 again.
template <typename P, typename S>
TERSOR_DEVICE void fold_group(const GemmParams& p, int64_t group, int64_t m0, int64_t n0, Accumulators<P, S>& c) {
  const int lane = ptx::thread_index() % 32, g = lane / 4, t = lane % 4;
  const int64_t groups = p.K / p.group_size, parts = p.group_size / 32, tiles_n = ceil_div(p.N, kTileN);
  float scale[2][8];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t n = n0 + 32 * h + 8 * t;
    uint4 v = {0, 0, 0, 0};
    if (n / 16 < tiles_n) v = ptx::load_global16(p.group_scale + ((n / 16 * groups + group) * 16 + n % 16) * 2);
    const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) scale[h][i] = ptx::from_f16(static_cast<uint16_t>(pairs[i / 2] >> 16 * (i % 2)));
  }
#pragma unroll
  for (int i = 0; i < S::kWarpRows / 16; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t m = m0 + 16 * i + 8 * r + g;
      uint32_t row_sum = 0;
      for (int64_t part = 0; m < p.M && part < parts; ++part) {
        row_sum += static_cast<uint32_t>(p.row_sum_32[m * (p.K / 32) + group * parts + part]);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          uint32_t& acc = c.acc[i][j][2 * r + q];
          const uint32_t repaired = p.epilogue.repair.mul * acc - p.epilogue.repair.row_mul * row_sum;
          const float product = ptx::mul(ptx::to_f32(static_cast<int32_t>(repaired)), scale[j / 4][j % 4 + 4 * q]);
          float& sum = c.sum[i][j][2 * r + q];
          sum = ptx::add(sum, product);
          acc = 0;
        }
      }
    }
  }
}

// Grid: m blocks, n blocks, splits.
template <typename P, typename S>
__global__ void __launch_bounds__(S::kThreads, Layout<P, S>::kBlocks) gemm_int(const __grid_constant__ GemmParams p) {
  using L = Layout<P, S>;
  unsigned char* shared = ptx::shared_memory();
  const int lane = ptx::thread_index() % 32, warp = ptx::thread_index() / 32, g = lane / 4, t = lane % 4;
  const int warp_m = warp / S::kWarpsN, warp_n = warp % S::kWarpsN;
  const int64_t m0 = ptx::block_x() * S::kRows, t0 = ptx::block_y() * L::kTiles, z = ptx::block_z();
  const int64_t units = ceil_div(p.k_blocks, p.k_unit), end = (z + 1) * units / p.splits * p.k_unit;
  const int64_t first = z * units / p.splits * p.k_unit, last = end < p.k_blocks ? end : p.k_blocks;
  const int64_t warp_m0 = m0 + warp_m * S::kWarpRows, warp_n0 = t0 * kTileN + warp_n * kWarpN;

  Accumulators<P, S> c = {};
#pragma unroll
  for (int s = 0; s + 1 < S::kStages; ++s) {
    if (first + s < last) fetch<P, S>(p, shared + s * L::kStageBytes, first + s, m0, t0);
    ptx::copy_async_commit();
  }
  for (int64_t kb = first; kb < last; ++kb) {
    ptx::copy_async_wait<S::kStages - 2>();
    // Behind it all copies of kb are there, and every warp has done with kb - 1, whose stage is filled next.
    ptx::barrier();
    const int64_t next = kb + S::kStages - 1;
    if (next < last) fetch<P, S>(p, shared + (next - first) % S::kStages * L::kStageBytes, next, m0, t0);
    ptx::copy_async_commit();
    const unsigned char* stage = shared + (kb - first) % S::kStages * L::kStageBytes;
    uint32_t a[2][S::kWarpRows / 16][4];
    load_a<P, S>(stage, warp_m, a);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      multiply<P, S>(stage, half, warp_n, a, c);
      if constexpr (P::kGrouped) {
        const int64_t k = kb * kBlockK + 32 * (half + 1);
        if (k <= p.K && k % p.group_size == 0) fold_group<P, S>(p, k / p.group_size - 1, warp_m0, warp_n0, c);
      }
    }
  }
  ptx::copy_async_wait<0>();
  ptx::barrier();

  // Rows of 64 channels in order, in shared memory of the warp's own: registers need a static index, the epilogue does not.
  unsigned char* staged = shared + warp * (S::kWarpRows * kStagedRow * 4);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      uint32_t minus[4] = {};  // popcount(w) of the four channels: summed over the lanes' k, fetched from column 2t + q
      if constexpr (P::kCountsW) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          uint32_t count = c.count[4 * h + j];
          count += ptx::shuffle_xor(count, 1);
          count += ptx::shuffle_xor(count, 2);
          minus[j] = ptx::shuffle(count, 4 * (2 * t + q));
        }
      }
#pragma unroll
      for (int i = 0; i < S::kWarpRows / 16; ++i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          uint32_t v[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if constexpr (P::kGrouped) {
              v[j] = ptx::bits(c.sum[i][4 * h + j][2 * r + q]);
            } else {
              v[j] = c.acc[i][4 * h + j][2 * r + q];
              if constexpr (P::kCountsW) v[j] = 2 * v[j] - minus[j];
            }
          }
          const int row = 16 * i + 8 * r + g, column = 32 * h + 8 * t + 4 * q;
          ptx::store_shared16(staged + (row * kStagedRow + column) * 4, {v[0], v[1], v[2], v[3]});
        }
      }
    }
  }
  ptx::warp_barrier();
  const bool glu = p.epilogue.glu && !p.partial;
  const int quads = glu ? 8 : 16;  // of a row, in y
#pragma unroll 1
  for (int i = lane; i < S::kWarpRows * quads; i += 32) {
    const int row = i / quads, q = i % quads;
    const int64_t m = warp_m0 + row, n = warp_n0 + (glu ? gate_of(4 * q) : 4 * q);
    if (m >= p.M || n >= p.N) continue;
    const unsigned char* from = staged + (row * kStagedRow + (n - warp_n0)) * 4;
    const uint4 v = ptx::load_shared16(from);
    if (p.partial) {
      const uint32_t raw[4] = {v.x, v.y, v.z, v.w};
      for (int j = 0; j < 4 && n + j < p.N; ++j) p.partial[(z * p.M + m) * p.N + n + j] = raw[j];
    } else if (glu) {
      finish_glu<P::kGrouped>(p.epilogue, v, ptx::load_shared16(from + kTileN * 4), m, warp_n0 / 2 + 4 * q, p.N);
    } else {
      finish_four<P::kGrouped>(p.epilogue, v, m, n, p.N);
    }
  }
}

// The parts of a split K of four channels, added in order.
template <bool kFloat>
TERSOR_DEVICE uint4 sum_parts(const GemmParams& p, int64_t m, int64_t n) {
  uint32_t v[4] = {};
  for (int64_t z = 0; z < p.splits; ++z) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (n + j >= p.N) continue;
      const uint32_t part = p.partial[(z * p.M + m) * p.N + n + j];
      v[j] = kFloat ? ptx::bits(ptx::add(ptx::from_bits(v[j]), ptx::from_bits(part))) : v[j] + part;
    }
  }
  return {v[0], v[1], v[2], v[3]};
}

// Finishes them: a thread for four columns of y. Grid: ceil(columns/4 / threads), M.
constexpr int kSumThreads = 128;
template <bool kFloat>
__global__ void __launch_bounds__(kSumThreads) sum_partial(const __grid_constant__ GemmParams p) {
  const int64_t n = (ptx::block_x() * kSumThreads + ptx::thread_index()) * 4, m = ptx::block_y();
  if (p.epilogue.glu) {
    if (n >= p.N / 2) return;
    const int64_t gate = gate_of(n);
    finish_glu<kFloat>(p.epilogue, sum_parts<kFloat>(p, m, gate), sum_parts<kFloat>(p, m, gate + kTileN), m, n, p.N);
  } else {
    if (n >= p.N) return;
    finish_four<kFloat>(p.epilogue, sum_parts<kFloat>(p, m, n), m, n, p.N);
  }
}

}  // namespace tersor::cuda
