// Layer and RMS norm to s8 rows: the formula of NormArgs in kernel_table.h. x is read once from memory; what follows finds the row
// in L1. Sums are in a fixed order and fma rounds once everywhere, so every variant gives the same bits.

namespace tersor::TERSOR_ISA {
namespace {

constexpr float kLeastSpread = 0.125f;  // variance over the mean square: below it too much has cancelled

// v rounded to a dtype and back.
template <Dtype kDtype>
Vf rounded(Vf v) {
  if constexpr (kDtype == Dtype::f32) {
    return v;
  } else if constexpr (kDtype == Dtype::bf16) {
    return Isa::from_bits(Isa::shl<16>(to_bf16(v)));
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

// f(v, k, whole) for each vector of a row, v = k / kLanes mod kSumVecs.
template <typename F>
TERSOR_INLINE void each_vector(int64_t K, F f) {
  int64_t k = 0;
  for (; k + kSumLanes <= K; k += kSumLanes) {
    TERSOR_UNROLL(16)
    for (int v = 0; v < kSumVecs; ++v) f(v, k + v * Isa::kLanes, Flag<true>{});
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
TERSOR_NOINLINE float spread_around(const void* s, int64_t K, float mean) {
  Vf sum[kSumVecs], square[kSumVecs];
  for (int v = 0; v < kSumVecs; ++v) sum[v] = square[v] = Isa::set1(0.0f);
  const Vf centre = Isa::set1(mean);
  each_vector(K, [&](int v, int64_t k, auto whole) TERSOR_INLINE_LAMBDA {
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
  Vf sum[kSumVecs], square[kSumVecs];
  TERSOR_UNROLL(16)
  for (int v = 0; v < kSumVecs; ++v) sum[v] = square[v] = Isa::set1(0.0f);
  auto load_s = [&](int64_t k, auto whole) TERSOR_INLINE_LAMBDA {
    const Vf from = load_part<kDtype, whole.value>(x, k, K);
    if constexpr (!kResidual) return from;
    return rounded<kDtype>(Isa::add(from, load_part<kDtype, whole.value>(residual, k, K)));
  };
  each_vector(K, [&](int v, int64_t k, auto whole) TERSOR_INLINE_LAMBDA {
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

// Rows that are normalised together: they share the loads of weight and bias.
template <int kRows>
struct Group {
  const void* s[kRows];
  float* y[kRows];          // f32 values of the dtype of x
  const char* next[kRows];  // rows of x whose moments follow, brought into L1 meanwhile
  Moments moments[kRows];
  int32_t absmax[kRows];  // bits of the largest magnitude of y
};

template <Dtype kDtype, Dtype kFrom, bool kRms, int kRows>
void normalize(const NormArgs& a, Group<kRows>& rows) {
  const Vi magnitude = Isa::set1_i(0x7fffffff);
  const int64_t K = a.K;
  const float *weight = a.weight, *bias = a.bias;
  Group<kRows> g = rows;
  Vf inverse[kRows], shift[kRows];
  Vi largest[kRows][2];
  TERSOR_UNROLL(2)
  for (int i = 0; i < kRows; ++i) {
    inverse[i] = Isa::set1(g.moments[i].inverse);
    shift[i] = Isa::set1(g.moments[i].shift);
    largest[i][0] = largest[i][1] = Isa::zero_i();
  }
  auto part = [&](int v, int64_t k, auto whole) TERSOR_INLINE_LAMBDA {
    const Vf w = load_part<Dtype::f32, whole.value>(weight, k, K);
    Vf b;
    if constexpr (!kRms) b = load_part<Dtype::f32, whole.value>(bias, k, K);
    TERSOR_UNROLL(2)
    for (int i = 0; i < kRows; ++i) {
      __builtin_prefetch(element(g.next[i], kDtype, k));
      Vf value = load_part<kFrom, whole.value>(g.s[i], k, K);
      if constexpr (kRms) {
        value = Isa::mul(Isa::mul(value, inverse[i]), w);
      } else {
        value = Isa::fma(Isa::fma(value, inverse[i], shift[i]), w, b);
      }
      value = rounded<kDtype>(value);
      if constexpr (!whole.value) value = first_lanes(value, K - k);
      store_part<Dtype::f32, whole.value>(g.y[i], k, K, value);
      largest[i][v] = Isa::max_i(largest[i][v], Isa::and_i(Isa::bits(value), magnitude));
    }
  };
  int64_t k = 0;
  for (; k + 2 * Isa::kLanes <= K; k += 2 * Isa::kLanes) {
    part(0, k, Flag<true>{});
    part(1, k + Isa::kLanes, Flag<true>{});
  }
  for (; k + Isa::kLanes <= K; k += Isa::kLanes) part(0, k, Flag<true>{});
  if (k < K) part(0, k, Flag<false>{});
  TERSOR_UNROLL(2)
  for (int i = 0; i < kRows; ++i) rows.absmax[i] = Isa::reduce_max(Isa::max_i(largest[i][0], largest[i][1]));
}

// f32 values of kDtype where they are wanted.
template <Dtype kDtype>
TERSOR_NOINLINE void narrow_row(const float* from, int64_t K, void* to) {
  each_vector(K, [&](int, int64_t k, auto whole) TERSOR_INLINE_LAMBDA {
    store_part<kDtype, whole.value>(to, k, K, load_part<Dtype::f32, whole.value>(from, k, K));
  });
}

template <Dtype kDtype, bool kResidual, bool kRms>
struct NormRows {
  static constexpr bool kNarrow = kDtype != Dtype::f32;
  static constexpr Dtype kFrom = kResidual ? Dtype::f32 : kDtype;
  const NormArgs& a;
  const int64_t ld = round_up(a.K, 64);

  char* at(void* rows, int64_t m) const { return element(rows, kDtype, m * a.K); }
  const char* x(int64_t m) const { return element(a.x.x, kDtype, m * a.x.ld); }
  // f32 rows that are wanted are written in place. Scratch holds two rows of y and four of s, as those of the next group are taken
  // before this one is done.
  float* y(int64_t m) const { return !kNarrow && a.y ? reinterpret_cast<float*>(at(a.y, m)) : a.scratch + m % 2 * ld; }
  float* s(int64_t m) const { return !kNarrow && a.sum ? reinterpret_cast<float*>(at(a.sum, m)) : a.scratch + (2 + m % 4) * ld; }

  Moments moments_of(int64_t m) const {
    if constexpr (kResidual) {
      const char* residual = element(a.residual.x, kDtype, m * a.residual.ld);
      const Moments found = moments<kDtype, true, kRms>(x(m), residual, a.K, a.eps, s(m));
      if (kNarrow && a.sum) narrow_row<kDtype>(s(m), a.K, at(a.sum, m));
      return found;
    } else {
      if (a.sum) __builtin_memcpy(at(a.sum, m), x(m), static_cast<size_t>(a.K * dtype_bytes(kDtype)));
      return moments<kDtype, false, kRms>(x(m), nullptr, a.K, a.eps, nullptr);
    }
  }

  template <int kRows>
  void quantize_group(int64_t m, const Group<kRows>& g) const {
    TERSOR_UNROLL(2)
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = m + i;
      if (kNarrow && a.y) narrow_row<kDtype>(g.y[i], a.K, at(a.y, row));
      quantize_by<Dtype::f32, false>(g.y[i], a.K, g.absmax[i], a.q + row * a.K, a.scale + row, a.row_sum + row);
    }
  }

  // Rows [m, m + kRows) with their moments known; next: those of the two rows that follow are found meanwhile, as reductions and
  // roots take as long as a third of a pass: each is followed by work that does not wait for it.
  template <int kRows>
  void group(int64_t m, Moments (&next)[2]) const {
    Group<kRows> g;
    TERSOR_UNROLL(2)
    for (int i = 0; i < kRows; ++i) {
      g.s[i] = kResidual ? static_cast<const void*>(s(m + i)) : x(m + i);
      g.y[i] = y(m + i);
      g.next[i] = x(m + kRows + i);
      g.moments[i] = next[i];
    }
    normalize<kDtype, kFrom, kRms, kRows>(a, g);
    for (int i = 0; i < 2 && m + kRows + i < a.M; ++i) next[i] = moments_of(m + kRows + i);
    quantize_group(m, g);
  }

  void run() const {
    Moments next[2] = {moments_of(0), {}};
    if (a.M > 1) next[1] = moments_of(1);
    int64_t m = 0;
    for (; m + 2 <= a.M; m += 2) group<2>(m, next);
    if (m < a.M) group<1>(m, next);
  }
};

template <Dtype kDtype>
void norm_rows(const NormArgs& a) {
  if (a.rms) {
    a.residual.x ? NormRows<kDtype, true, true>{a}.run() : NormRows<kDtype, false, true>{a}.run();
  } else {
    a.residual.x ? NormRows<kDtype, true, false>{a}.run() : NormRows<kDtype, false, false>{a}.run();
  }
}

void norm_quantize_x(const NormArgs& a) {
  if (a.M <= 0) return;
  switch (a.x.dtype) {
    case Dtype::f32:
      return norm_rows<Dtype::f32>(a);
    case Dtype::bf16:
      return norm_rows<Dtype::bf16>(a);
    case Dtype::f16:
      return norm_rows<Dtype::f16>(a);
    case Dtype::s32:
      return;
  }
}

}  // namespace
}  // namespace tersor::TERSOR_ISA
