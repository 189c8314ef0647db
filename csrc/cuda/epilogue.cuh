// What happens between the accumulators and memory. The operations and their order are those of csrc/cpu/epilogue.h, so results
// are equal to the CPU kernels' bit for bit (class E of docs/numerics.md); a test compares them.
#pragma once

#include "../core/kernel_table.h"
#include "ptx.cuh"

namespace tersor::cuda {

// acc = mul * raw - row_mul * row_sum[m] + constant, modulo 2^32, makes the signed sum of what a kernel adds up:
//   codes u   sum(w q) = 2^code_shift sum(u q) - 2^offset_shift sum(q)
//   signs     K - 2 popcount(w xor x) = K - 2 (popcount(w) + popcount(x)) + 4 popcount(w and x); raw = 2 popcount(and) -
//   popcount(w)
struct Repair {
  uint32_t mul, row_mul, constant;
};

// y = act(((f32(acc) * scale[m]) * weight_scale[n]) + bias[n]) + residual[m][n], rounded to y_dtype; s32: acc.
// glu: channels are gate and up in runs of 16, y[m][16 i + j] = act(both[m][32 i + j]) * both[m][32 i + 16 + j], both before act.
struct Epilogue {
  Repair repair;
  const int32_t* row_sum;     // [M]
  const float* scale;         // [M]
  const float* weight_scale;  // [N]
  const void* bias;           // [N] or null
  const void* residual;       // [M][ldr] of y_dtype or null
  void* y;                    // [M][ldy]
  int64_t ldr, ldy;           // elements
  Dtype bias_dtype, y_dtype;
  Activation activation;
  bool glu;
};

TERSOR_DEVICE float load_as(const void* x, Dtype dtype, int64_t i) {
  if (dtype == Dtype::f32) return static_cast<const float*>(x)[i];
  const uint16_t v = static_cast<const uint16_t*>(x)[i];
  return dtype == Dtype::bf16 ? ptx::from_bf16(v) : ptx::from_f16(v);
}

namespace activation {

// b where either is NaN.
TERSOR_DEVICE float min_(float a, float b) { return a < b ? a : b; }
TERSOR_DEVICE float max_(float a, float b) { return a > b ? a : b; }

TERSOR_DEVICE float exp_(float x) {
  using namespace ptx;
  x = max_(-87.0f, min_(88.0f, x));
  // Nearest integer by adding 1.5 * 2^23, as the vector code has it: NaN gives the same integer everywhere.
  const uint32_t n = bits(add(mul(x, 1.44269504088896341f), 12582912.0f)) - bits(12582912.0f);
  const float nf = to_f32(static_cast<int32_t>(n));
  float r = sub(x, mul(nf, 0.693359375f));
  r = sub(r, mul(nf, -2.12194440e-4f));
  float p = 1.9875691500e-4f;
  p = add(mul(p, r), 1.3981999507e-3f);
  p = add(mul(p, r), 8.3334519073e-3f);
  p = add(mul(p, r), 4.1665795894e-2f);
  p = add(mul(p, r), 1.6666665459e-1f);
  p = add(mul(p, r), 5.0000001201e-1f);
  p = add(add(mul(p, mul(r, r)), r), 1.0f);
  return mul(p, from_bits((n + 127u) << 23));
}

TERSOR_DEVICE float times_sigmoid(float x, float u, float lowest) {
  return ptx::div(max_(lowest, x), ptx::add(1.0f, exp_(ptx::sub(0.0f, u))));
}

TERSOR_DEVICE float none(float x) { return x; }
TERSOR_DEVICE float relu(float x) { return max_(0.0f, x); }
TERSOR_DEVICE float gelu(float x) {
  using namespace ptx;
  const float a = min_(12.0f, from_bits(bits(x) & 0x7fffffffu));
  const float t = div(1.0f, add(1.0f, mul(a, 0.3275911f * 0.70710678f)));
  float p = 0.5f * 1.061405429f;
  p = add(mul(p, t), 0.5f * -1.453152027f);
  p = add(mul(p, t), 0.5f * 1.421413741f);
  p = add(mul(p, t), 0.5f * -0.284496736f);
  p = add(mul(p, t), 0.5f * 0.254829592f);
  const float h = mul(mul(p, t), exp_(mul(mul(a, a), -0.5f)));
  return sub(max_(0.0f, x), mul(a, h));
}
TERSOR_DEVICE float gelu_tanh(float x) {
  using namespace ptx;
  const float cubic = mul(mul(mul(x, x), x), 0.044715f);
  return times_sigmoid(x, mul(add(x, cubic), 2.0f * 0.7978845608f), -12.0f);
}
TERSOR_DEVICE float silu(float x) { return times_sigmoid(x, x, -87.0f); }

}  // namespace activation

TERSOR_DEVICE float activate(Activation a, float x) {
  switch (a) {
#define TERSOR_EPILOGUE_ROW(name) \
  case Activation::name:          \
    return activation::name(x);
#include "../core/epilogue.inc"
#undef TERSOR_EPILOGUE_ROW
  }
  return x;
}

// The value of channel n before its activation. kFloat: raw holds the bits of a float sum over groups that needs no repair.
TERSOR_DEVICE uint32_t repaired(const Epilogue& e, uint32_t raw, int64_t m) {
  return e.repair.mul * raw - e.repair.row_mul * static_cast<uint32_t>(e.row_sum[m]) + e.repair.constant;
}
template <bool kFloat>
TERSOR_DEVICE float scaled(const Epilogue& e, uint32_t raw, int64_t m, int64_t n) {
  float v;
  if constexpr (kFloat) {
    v = ptx::from_bits(raw);
  } else {
    v = ptx::to_f32(static_cast<int32_t>(repaired(e, raw, m)));
  }
  v = ptx::mul(ptx::mul(v, e.scale[m]), e.weight_scale[n]);
  return e.bias ? ptx::add(v, load_as(e.bias, e.bias_dtype, n)) : v;
}

// What element (m, n) of y becomes: the bits of a float before rounding to y_dtype, or acc itself.
template <bool kFloat>
TERSOR_DEVICE uint32_t finish(const Epilogue& e, uint32_t raw, int64_t m, int64_t n) {
  if (!kFloat && e.y_dtype == Dtype::s32) return repaired(e, raw, m);
  float v = activate(e.activation, scaled<kFloat>(e, raw, m, n));
  if (e.residual) v = ptx::add(v, load_as(e.residual, e.y_dtype, m * e.ldr + n));
  return ptx::bits(v);
}

TERSOR_DEVICE void store_one(const Epilogue& e, uint32_t v, int64_t m, int64_t n) {
  const int64_t at = m * e.ldy + n;
  if (e.y_dtype == Dtype::bf16) {
    static_cast<uint16_t*>(e.y)[at] = ptx::to_bf16(ptx::from_bits(v));
  } else if (e.y_dtype == Dtype::f16) {
    static_cast<uint16_t*>(e.y)[at] = ptx::to_f16(ptx::from_bits(v));
  } else {
    static_cast<uint32_t*>(e.y)[at] = v;
  }
}

// v[i] to column n + i of y, in one store where y lies so. N: the columns of y.
TERSOR_DEVICE void store_four(const Epilogue& e, const uint32_t (&v)[4], int64_t m, int64_t n, int64_t N) {
  const bool wide = e.y_dtype == Dtype::f32 || e.y_dtype == Dtype::s32;
  char* to = static_cast<char*>(e.y) + (m * e.ldy + n) * (wide ? 4 : 2);
  if (n + 4 > N || reinterpret_cast<uintptr_t>(to) % (wide ? 16 : 8) != 0) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (n + i < N) store_one(e, v[i], m, n + i);
    }
  } else if (wide) {
    *reinterpret_cast<uint4*>(to) = {v[0], v[1], v[2], v[3]};
  } else {
    uint32_t half[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float f = ptx::from_bits(v[i]);
      half[i] = e.y_dtype == Dtype::bf16 ? ptx::to_bf16(f) : ptx::to_f16(f);
    }
    *reinterpret_cast<uint2*>(to) = {half[0] | half[1] << 16, half[2] | half[3] << 16};
  }
}

