// Layer and RMS norm to s8 rows: the formula and the order of the sums of NormArgs in core/kernel_table.h, so the bits are those of
// the CPU kernels. A block of 64 threads for each row, a thread for each of the 64 sums; of the three passes over a row the last
// two find it in L1 or L2. Bytes: K * dtype read (twice with a residual), K written, K * dtype more for each of sum and y.
#pragma once

#include "quantize_rows.cuh"

namespace tersor::cuda {

constexpr int kNormThreads = 64;
constexpr float kLeastSpread = 0.125f;                   // as in csrc/cpu/norm_quantize.inl
constexpr int kNormSharedBytes = kNormThreads * 4 + 16;  // the sums, and a word for each warp in two reductions

TERSOR_DEVICE float rounded(float v, Dtype dtype) {
  if (dtype == Dtype::bf16) return ptx::from_bf16(ptx::to_bf16(v));
  return dtype == Dtype::f16 ? ptx::from_f16(ptx::to_f16(v)) : v;
}
TERSOR_DEVICE void store_as(void* to, Dtype dtype, int64_t i, float v) {
  if (dtype == Dtype::f32) {
    static_cast<float*>(to)[i] = v;
  } else {
    static_cast<uint16_t*>(to)[i] = dtype == Dtype::bf16 ? ptx::to_bf16(v) : ptx::to_f16(v);
  }
}

// The 64 sums of the block in a tree: runs of 16 first, then halves. Every thread gets the result. `slots` are 64 floats.
TERSOR_DEVICE float add_lanes(float v, unsigned char* slots) {
  ptx::barrier();  // behind those who still read the slots
  ptx::store_shared4(slots + ptx::thread_index() * 4, ptx::bits(v));
  ptx::barrier();
  const int i = ptx::thread_index() % 16;
  auto at = [&](int j) { return ptx::from_bits(ptx::load_shared4(slots + j * 4)); };
  float sum = ptx::add(ptx::add(at(i), at(16 + i)), ptx::add(at(32 + i), at(48 + i)));
  for (int half = 8; half > 0; half /= 2) sum = ptx::add(sum, ptx::from_bits(ptx::shuffle_xor(ptx::bits(sum), half)));
  return sum;
}

// Grid [M], kNormThreads, kNormSharedBytes. The blocks of a multiprocessor are said, as for gemv_int: ptxas spills one register by
// itself.
__global__ void __launch_bounds__(kNormThreads, 16) norm_quantize(const __grid_constant__ NormParams p) {
  const int64_t m = ptx::block_x();
  const int thread = ptx::thread_index();
  unsigned char* slots = ptx::shared_memory();
  const float share = ptx::div(1.0f, static_cast<float>(p.K));

  auto input = [&](int64_t k) {
    const float v = load_as(p.x, p.dtype, m * p.stride_m + k * p.stride_k);
    return p.residual ? rounded(ptx::add(v, load_as(p.residual, p.dtype, m * p.ld_residual + k)), p.dtype) : v;
  };
  float sum = 0.0f, square = 0.0f;
  for (int64_t k = thread; k < p.K; k += kNormThreads) {
    const float s = input(k);
    if (p.sum) store_as(p.sum, p.dtype, m * p.K + k, s);
    sum = ptx::add(sum, s);
    square = ptx::fma(s, s, square);
  }
  const float squares = add_lanes(square, slots);
  float inverse, shift = 0.0f;
  if (p.rms) {
    inverse = ptx::div(1.0f, ptx::sqrt(ptx::add(ptx::mul(squares, share), p.eps)));
  } else {
    const float total = add_lanes(sum, slots), mean = ptx::mul(total, share);
    float spread = ptx::sub(squares, ptx::mul(total, mean));
    // Far from 0 little is left of the difference: once more, around the mean. All threads hold the same numbers.
    if (!(spread >= ptx::mul(squares, kLeastSpread))) {
      sum = square = 0.0f;
      for (int64_t k = thread; k < p.K; k += kNormThreads) {
        const float d = ptx::sub(input(k), mean);
        sum = ptx::add(sum, d);
        square = ptx::fma(d, d, square);
      }
      const float around = add_lanes(square, slots), rest = add_lanes(sum, slots);
      spread = ptx::sub(around, ptx::mul(rest, ptx::div(rest, static_cast<float>(p.K))));
      if (!(spread >= 0.0f)) spread = around;
    }
    inverse = ptx::div(1.0f, ptx::sqrt(ptx::add(ptx::mul(spread, share), p.eps)));
    shift = ptx::from_bits(ptx::bits(ptx::mul(mean, inverse)) ^ 0x80000000u);
  }

  auto normed = [&](int64_t k) {
    const float s = input(k), w = p.weight ? load_as(p.weight, p.weight_dtype, k) : 1.0f;
    if (p.rms) return rounded(ptx::mul(ptx::mul(s, inverse), w), p.dtype);
    const float b = p.bias ? load_as(p.bias, p.bias_dtype, k) : 0.0f;
    return rounded(ptx::fma(ptx::fma(s, inverse, shift), w, b), p.dtype);
  };
  uint32_t row_bits = 0;
  for (int64_t k = thread; k < p.K; k += kNormThreads) {
    const float y = normed(k);
    if (p.y) store_as(p.y, p.dtype, m * p.K + k, y);
    const uint32_t b = ptx::bits(y) & 0x7fffffffu;
    row_bits = b > row_bits ? b : row_bits;
  }
  row_bits = reduce_block(row_bits, slots + kNormThreads * 4, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
  const bool finite = row_bits < kInfBits;
  const float limit = ptx::from_bits(row_bits);
  const bool some = finite && limit >= kTinyAbsmax;
  const float to_code = some ? ptx::div(127.0f, limit) : 0.0f;
  uint32_t codes = 0;
  for (int64_t k = thread; k < p.K; k += kNormThreads) {
    uint32_t code = 0;
    if (some) {
      float f = ptx::mul(normed(k), to_code);
      f = f < -127.0f ? -127.0f : f > 127.0f ? 127.0f : f;
      code = static_cast<uint32_t>(ptx::round_to_int(f));
    }
    p.q[m * p.K + k] = static_cast<int8_t>(code);
    codes += code;
  }
  codes = reduce_block(codes, slots + kNormThreads * 4 + 8, [](uint32_t a, uint32_t b) { return a + b; });
  if (thread == 0) {
    p.row_sum[m] = static_cast<int32_t>(codes);
    p.scale[m] = finite ? some ? ptx::mul(limit, 1.0f / 127.0f) : 0.0f : ptx::from_bits(kNanBits);
  }
}

}  // namespace tersor::cuda
