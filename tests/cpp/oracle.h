// What the kernels must compute, written straight from core/kernel_table.h: slow, scalar, and sharing nothing with csrc/cpu.
// Compiled with -ffp-contract=off, so a float expression rounds once per operation, as the formulas say.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "kernel_table.h"

namespace tersor::test {

inline constexpr double kU = 0x1p-24;  // unit roundoff of f32: fl(x) = x (1 + d), |d| <= kU

// ---- 16-bit floats, by arithmetic rather than by bit tricks -------------------------------------------------------------------
struct HalfFormat {
  int mantissa, bias;
  uint16_t nan;
};
inline constexpr HalfFormat kF16{10, 15, 0x7e00}, kBf16{7, 127, 0x7fc0};
inline HalfFormat half_format(Dtype t) { return t == Dtype::f16 ? kF16 : kBf16; }

inline float decode(uint16_t code, HalfFormat f) {
  const int exponents = (1 << (15 - f.mantissa)) - 1;
  const int exponent = code >> f.mantissa & exponents, mantissa = code & ((1 << f.mantissa) - 1);
  double magnitude;
  if (exponent == exponents) {
    magnitude = mantissa ? std::nan("") : HUGE_VAL;
  } else {
    magnitude = exponent ? std::ldexp(mantissa + (1 << f.mantissa), exponent - f.bias - f.mantissa)
                         : std::ldexp(mantissa, 1 - f.bias - f.mantissa);
  }
  return static_cast<float>(code & 0x8000 ? -magnitude : magnitude);
}

// Nearest, ties to even (std::nearbyint in the default rounding mode).
inline uint16_t encode(float v, HalfFormat f) {
  if (std::isnan(v)) return f.nan;
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  const int64_t infinity = ((int64_t{1} << (15 - f.mantissa)) - 1) << f.mantissa;
  if (std::isinf(v)) return static_cast<uint16_t>(sign | infinity);
  const double magnitude = std::fabs(static_cast<double>(v));
  const int lowest = 1 - f.bias;
  int exponent = magnitude == 0 ? lowest : std::ilogb(magnitude);
  if (exponent < lowest) exponent = lowest;
  const auto steps = static_cast<int64_t>(std::nearbyint(std::ldexp(magnitude, f.mantissa - exponent)));
  const int64_t code = (int64_t{exponent - lowest} << f.mantissa) + steps;
  return static_cast<uint16_t>(sign | (code < infinity ? code : infinity));
}

inline float load_float(const void* x, Dtype t, int64_t i) {
  if (t == Dtype::f32) return static_cast<const float*>(x)[i];
  return decode(static_cast<const uint16_t*>(x)[i], half_format(t));
}
inline void store_float(void* x, Dtype t, int64_t i, float v) {
  if (t == Dtype::f32) {
    static_cast<float*>(x)[i] = v;
  } else {
    static_cast<uint16_t*>(x)[i] = encode(v, half_format(t));
  }
}
inline const char* dtype_name(Dtype t) {
  return t == Dtype::f32 ? "f32" : t == Dtype::bf16 ? "bf16" : t == Dtype::f16 ? "f16" : "s32";
}

// ---- class I ------------------------------------------------------------------------------------------------------------------
struct QuantizedRow {
  std::vector<int8_t> q;
  float scale = 0;
  int32_t row_sum = 0;
};

// input_scale: the scale of every row, in place of one made from absmax.
inline QuantizedRow quantize_row(const float* x, int64_t K, const float* given, const float* input_scale = nullptr) {
  QuantizedRow r;
  r.q.assign(static_cast<size_t>(K), 0);
  float absmax = 0;
  bool finite = true;
  for (int64_t k = 0; k < K; ++k) {
    finite = finite && std::isfinite(x[k]);
    absmax = std::fmax(absmax, std::fabs(x[k]));
  }
  if (given) {
    absmax = *given;
    finite = finite && std::isfinite(absmax);
  }
  if (!finite || (input_scale && !std::isfinite(*input_scale))) {
    r.scale = std::numeric_limits<float>::quiet_NaN();
    return r;
  }
  const float limit = input_scale ? std::fabs(*input_scale) : absmax;
  if (limit < 0x1p-100f) return r;
  const float inv = input_scale ? 1.0f / limit : 127.0f / limit;
  r.scale = input_scale ? limit : limit * (1.0f / 127.0f);
  for (int64_t k = 0; k < K; ++k) {
    const float v = std::nearbyint(std::fmin(std::fmax(x[k] * inv, -127.0f), 127.0f));
    r.q[static_cast<size_t>(k)] = static_cast<int8_t>(v);
    r.row_sum += static_cast<int32_t>(v);
  }
  return r;
}

// [ ceil(N/16) ][ ceil(K/4) ][ 16 ][ 4 ] uint8 codes w + 128, pad codes 0
inline std::vector<uint8_t> pack(const std::vector<int8_t>& w, int64_t N, int64_t K, int bits) {
  const int64_t in_word = 32 / bits, words = (K + in_word - 1) / in_word;
  std::vector<uint8_t> out(static_cast<size_t>((N + 15) / 16 * words * 64), 0);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k) {
      const int value = w[static_cast<size_t>(n * K + k)];
      const int code = bits == 8 ? value + 128 : bits == 4 ? value + 8 : bits == 2 ? value + 1 : (value + 1) / 2;
      const int64_t at = k % in_word, byte = at % 4, shift = bits * (at / 4);
      out[static_cast<size_t>(((n / 16 * words + k / in_word) * 16 + n % 16) * 4 + byte)] |= static_cast<uint8_t>(code << shift);
    }
  }
  return out;
}

