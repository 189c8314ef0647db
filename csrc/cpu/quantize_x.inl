// Float rows to s8 rows: the formula of kernel_table.h, two passes over a row that the first brings into L1.

namespace tersor::TERSOR_ISA {
namespace {

constexpr float kTinyAbsmax = 7.888609052210118e-31f;  // 2^-100: below it 127/absmax nears the end of the float range
constexpr int32_t kInfBits = 0x7f800000;

// Bits of max |x|: sign-cleared floats order like integers, and NaN and inf come out on top (>= kInfBits).
template <Dtype kDtype>
int32_t absmax_bits(const void* x, int64_t K) {
  const Vi magnitude = Isa::set1_i(0x7fffffff);
  Vi m0 = Isa::zero_i(), m1 = m0, m2 = m0, m3 = m0;
  int64_t k = 0;
  for (; k + 4 * Isa::kLanes <= K; k += 4 * Isa::kLanes) {
    m0 = Isa::max_i(m0, Isa::and_i(Isa::bits(load_as(x, kDtype, k)), magnitude));
    m1 = Isa::max_i(m1, Isa::and_i(Isa::bits(load_as(x, kDtype, k + Isa::kLanes)), magnitude));
    m2 = Isa::max_i(m2, Isa::and_i(Isa::bits(load_as(x, kDtype, k + 2 * Isa::kLanes)), magnitude));
    m3 = Isa::max_i(m3, Isa::and_i(Isa::bits(load_as(x, kDtype, k + 3 * Isa::kLanes)), magnitude));
  }
  for (; k + Isa::kLanes <= K; k += Isa::kLanes) m0 = Isa::max_i(m0, Isa::and_i(Isa::bits(load_as(x, kDtype, k)), magnitude));
  if (k < K) m0 = Isa::max_i(m0, Isa::and_i(Isa::bits(load_tail(x, kDtype, k, K)), magnitude));
  return Isa::reduce_max(Isa::max_i(Isa::max_i(m0, m1), Isa::max_i(m2, m3)));
}

// kClamp: |v * inv| may exceed 127, in float, before converting: large values stay large. Else the scale is the row's own, and the
// products end at 127 (1 + 2^-23), which rounds to 127.
template <bool kClamp>
Vi quantize(Vf v, Vf inv) {
  v = Isa::mul(v, inv);
  if constexpr (kClamp) v = Isa::min_(Isa::max_(v, Isa::set1(-127.0f)), Isa::set1(127.0f));
  return Isa::round(v);
}

// Writes q, returns its sum. With kCheck *finite says whether the row is free of NaN and inf: x * 0 is NaN for these only.
template <Dtype kDtype, bool kClamp, bool kCheck>
int32_t quantize_row(const void* x, int64_t K, float inverse, int8_t* q, bool* finite) {
  constexpr int64_t kStep = 4 * Isa::kLanes;  // what one vector of s8 holds
  const Vf inv = Isa::set1(inverse), zero = Isa::set1(0.0f);
  Vi sum = Isa::zero_i();
  Vf nan[4] = {zero, zero, zero, zero};
  auto pack = [&](const Vf(&v)[4]) TERSOR_INLINE_LAMBDA {
    if constexpr (kCheck) {
      TERSOR_UNROLL(4)
      for (int i = 0; i < 4; ++i) nan[i] = Isa::muladd(v[i], zero, nan[i]);
    }
    const Vi packed = Isa::pack_s8(quantize<kClamp>(v[0], inv), quantize<kClamp>(v[1], inv), quantize<kClamp>(v[2], inv),
                                   quantize<kClamp>(v[3], inv));
    sum = Isa::add_s8(sum, packed);
    return packed;
  };
  int64_t k = 0;
  for (; k + kStep <= K; k += kStep) {
    const Vf v[4] = {load_as(x, kDtype, k), load_as(x, kDtype, k + Isa::kLanes), load_as(x, kDtype, k + 2 * Isa::kLanes),
                     load_as(x, kDtype, k + 3 * Isa::kLanes)};
    Isa::store_i(q + k, pack(v));
  }
  if (k < K) {
    Vf v[4] = {zero, zero, zero, zero};
    for (int i = 0; i < 4 && k + i * Isa::kLanes < K; ++i) {
      const int64_t at = k + i * Isa::kLanes;
      v[i] = at + Isa::kLanes <= K ? load_as(x, kDtype, at) : load_tail(x, kDtype, at, K);
    }
    int8_t last[kStep];
    Isa::store_i(last, pack(v));
    __builtin_memcpy(q + k, last, static_cast<size_t>(K - k));
  }
  if constexpr (kCheck) {
    const Vf any = Isa::add(Isa::add(nan[0], nan[1]), Isa::add(nan[2], nan[3]));
    *finite = Isa::reduce_max(Isa::and_i(Isa::bits(any), Isa::set1_i(0x7fffffff))) == 0;
  }
  return Isa::reduce_add(sum);
}

// One scale for every row: a single pass.
template <Dtype kDtype>
void quantize_rows_static(const QuantizeArgs& a) {
  int32_t bits;
  __builtin_memcpy(&bits, a.input_scale, 4);
  bits &= 0x7fffffff;
  float scale;
  __builtin_memcpy(&scale, &bits, 4);
  const bool usable = bits < kInfBits && scale >= kTinyAbsmax;
  const float inverse = usable ? 1.0f / scale : 0.0f;
  if (!usable) scale = bits < kInfBits ? 0.0f : __builtin_nanf("");
  for (int64_t m = 0; m < a.M; ++m) {
    const char* x = static_cast<const char*>(a.x.x) + m * a.x.ld * dtype_bytes(kDtype);
    int8_t* q = a.q + m * a.ldq;
    bool finite;
    a.row_sum[m] = quantize_row<kDtype, true, true>(x, a.K, inverse, q, &finite);
    a.scale[m] = finite ? scale : __builtin_nanf("");
    if (!finite) {  // what NaN and inf became is nobody's business
      __builtin_memset(q, 0, static_cast<size_t>(a.K));
      a.row_sum[m] = 0;
    }
  }
}

// A row by the bits of its largest magnitude; NaN and inf (>= kInfBits) make it NaN.
template <Dtype kDtype, bool kClamp>
void quantize_by(const void* x, int64_t K, int32_t row_bits, int8_t* q, float* scale, int32_t* row_sum) {
  float absmax;
  __builtin_memcpy(&absmax, &row_bits, 4);
  if (row_bits >= kInfBits) {
    *scale = __builtin_nanf("");
    absmax = 0.0f;
  } else {
    *scale = absmax < kTinyAbsmax ? 0.0f : absmax * (1.0f / 127.0f);
  }
  if (absmax < kTinyAbsmax) {
    if (K > 0) __builtin_memset(q, 0, static_cast<size_t>(K));
    *row_sum = 0;
  } else {
    *row_sum = quantize_row<kDtype, kClamp, false>(x, K, 127.0f / absmax, q, nullptr);
  }
}

template <Dtype kDtype>
void quantize_rows(const QuantizeArgs& a) {
  if (a.input_scale) return quantize_rows_static<kDtype>(a);
  for (int64_t m = 0; m < a.M; ++m) {
    const char* x = static_cast<const char*>(a.x.x) + m * a.x.ld * dtype_bytes(kDtype);
    int32_t row_bits = absmax_bits<kDtype>(x, a.K);
    if (a.absmax && row_bits < kInfBits) {  // a NaN or inf in the row decides, whatever absmax says
      __builtin_memcpy(&row_bits, a.absmax + m, 4);
      row_bits &= 0x7fffffff;
    }
    const auto row = a.absmax ? quantize_by<kDtype, true> : quantize_by<kDtype, false>;
    row(x, a.K, row_bits, a.q + m * a.ldq, a.scale + m, a.row_sum + m);
  }
}

void quantize_x(const QuantizeArgs& a) {
  switch (a.x.dtype) {
    case Dtype::f32:
      return quantize_rows<Dtype::f32>(a);
    case Dtype::bf16:
      return quantize_rows<Dtype::bf16>(a);
    case Dtype::f16:
      return quantize_rows<Dtype::f16>(a);
    case Dtype::s32:
      return;
  }
}

void widen_x(const void* x, Dtype dtype, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + Isa::kLanes <= n; i += Isa::kLanes) Isa::store(out + i, load_as(x, dtype, i));
  if (i < n) {
    float last[Isa::kLanes];
    Isa::store(last, load_tail(x, dtype, i, n));
    __builtin_memcpy(out + i, last, static_cast<size_t>(n - i) * 4);
  }
}

}  // namespace
}  // namespace tersor::TERSOR_ISA
