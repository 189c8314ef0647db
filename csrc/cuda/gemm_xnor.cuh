// Signs x signs on tensor cores: bits of w and x as they are stored, popcount(w and x) by mma. The GEMM of gemm_int.cuh, with 32
// signs in the place of four codes: a 1-bit tile is a tile of 32-bit words as an 8-bit one is, "64 k" are 512.
//
// K - 2 popcount(w xor x) = K - 2 (popcount(w) + popcount(x)) + 4 popcount(w and x). popcount(x) comes from the binariser in the
// place of row_sum, popcount(w) is counted from the fragments. AND, since XOR takes two instructions on sm_90.
// sm_100 and up emulate both: there x becomes rows of -1 and +1, which Codes<1> multiplies with the same tiles (signs_as_int8).
#pragma once

#include "gemm_int.cuh"
#include "params.h"

namespace tersor::cuda {

struct Signs {
  static constexpr int kBits = 8;  // a channel's word is multiplied as it is
  static constexpr bool kGrouped = false, kCountsW = true;
  static constexpr int kSteps = 1;
  static TERSOR_DEVICE uint32_t codes(uint32_t word, int) { return word; }
  static TERSOR_DEVICE void mma(uint32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::mma_and_popcount(d, a, b);
  }
};

constexpr int kBinarizeThreads = 64;  // one for each of the partial sums that numerics.md prescribes
constexpr int kBinarizeSharedBytes = kBinarizeThreads * 4 + 16;

// Bit k of a word to bit 8b + j, k = 4j + b: the steps of csrc/cpu/binarize_x.inl.
TERSOR_DEVICE uint32_t exchange(uint32_t word, int distance, uint32_t mask) {
  const uint32_t differ = (word >> distance ^ word) & mask;
  return word ^ differ ^ differ << distance;
}
TERSOR_DEVICE uint32_t to_tile_order(uint32_t word) {
  word = exchange(word, 3, 0x0a0a0a0au);
  word = exchange(word, 6, 0x00cc00ccu);
  word = exchange(word, 12, 0x0000f0f0u);
  return exchange(word, 8, 0x0000ff00u);
}

// Grid [M], kBinarizeThreads, kBinarizeSharedBytes.
__global__ void __launch_bounds__(kBinarizeThreads) binarize_rows(BinarizeParams p) {
  unsigned char* shared = ptx::shared_memory();
  const int thread = ptx::thread_index(), warp = thread / 32, lane = thread % 32;
  const int64_t m = ptx::block_x();
  const float share = ptx::div(1.0f, static_cast<float>(p.K));
  uint32_t* bits = p.bits ? p.bits + m * p.ld_words : nullptr;
  int8_t* signs = p.signs ? p.signs + m * p.ld_words * 32 : nullptr;
  float sum = 0.0f;
  uint32_t count = 0;
  bool finite = true;
#pragma unroll 4
  for (int64_t word = warp; word < p.ld_words; word += 2) {
    const int64_t k = 32 * word + lane;
    bool positive = false;
    if (k < p.K) {
      const float v = load_as(p.x, p.dtype, m * p.stride_m + k * p.stride_k), limit = p.threshold[k];
      positive = v >= limit;
      finite = finite && (ptx::bits(v) & 0x7fffffffu) < 0x7f800000u;
      sum = ptx::add(sum, ptx::mul(ptx::from_bits(ptx::bits(ptx::sub(v, limit)) & 0x7fffffffu), share));
    }
    const uint32_t natural = ptx::ballot(positive);
    count += ptx::popcount(natural);
    if (signs) signs[k] = static_cast<int8_t>(k >= p.K ? 0 : positive ? 1 : -1);
    if (bits && lane == 0) bits[word] = to_tile_order(natural);
  }
  const bool warp_finite = ptx::ballot(!finite) == 0;
  ptx::store_shared4(shared + thread * 4, ptx::bits(sum));
  if (lane == 0) {
    ptx::store_shared4(shared + 256 + warp * 8, warp_finite);
    ptx::store_shared4(shared + 260 + warp * 8, count);
  }
  ptx::barrier();
  const bool all_finite = (ptx::load_shared4(shared + 256) & ptx::load_shared4(shared + 264)) != 0;
  if (!all_finite) {
    for (int64_t word = thread; bits && word < p.ld_words; word += kBinarizeThreads) bits[word] = 0;
    for (int64_t k = thread; signs && k < 32 * p.ld_words; k += kBinarizeThreads) signs[k] = 0;
  }
  if (warp != 0) return;
  // The 64 sums in a tree: runs of 16 first, then halves.
  const int i = lane % 16;
  auto at = [&](int j) { return ptx::from_bits(ptx::load_shared4(shared + j * 4)); };
  float v = ptx::add(ptx::add(at(i), at(16 + i)), ptx::add(at(32 + i), at(48 + i)));
  for (int half = 8; half > 0; half /= 2) v = ptx::add(v, ptx::from_bits(ptx::shuffle_xor(ptx::bits(v), half)));
  if (lane == 0) {
    p.scale[m] = all_finite ? v : ptx::from_bits(0x7fc00000u);
    if (p.popcount) {
      const uint32_t bits_set = ptx::load_shared4(shared + 260) + ptx::load_shared4(shared + 268);
      const uint32_t all = p.signs ? 2 * bits_set - static_cast<uint32_t>(p.K) : bits_set;
      p.popcount[m] = static_cast<int32_t>(all_finite ? all : 0u);
    }
  }
}

}  // namespace tersor::cuda