// acc [M][N]; the sums fit int32 for K <= kMaxK.
inline std::vector<int32_t> matmul(const int8_t* q, int64_t ldq, const int8_t* w, int64_t M, int64_t N, int64_t K) {
  std::vector<int32_t> acc(static_cast<size_t>(M * N));
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      int64_t sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += int64_t{q[m * ldq + k]} * w[n * K + k];
      acc[static_cast<size_t>(m * N + n)] = static_cast<int32_t>(sum);
    }
  }
  return acc;
}

// ---- class E ------------------------------------------------------------------------------------------------------------------
inline float before_activation(int32_t acc, float scale, float weight_scale, const float* bias) {
  float z = static_cast<float>(acc) * scale;
  z = z * weight_scale;
  return bias ? z + *bias : z;
}

// A value and how far an f32 computation of it may lie from it; 0: not at all.
struct Bounded {
  double value, bound;
};

// One oracle per row of core/epilogue.inc, given the f32 (or, for class F, the exact) value before the activation. A row without
// one does not compile. NaN gives NaN, +inf gives +inf; `none` and `relu` are exact.
//
// exp_ of cpu/epilogue.h is taken at its word: within 2 ulp, so within 4 kU relatively, between its clamps -87 and 88.
namespace activation {
inline Bounded none(double z) { return {z, 0}; }
inline Bounded relu(double z) { return {z < 0 ? 0 : z, 0}; }

// Error of max(z, 0) - a h(a), a = |z|, h = Q(t) E with t = 1/(1 + a c), Q = t P(t), E = exp(-a^2/2), against z Phi(z):
//   the formula   Abramowitz & Stegun 7.1.26: erfc within 1.5e-7, h within half of that, times a. Past 5.5 both a h(a) and its
//                 true value are below 5.5 * 0.75e-7.
//   t             c = 0.3275911f * 0.70710678f carries three roundings; product, sum and quotient one each: 6.1 kU relatively.
//                 That moves Q(t) by |Q'(t)| t of it.
//   Q             Horner's scheme, its error followed step by step (Higham, Accuracy and Stability, 5.1): b' = b t + c rounds
//                 the product, the sum and c once each, and multiplies by t what came in
//   E             a a rounds once: a^2/2 kU absolutely in the exponent; exp_ 4 kU; the two products that follow 2 kU
//   difference    one rounding of the result
// Second-order terms: 1 %. Past 12, h(12) stands for h: 12 h(12) < 1e-31.
inline Bounded gelu(double z) {
  const double value = z * 0.5 * std::erfc(-z * std::sqrt(0.5));
  const double a = std::fabs(z), t = 1 / (1 + a * 0.3275911 * std::sqrt(0.5)), E = std::exp(-a * a / 2);
  const double c[5] = {0.254829592 / 2, -0.284496736 / 2, 1.421413741 / 2, -1.453152027 / 2, 1.061405429 / 2};
  double Q = 0, slope = 0, Q_error = 0, power = 1;
  for (int i = 0; i < 5; ++i) {
    slope += c[i] * (i + 1) * power;
    power *= t;
  }
  for (int i = 4; i >= 0; --i) {
    Q_error = Q_error * t + std::fabs(Q * t) + std::fabs(Q * t + c[i]) + std::fabs(c[i]);
    Q = Q * t + c[i];
  }
  Q *= t;
  Q_error = Q_error * t + Q;
  const double h_error = a > 12 ? 0 : a * E * (Q_error + 6.1 * t * std::fabs(slope) + (a * a / 2 + 6) * Q) * kU;
  return {value, 1.01 * h_error + 0.75e-7 * std::fmin(a, 5.5) + kU * std::fabs(value) + 1e-31};
}

// z / (1 + exp(-w)) with w = w(z) known to `w_error` relatively: exp(-w) is off by (w_error |w| + 4 kU), of which the share (1 - s)
// of the denominator, s = sigmoid(w), takes part; sum and quotient round once each and one more is slack for second-order terms.
// The clamps leave values below 1e-35 where the result is smaller still.
inline Bounded times_sigmoid(double z, double w, double w_error) {
  const double s = w >= 0 ? 1 / (1 + std::exp(-w)) : std::exp(w) / (1 + std::exp(w));
  const double value = z * s;
  return {value, std::fabs(value) * ((1 - s) * (w_error * std::fabs(w) + 4 * kU) + 3 * kU) + 1e-35};
}
// w = 2 sqrt(2/pi) (z + 0.044715 z^3): z^3 two roundings, its constant one, the product one; the sum (same signs) one; the outer
// constant one and its product one: 7.
inline Bounded gelu_tanh(double z) {
  return times_sigmoid(z, 2 * std::sqrt(2 / std::acos(-1.0)) * (z + 0.044715 * z * z * z), 7 * kU);
}
inline Bounded silu(double z) { return times_sigmoid(z, z, 0); }
}  // namespace activation