// Four neighbouring channels, of N.
template <bool kFloat>
TERSOR_DEVICE void finish_four(const Epilogue& e, uint4 raw, int64_t m, int64_t n, int64_t N) {
  const uint32_t in[4] = {raw.x, raw.y, raw.z, raw.w};
  uint32_t v[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (n + i < N) v[i] = finish<kFloat>(e, in[i], m, n + i);
  }
  store_four(e, v, m, n, N);
}

// Columns f .. f+3 of a gated unit, from the channels gate_of(f) and 16 on: N is a multiple of 32, so all four are there.
TERSOR_DEVICE int64_t gate_of(int64_t f) { return f / kTileN * 2 * kTileN + f % kTileN; }
template <bool kFloat>
TERSOR_DEVICE void finish_glu(const Epilogue& e, uint4 gate, uint4 up, int64_t m, int64_t f, int64_t N) {
  const uint32_t gates[4] = {gate.x, gate.y, gate.z, gate.w}, ups[4] = {up.x, up.y, up.z, up.w};
  uint32_t v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t n = gate_of(f + i);
    const float g = activate(e.activation, scaled<kFloat>(e, gates[i], m, n));
    v[i] = ptx::bits(ptx::mul(g, scaled<kFloat>(e, ups[i], m, n + kTileN)));
  }
  store_four(e, v, m, f, N / 2);
}

}  // namespace tersor::cuda
