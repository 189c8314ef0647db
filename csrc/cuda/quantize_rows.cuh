// Float rows to s8 rows: the formula of QuantizeArgs in core/kernel_table.h, a block for each row. The second pass over the row
// finds it in L1 or L2. Bytes: K * dtype (+ K * dtype from cache) read, K written.
#pragma once

#include "epilogue.cuh"
#include "params.h"

namespace tersor::cuda {

constexpr float kTinyAbsmax = 7.888609052210118e-31f;  // 2^-100
constexpr uint32_t kInfBits = 0x7f800000u;
constexpr uint32_t kNanBits = 0x7fc00000u;

// Over all threads of the block; `slots` holds a word for each warp. Every thread gets the result.
template <typename F>
TERSOR_DEVICE uint32_t reduce_block(uint32_t v, unsigned char* slots, F combine) {
  for (int mask = 16; mask > 0; mask /= 2) v = combine(v, ptx::shuffle_xor(v, mask));
  const int warps = ptx::threads() / 32;
  if (ptx::thread_index() % 32 == 0) ptx::store_shared4(slots + ptx::thread_index() / 32 * 4, v);
  ptx::barrier();
  v = ptx::load_shared4(slots);
  for (int w = 1; w < warps; ++w) v = combine(v, ptx::load_shared4(slots + w * 4));
  return v;
}

constexpr int kQuantizeThreads = 256;  // at most
constexpr int kQuantizeSharedBytes = 2 * kQuantizeThreads / 32 * 4;

// Four neighbouring elements; 0 past K. kWhole: the four are one aligned 16- or 8-byte word.
template <bool kWhole>
TERSOR_DEVICE void load_four(const QuantizeParams& p, int64_t m, int64_t k, float (&v)[4]) {
  const int64_t at = m * p.stride_m + k * p.stride_k;
  if (kWhole && k + 4 <= p.K) {
    if (p.dtype == Dtype::f32) {
      const uint4 w = *reinterpret_cast<const uint4*>(static_cast<const float*>(p.x) + at);
      v[0] = ptx::from_bits(w.x), v[1] = ptx::from_bits(w.y), v[2] = ptx::from_bits(w.z), v[3] = ptx::from_bits(w.w);
    } else {
      const uint2 w = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(p.x) + at);
      const uint32_t half[4] = {w.x & 0xffffu, w.x >> 16, w.y & 0xffffu, w.y >> 16};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto h = static_cast<uint16_t>(half[i]);
        v[i] = p.dtype == Dtype::bf16 ? ptx::from_bf16(h) : ptx::from_f16(h);
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = k + i < p.K ? load_as(p.x, p.dtype, at + i * p.stride_k) : 0.0f;
}

template <bool kWhole>
TERSOR_DEVICE void quantize_row(const QuantizeParams& p) {
  const int64_t m = ptx::block_x();
  const int lane = ptx::thread_index() % 32, warp = ptx::thread_index() / 32;
  const int64_t first = 128 * warp, step = 4 * ptx::threads();  // a warp takes 128 neighbouring k
  unsigned char* shared = ptx::shared_memory();

  // Sign-cleared floats order like integers, NaN and inf on top.
  uint32_t row_bits = 0;
  for (int64_t k = first + 4 * lane; k < p.K; k += step) {
    float v[4];
    load_four<kWhole>(p, m, k, v);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t b = ptx::bits(v[i]) & 0x7fffffffu;
      row_bits = b > row_bits ? b : row_bits;
    }
  }
  row_bits = reduce_block(row_bits, shared, [](uint32_t a, uint32_t b) { return a > b ? a : b; });

  bool finite = row_bits < kInfBits;
  if (p.absmax) row_bits = ptx::bits(p.absmax[m]) & 0x7fffffffu;
  if (p.input_scale) row_bits = ptx::bits(*p.input_scale) & 0x7fffffffu;
  finite = finite && row_bits < kInfBits;
  const float limit = ptx::from_bits(row_bits);
  const bool some = finite && limit >= kTinyAbsmax;
  const float inverse = some ? ptx::div(p.input_scale ? 1.0f : 127.0f, limit) : 0.0f;

  uint32_t sum = 0;
  const bool whole_q = p.ldq % 4 == 0 && reinterpret_cast<uintptr_t>(p.q) % 4 == 0;
  for (int64_t base = first; base < p.width; base += step) {
    const int64_t k = base + 4 * lane;
    uint32_t packed = 0, part = 0;
    if (some && k < p.K) {
      float v[4];
      load_four<kWhole>(p, m, k, v);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float f = ptx::mul(v[i], inverse);
        f = f < -127.0f ? -127.0f : f > 127.0f ? 127.0f : f;  // in float: large values stay large
        const auto code = static_cast<uint32_t>(ptx::round_to_int(f));
        packed |= (code & 255u) << 8 * i;
        part += code;
      }
    }
    int8_t* q = p.q + m * p.ldq + k;
    if (whole_q && k + 4 <= p.width) {
      *reinterpret_cast<uint32_t*>(q) = packed;
    } else {
      for (int i = 0; i < 4 && k + i < p.width; ++i) q[i] = static_cast<int8_t>(packed >> 8 * i);
    }
    sum += part;
    if (p.row_sum_32) {
      for (int mask = 1; mask < 8; mask *= 2) part += ptx::shuffle_xor(part, mask);  // 8 lanes hold 32 k
      if (lane % 8 == 0 && k < p.K) p.row_sum_32[m * ceil_div(p.K, 32) + k / 32] = static_cast<int32_t>(part);
    }
  }
  sum = reduce_block(sum, shared + kQuantizeSharedBytes / 2, [](uint32_t a, uint32_t b) { return a + b; });
  if (ptx::thread_index() == 0) {
    p.row_sum[m] = static_cast<int32_t>(sum);
    const float scale = some ? (p.input_scale ? limit : ptx::mul(limit, 1.0f / 127.0f)) : 0.0f;
    p.scale[m] = finite ? scale : ptx::from_bits(kNanBits);
  }
}

// Grid [M], 32 to kQuantizeThreads threads, kQuantizeSharedBytes.
__global__ void __launch_bounds__(kQuantizeThreads) quantize_rows(QuantizeParams p) {
  const int64_t element = p.dtype == Dtype::f32 ? 4 : 2;
  const bool whole = p.stride_k == 1 && p.stride_m % 4 == 0 && reinterpret_cast<uintptr_t>(p.x) % (4 * element) == 0;
  if (whole) {
    quantize_row<true>(p);
  } else {
    quantize_row<false>(p);
  }
}

}  // namespace tersor::cuda