inline Bounded activate(Activation a, double z) {
  if (std::isnan(z) || (std::isinf(z) && z > 0)) return {z, 0};
  if (std::isinf(z) && a != Activation::none && a != Activation::relu) return {0, 1e-31};
  switch (a) {
#define TERSOR_EPILOGUE_ROW(name) \
  case Activation::name:          \
    return activation::name(z);
#include "epilogue.inc"
#undef TERSOR_EPILOGUE_ROW
  }
  return {z, 0};
}

inline constexpr Activation kActivations[] = {
#define TERSOR_EPILOGUE_ROW(name) Activation::name,
#include "epilogue.inc"
#undef TERSOR_EPILOGUE_ROW
};
inline constexpr const char* kActivationNames[] = {
#define TERSOR_EPILOGUE_ROW(name) #name,
#include "epilogue.inc"
#undef TERSOR_EPILOGUE_ROW
};
inline const char* activation_name(Activation a) { return kActivationNames[static_cast<int>(a)]; }

// Whether element i of y, of any float dtype, is `want` within its bound and one rounding to the dtype.
inline bool within(const void* y, Dtype t, int64_t i, Bounded want) {
  const float got = load_float(y, t, i);
  if (std::isnan(want.value)) return std::isnan(got);
  if (want.bound == 0) {
    // Exact in f32: the bits are known. relu(-0) may be either zero.
    float exact = static_cast<float>(want.value);
    if (t != Dtype::f32) exact = decode(encode(exact, half_format(t)), half_format(t));
    return got == exact;
  }
  double low = want.value - want.bound, high = want.value + want.bound;
  if (t != Dtype::f32) {  // rounding is monotone
    low = decode(encode(static_cast<float>(low), half_format(t)), half_format(t));
    high = decode(encode(static_cast<float>(high), half_format(t)), half_format(t));
  }
  return low <= got && got <= high;
}

}  // namespace tersor::test
