// What happens between the accumulators and memory: scale, bias, activation, rounding to the output dtype. Compiled per ISA with
// -ffp-contract=off and written with the vocabulary only, so every variant gives the same bits (class E of docs/numerics.md).
#pragma once

#include "products.h"

namespace tersor::TERSOR_ISA {
namespace {

// exp(x) on [-87, 88], clamped outside, NaN kept. Cephes expf: x = n ln2 + r with ln2 in two parts, degree 5 in r; error < 2 ulp.
inline Vf exp_(Vf x) {
  x = Isa::min_(Isa::set1(88.0f), x);
  x = Isa::max_(Isa::set1(-87.0f), x);
  const Vi n = Isa::round(Isa::mul(x, Isa::set1(1.44269504088896341f)));
  const Vf nf = Isa::to_f32(n);
  Vf r = Isa::sub(x, Isa::mul(nf, Isa::set1(0.693359375f)));
  r = Isa::sub(r, Isa::mul(nf, Isa::set1(-2.12194440e-4f)));
  Vf p = Isa::set1(1.9875691500e-4f);
  p = Isa::add(Isa::mul(p, r), Isa::set1(1.3981999507e-3f));
  p = Isa::add(Isa::mul(p, r), Isa::set1(8.3334519073e-3f));
  p = Isa::add(Isa::mul(p, r), Isa::set1(4.1665795894e-2f));
  p = Isa::add(Isa::mul(p, r), Isa::set1(1.6666665459e-1f));
  p = Isa::add(Isa::mul(p, r), Isa::set1(5.0000001201e-1f));
  p = Isa::add(Isa::add(Isa::mul(p, Isa::mul(r, r)), r), Isa::set1(1.0f));
  const Vi power = Isa::shl<23>(Isa::add_i(n, Isa::set1_i(127)));
  return Isa::mul(p, Isa::from_bits(power));  // a product, not an integer add: NaN stays NaN
}

inline Vf abs_(Vf x) { return Isa::from_bits(Isa::and_i(Isa::bits(x), Isa::set1_i(0x7fffffff))); }

// x * sigmoid(u) with u = u(x): NaN kept; below `lowest` the numerator is held so that -inf gives a value next to zero, not NaN.
inline Vf times_sigmoid(Vf x, Vf u, float lowest) {
  const Vf denominator = Isa::add(Isa::set1(1.0f), exp_(Isa::sub(Isa::set1(0.0f), u)));
  return Isa::div(Isa::max_(Isa::set1(lowest), x), denominator);
}

// One functor per row of core/epilogue.inc; a row without one does not compile.
namespace activation {
struct none {
  static Vf apply(Vf x) { return x; }
};
struct relu {
  static Vf apply(Vf x) { return Isa::max_(Isa::set1(0.0f), x); }  // the operand order keeps NaN
};
// x Phi(x) = max(x, 0) - |x| h, h = erfc(|x| / sqrt 2) / 2 by Abramowitz & Stegun 7.1.26 (|error of erfc| <= 1.5e-7).
struct gelu {
  static Vf apply(Vf x) {
    const Vf a = Isa::min_(Isa::set1(12.0f), abs_(x));  // h(12) < 1e-31: keeps the product finite, NaN passes
    const Vf t = Isa::div(Isa::set1(1.0f), Isa::add(Isa::set1(1.0f), Isa::mul(a, Isa::set1(0.3275911f * 0.70710678f))));
    Vf p = Isa::set1(0.5f * 1.061405429f);
    p = Isa::add(Isa::mul(p, t), Isa::set1(0.5f * -1.453152027f));
    p = Isa::add(Isa::mul(p, t), Isa::set1(0.5f * 1.421413741f));
    p = Isa::add(Isa::mul(p, t), Isa::set1(0.5f * -0.284496736f));
    p = Isa::add(Isa::mul(p, t), Isa::set1(0.5f * 0.254829592f));
    const Vf h = Isa::mul(Isa::mul(p, t), exp_(Isa::mul(Isa::mul(a, a), Isa::set1(-0.5f))));
    return Isa::sub(Isa::max_(Isa::set1(0.0f), x), Isa::mul(a, h));
  }
};
// 0.5 x (1 + tanh v) = x sigmoid(2 v), v = sqrt(2/pi) (x + 0.044715 x^3)
struct gelu_tanh {
  static Vf apply(Vf x) {
    const Vf cubic = Isa::mul(Isa::mul(Isa::mul(x, x), x), Isa::set1(0.044715f));
    return times_sigmoid(x, Isa::mul(Isa::add(x, cubic), Isa::set1(2.0f * 0.7978845608f)), -12.0f);
  }
};
struct silu {
  static Vf apply(Vf x) { return times_sigmoid(x, x, -87.0f); }
};
}  // namespace activation

// Nearest-even to bfloat16, NaN to the quiet NaN.
inline Vi to_bf16(Vf v) {
  const Vi b = Isa::bits(v);
  const Vi odd = Isa::and_i(Isa::shr<16>(b), Isa::set1_i(1));
  const Vi rounded = Isa::shr<16>(Isa::add_i(b, Isa::add_i(odd, Isa::set1_i(0x7fff))));
  return Isa::select_gt(Isa::and_i(b, Isa::set1_i(0x7fffffff)), Isa::set1_i(0x7f800000), Isa::set1_i(0x7fc0), rounded);
}

inline void store_as(void* y, Dtype dtype, int64_t i, Vf v) {
  if (dtype == Dtype::bf16) {
    Isa::store_u16(static_cast<uint16_t*>(y) + i, to_bf16(v));
  } else if (dtype == Dtype::f16) {
    Isa::store_f16(static_cast<uint16_t*>(y) + i, v);
  } else {
    Isa::store(static_cast<float*>(y) + i, v);
  }
}

inline Vf load_as(const void* x, Dtype dtype, int64_t i) {
  if (dtype == Dtype::bf16) return Isa::from_bits(Isa::shl<16>(Isa::load_u16(static_cast<const uint16_t*>(x) + i)));
  if (dtype == Dtype::f16) return Isa::load_f16(static_cast<const uint16_t*>(x) + i);
  return Isa::load(static_cast<const float*>(x) + i);
}

template <typename F>
void activate_rows(float* block, int64_t count) {
  for (int64_t i = 0; i < count; i += Isa::kLanes) Isa::store(block + i, F::apply(Isa::load(block + i)));
}

inline void activate(Activation activation, float* block, int64_t count) {
  switch (activation) {
#define TERSOR_EPILOGUE_ROW(name) \
  case Activation::name:          \
    return activate_rows<activation::name>(block, count);
#include "../core/epilogue.inc"
#undef TERSOR_EPILOGUE_ROW
  }
}

// The last, incomplete vector of a row, padded with zeros.
inline Vf load_tail(const void* x, Dtype dtype, int64_t k, int64_t K) {
  alignas(64) char padded[Isa::kLanes * 4] = {};
  const int64_t bytes = dtype_bytes(dtype);
  __builtin_memcpy(padded, static_cast<const char*>(x) + k * bytes, static_cast<size_t>((K - k) * bytes));
  return load_as(padded, dtype, 0);
}

inline const char* element(const void* x, Dtype dtype, int64_t i) { return static_cast<const char*>(x) + i * dtype_bytes(dtype); }
inline char* element(void* x, Dtype dtype, int64_t i) { return static_cast<char*>(x) + i * dtype_bytes(dtype); }

// Where a register block goes, and what is added to it on the way.
struct Destination {
  void* y;  // first element of the block
  Dtype dtype;
  int64_t ldy;
  const void* residual;  // first element, of the same dtype; null: nothing
  int64_t ldr;
};

// A finished register block on its way out: rows x (tiles * 16) values in f32 or s32 bits, ld floats apart.
// Slow path of a store: activation, residual, dtype, and the columns of the last tile that do not exist.
TERSOR_NOINLINE void finish_block(float* block, int rows, int64_t width, int64_t columns, Activation act, const Destination& to) {
  if (to.dtype != Dtype::s32) activate(act, block, rows * width);
  const int64_t whole = columns / Isa::kLanes * Isa::kLanes;
  for (int m = 0; m < rows; ++m) {
    const float* row = block + m * width;
    const char* residual = to.residual ? element(to.residual, to.dtype, m * to.ldr) : nullptr;
    for (int64_t n = 0; n < whole; n += Isa::kLanes) {
      Vf v = Isa::load(row + n);
      if (residual) v = Isa::add(v, load_as(residual, to.dtype, n));
      store_as(to.y, to.dtype, m * to.ldy + n, v);
    }
    if (whole < columns) {
      Vf v = Isa::load(row + whole);
      if (residual) v = Isa::add(v, load_tail(residual, to.dtype, whole, columns));
      alignas(64) char last[Isa::kLanes * 4];  // a value of any dtype in each lane
      store_as(last, to.dtype, 0, v);
      __builtin_memcpy(element(to.y, to.dtype, m * to.ldy + whole), last,
                       static_cast<size_t>((columns - whole) * dtype_bytes(to.dtype)));
    }
  }
}

// weight_scale and bias of the channels of one block. `whole` blocks read the caller's arrays; the last tile reads padded copies.
struct Channels {
  const float* scale;
  const float* bias;  // null: no bias
  float scale_copy[4 * kTileN], bias_copy[4 * kTileN];

  Channels(const float* weight_scale, const float* weight_bias, int64_t n, int64_t width, int64_t columns) {
    scale = weight_scale ? weight_scale + n : nullptr;
    bias = weight_bias ? weight_bias + n : nullptr;
    if (columns == width) return;
    if (scale) scale = pad(scale, scale_copy, width, columns);
    if (bias) bias = pad(bias, bias_copy, width, columns);
  }

 private:
  static const float* pad(const float* from, float* to, int64_t width, int64_t columns) {
    for (int64_t i = 0; i < width; ++i) to[i] = i < columns ? from[i] : 0.0f;
    return to;
  }
};

}  // namespace
}  // namespace tersor::TERSOR_ISA
