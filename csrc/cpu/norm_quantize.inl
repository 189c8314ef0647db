// Layer and RMS norm to s8 rows: the formula of NormArgs in kernel_table.h. x is read once from memory; what follows finds the row
// in L1. Sums are in a fixed order and fma rounds once everywhere, so every variant gives the same bits.

namespace tersor::TERSOR_ISA {
namespace {

constexpr int kStatLanes = 32;  // partial sums of a row, lane k mod 32: what hides the latency of an addition on AVX2 and AVX-512
constexpr int kStatVecs = kStatLanes / Isa::kLanes;
constexpr float kLeastSpread = 0.125f;  // variance over the mean square: below it too much has cancelled

// The lanes in halves: i and i + 16, then 8, 4, 2, 1.
inline float add_lanes(Vf (&sums)[kStatVecs]) {
#pragma GCC unroll 4
  for (int half = kStatVecs / 2; half > 0; half /= 2) {
#pragma GCC unroll 4
    for (int i = 0; i < half; ++i) sums[i] = Isa::add(sums[i], sums[half + i]);
  }
  return Isa::reduce_add(sums[0]);
}

// v rounded to a dtype and back.
template <Dtype kDtype>
Vf rounded(Vf v) {
  if constexpr (kDtype == Dtype::f32) {
    return v;
  } else {
    alignas(64) uint16_t narrow[Isa::kLanes];
    store_as(narrow, kDtype, 0, v);
    return load_as(narrow, kDtype, 0);
  }
}

// Lanes from `count` on become 0.
inline Vf first_lanes(Vf v, int64_t count) {
  alignas(64) float lanes[Isa::kLanes];
  Isa::store(lanes, v);
  return load_tail(lanes, Dtype::f32, 0, count);
}

// A row of floats, read and written without a byte past its end: kWhole says that the vector at k lies within.
template <Dtype kDtype, bool kWhole>
Vf load_part(const void* row, int64_t k, int64_t K) {
  if constexpr (kWhole) return load_as(row, kDtype, k);
  return load_tail(row, kDtype, k, K);
}
template <Dtype kDtype, bool kWhole>
void store_part(void* row, int64_t k, int64_t K, Vf v) {
  if constexpr (kWhole) {
    store_as(row, kDtype, k, v);
  } else {
    alignas(64) char last[Isa::kLanes * 4];
    store_as(last, kDtype, 0, v);
    __builtin_memcpy(element(row, kDtype, k), last, static_cast<size_t>((K - k) * dtype_bytes(kDtype)));
  }
}

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

// f(v, k, whole) for each vector of a row, v = k / kLanes mod kStatVecs.
template <typename F>
[[gnu::always_inline]] inline void each_vector(int64_t K, F f) {
  int64_t k = 0;
  for (; k + kStatLanes <= K; k += kStatLanes) {
#pragma GCC unroll 8
    for (int v = 0; v < kStatVecs; ++v) f(v, k + v * Isa::kLanes, Flag<true>{});
  }
  int v = 0;
  for (; k + Isa::kLanes <= K; ++v, k += Isa::kLanes) f(v, k, Flag<true>{});
  if (k < K) f(v, k, Flag<false>{});
}

// y = ((s * inverse) + shift) * weight + bias: inverse = 1 / sqrt(variance + eps), or of the mean square; shift = -mean * inverse.
struct Moments {
  float inverse, shift;
};

// sum of (s - mean)^2, less what the rounding of the mean adds.
template <Dtype kDtype>
[[gnu::noinline]] float spread_around(const void* s, int64_t K, float mean) {
  Vf sum[kStatVecs], square[kStatVecs];
  for (int v = 0; v < kStatVecs; ++v) sum[v] = square[v] = Isa::set1(0.0f);
  const Vf centre = Isa::set1(mean);
  each_vector(K, [&](int v, int64_t k, auto whole) __attribute__((always_inline)) {
    Vf d = Isa::sub(load_part<kDtype, whole.value>(s, k, K), centre);
    if constexpr (!whole.value) d = first_lanes(d, K - k);
    sum[v] = Isa::add(sum[v], d);
    square[v] = Isa::fma(d, d, square[v]);
  });
  const float squares = add_lanes(square), total = add_lanes(sum);
  const float spread = squares - total * (total / static_cast<float>(K));
  return spread >= 0.0f ? spread : squares;
}

// Moments of s = x + residual, which is left in `s`; without a residual s is x, and the pointer is not used.
template <Dtype kDtype, bool kResidual, bool kRms>
Moments moments(const void* x, const void* residual, int64_t K, float eps, float* s) {
  const float share = 1.0f / static_cast<float>(K);
  Vf sum[kStatVecs], square[kStatVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kStatVecs; ++v) sum[v] = square[v] = Isa::set1(0.0f);
  auto load_s = [&](int64_t k, auto whole) __attribute__((always_inline)) {
    const Vf from = load_part<kDtype, whole.value>(x, k, K);
    if constexpr (!kResidual) return from;
    return rounded<kDtype>(Isa::add(from, load_part<kDtype, whole.value>(residual, k, K)));
  };
  each_vector(K, [&](int v, int64_t k, auto whole) __attribute__((always_inline)) {
    const Vf d = load_s(k, whole);
    if constexpr (kResidual) store_part<Dtype::f32, whole.value>(s, k, K, d);
    if constexpr (!kRms) sum[v] = Isa::add(sum[v], d);
    square[v] = Isa::fma(d, d, square[v]);
  });
  const float squares = add_lanes(square);
  if constexpr (kRms) return {1.0f / __builtin_sqrtf(squares * share + eps), 0.0f};
  const float total = add_lanes(sum), mean = total * share;
  float spread = squares - total * mean;
  // Far from 0 little is left of the difference (nothing after an overflow, NaN among NaNs): once more, around the mean.
  if (!(spread >= squares * kLeastSpread)) {
    spread = kResidual ? spread_around<Dtype::f32>(s, K, mean) : spread_around<kDtype>(x, K, mean);
  }
  const float inverse = 1.0f / __builtin_sqrtf(spread * share + eps);
  return {inverse, -(mean * inverse)};
}

// y, f32 values of kDtype; returns the bits of its largest magnitude.
template <Dtype kDtype, Dtype kFrom, bool kRms>
int32_t normalize(const void* s, const NormArgs& a, const Moments& moments, float* y) {
  const Vi magnitude = Isa::set1_i(0x7fffffff);
  const Vf inverse = Isa::set1(moments.inverse), shift = Isa::set1(moments.shift);
  const int64_t K = a.K;
  const float *weight = a.weight, *bias = a.bias;
  Vi largest[kStatVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kStatVecs; ++v) largest[v] = Isa::zero_i();
  each_vector(K, [&](int v, int64_t k, auto whole) __attribute__((always_inline)) {
    Vf value = load_part<kFrom, whole.value>(s, k, K);
    const Vf w = load_part<Dtype::f32, whole.value>(weight, k, K);
    if constexpr (kRms) {
      value = Isa::mul(Isa::mul(value, inverse), w);
    } else {
      value = Isa::fma(Isa::fma(value, inverse, shift), w, load_part<Dtype::f32, whole.value>(bias, k, K));
    }
    value = rounded<kDtype>(value);
    if constexpr (!whole.value) value = first_lanes(value, K - k);
    store_part<Dtype::f32, whole.value>(y, k, K, value);
    largest[v] = Isa::max_i(largest[v], Isa::and_i(Isa::bits(value), magnitude));
  });
  for (int v = 1; v < kStatVecs; ++v) largest[0] = Isa::max_i(largest[0], largest[v]);
  return Isa::reduce_max(largest[0]);
}

// f32 values of kDtype where they are wanted.
template <Dtype kDtype>
[[gnu::noinline]] void narrow_row(const float* from, int64_t K, void* to) {
  each_vector(K, [&](int, int64_t k, auto whole) __attribute__((always_inline)) {
    store_part<kDtype, whole.value>(to, k, K, load_part<Dtype::f32, whole.value>(from, k, K));
  });
}

template <Dtype kDtype, bool kResidual, bool kRms>
void norm_rows(const NormArgs& a) {
  constexpr bool kNarrow = kDtype != Dtype::f32;
  constexpr Dtype kFrom = kResidual ? Dtype::f32 : kDtype;
  const int64_t K = a.K, ld = round_up(K, 64);
  auto at = [&](void* rows, int64_t m) { return element(rows, kDtype, m * K); };
  auto x = [&](int64_t m) { return element(a.x.x, kDtype, m * a.x.ld); };
  // Two rows of s, as those of the next row are taken before this one is done. f32 rows that are wanted are written in place.
  auto s = [&](int64_t m) { return !kNarrow && a.sum ? reinterpret_cast<float*>(at(a.sum, m)) : a.scratch + (1 + m % 2) * ld; };
  auto moments_of = [&](int64_t m) {
    if (!kResidual) {
      if (a.sum) __builtin_memcpy(at(a.sum, m), x(m), static_cast<size_t>(K * dtype_bytes(kDtype)));
      return moments<kDtype, kResidual, kRms>(x(m), nullptr, K, a.eps, nullptr);
    }
    const Moments found = moments<kDtype, kResidual, kRms>(x(m), element(a.residual.x, kDtype, m * a.residual.ld), K, a.eps, s(m));
    if (kNarrow && a.sum) narrow_row<kDtype>(s(m), K, at(a.sum, m));
    return found;
  };

  // Reductions and roots take as long as a third of a pass: each is followed by work that does not wait for it.
  Moments next = moments_of(0);
  for (int64_t m = 0; m < a.M; ++m) {
    float* y = !kNarrow && a.y ? reinterpret_cast<float*>(at(a.y, m)) : a.scratch;
    const void* from = kResidual ? static_cast<const void*>(s(m)) : x(m);
    const int32_t absmax = normalize<kDtype, kFrom, kRms>(from, a, next, y);
    if (m + 1 < a.M) next = moments_of(m + 1);
    if (kNarrow && a.y) narrow_row<kDtype>(y, K, at(a.y, m));
    quantize_by<Dtype::f32, false>(y, K, absmax, a.q + m * K, a.scale + m, a.row_sum + m);
  }
}

template <Dtype kDtype>
void norm_dtype(const NormArgs& a) {
  if (a.rms) {
    (a.residual.x ? norm_rows<kDtype, true, true> : norm_rows<kDtype, false, true>)(a);
  } else {
    (a.residual.x ? norm_rows<kDtype, true, false> : norm_rows<kDtype, false, false>)(a);
  }
}

void norm_quantize_x(const NormArgs& a) {
  if (a.M <= 0) return;
  switch (a.x.dtype) {
    case Dtype::f32:
      return norm_dtype<Dtype::f32>(a);
    case Dtype::bf16:
      return norm_dtype<Dtype::bf16>(a);
    case Dtype::f16:
      return norm_dtype<Dtype::f16>(a);
    case Dtype::s32:
      return;
  }
}

}  // namespace
}  // namespace tersor::TERSOR_ISA
