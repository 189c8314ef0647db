// Layer and RMS norm to s8 rows: the formula of NormArgs in kernel_table.h. x is read once from memory; what follows finds the row
// in L1. Sums are in a fixed order and nothing is fused, so every variant gives the same bits.

namespace tersor::TERSOR_ISA {
namespace {

constexpr int kStatLanes = 32;  // partial sums of a row, lane k mod 32: what hides the latency of an addition on AVX2 and AVX-512
constexpr int kStatVecs = kStatLanes / Isa::kLanes;
constexpr float kLeastSpread = 0.125f;  // variance against the mean square around the row's first value

// The lanes in halves: i and i + 16, then 8, 4, 2, 1.
inline float add_lanes(Vf (&sums)[kStatVecs]) {
  for (int half = kStatVecs / 2; half > 0; half /= 2) {
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

template <Dtype kDtype>
void store_row(void* row, int64_t k, int64_t K, Vf v) {
  if (k + Isa::kLanes <= K) {
    store_as(row, kDtype, k, v);
  } else {
    alignas(64) char last[Isa::kLanes * 4];
    store_as(last, kDtype, 0, v);
    __builtin_memcpy(element(row, kDtype, k), last, static_cast<size_t>((K - k) * dtype_bytes(kDtype)));
  }
}

// f(v, k) for each vector of a row, v = k / kLanes mod kStatVecs.
template <typename F>
[[gnu::always_inline]] inline void each_vector(int64_t K, F f) {
  int64_t k = 0;
  for (; k + kStatLanes <= K; k += kStatLanes) {
#pragma GCC unroll 8
    for (int v = 0; v < kStatVecs; ++v) f(v, k + v * Isa::kLanes);
  }
  for (int v = 0; k < K; ++v, k += Isa::kLanes) f(v, k);
}

struct Moments {
  float mean, inverse;  // 1 / sqrt(variance + eps), or of the mean square
};

template <Dtype kDtype, bool kResidual, bool kRms>
struct Norm {
  const NormArgs& a;
  const Vi magnitude = Isa::set1_i(0x7fffffff);

  static Vf load(const void* row, Dtype dtype, int64_t k, int64_t K) {
    return k + Isa::kLanes <= K ? load_as(row, dtype, k) : load_tail(row, dtype, k, K);
  }
  const char* x_row(int64_t m) const { return element(a.x.x, kDtype, m * a.x.ld); }
  // Rows of s: x itself, or what moments() has left in scratch. Two, as those of the next row are taken before this one is done.
  float* s_row(int64_t m) const { return a.scratch + (1 + (m & 1)) * round_up(a.K, 64); }
  Vf load_s(int64_t m, int64_t k) const {
    if constexpr (kResidual) return Isa::load(s_row(m) + k);
    return load(x_row(m), kDtype, k, a.K);
  }

  Vf add_residual(int64_t m, int64_t k) const {
    const Vf x = load(x_row(m), kDtype, k, a.K);
    if constexpr (!kResidual) return x;
    return rounded<kDtype>(Isa::add(x, load(element(a.residual.x, kDtype, m * a.residual.ld), kDtype, k, a.K)));
  }

  Moments moments(int64_t m) const {
    const int64_t K = a.K;
    const float share = 1.0f / static_cast<float>(K);
    Vf sum[kStatVecs], square[kStatVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kStatVecs; ++v) sum[v] = square[v] = Isa::set1(0.0f);
    // Around the row's first value one pass will do: squares around 0 would cancel where the mean is large.
    alignas(64) float first[Isa::kLanes] = {};
    if constexpr (!kRms) Isa::store(first, add_residual(m, 0));
    const Vf shift = Isa::set1(first[0]);
    each_vector(K, [&](int v, int64_t k) __attribute__((always_inline)) {
      const Vf s = add_residual(m, k);
      if constexpr (kResidual) Isa::store(s_row(m) + k, s);
      if (a.sum) store_row<kDtype>(element(a.sum, kDtype, m * K), k, K, s);
      if constexpr (kRms) {
        square[v] = Isa::add(square[v], Isa::mul(s, s));
      } else {
        Vf d = Isa::sub(s, shift);
        if (k + Isa::kLanes > K) d = first_lanes(d, K - k);
        sum[v] = Isa::add(sum[v], d);
        square[v] = Isa::add(square[v], Isa::mul(d, d));
      }
    });
    const float squares = add_lanes(square);
    if constexpr (kRms) return {0.0f, 1.0f / __builtin_sqrtf(squares * share + a.eps)};
    float total = add_lanes(sum), offset = total * share;
    float spread = squares - total * offset;
    float mean = first[0] + offset;
    // The first value may be an outlier: then the difference says little (or nothing, NaN and overflow included).
    if (!(spread >= squares * kLeastSpread)) {
      spread = spread_around(m, mean);
    }
    return {mean, 1.0f / __builtin_sqrtf(spread * share + a.eps)};
  }

  // sum of (s - mean)^2, less what the rounding of the mean adds.
  [[gnu::noinline]] float spread_around(int64_t m, float mean) const {
    const int64_t K = a.K;
    Vf sum[kStatVecs], square[kStatVecs];
    for (int v = 0; v < kStatVecs; ++v) sum[v] = square[v] = Isa::set1(0.0f);
    const Vf centre = Isa::set1(mean);
    each_vector(K, [&](int v, int64_t k) __attribute__((always_inline)) {
      Vf d = Isa::sub(load_s(m, k), centre);
      if (k + Isa::kLanes > K) d = first_lanes(d, K - k);
      sum[v] = Isa::add(sum[v], d);
      square[v] = Isa::add(square[v], Isa::mul(d, d));
    });
    const float squares = add_lanes(square), total = add_lanes(sum);
    const float spread = squares - total * (total / static_cast<float>(K));
    return spread >= 0.0f ? spread : squares;
  }

  // y in scratch (and where it is wanted); returns the bits of its largest magnitude.
  int32_t normalize(int64_t m, const Moments& moments) const {
    const int64_t K = a.K;
    const Vf mean = Isa::set1(moments.mean), inverse = Isa::set1(moments.inverse);
    Vi largest[kStatVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kStatVecs; ++v) largest[v] = Isa::zero_i();
    each_vector(K, [&](int v, int64_t k) __attribute__((always_inline)) {
      Vf y = load_s(m, k);
      if constexpr (!kRms) y = Isa::sub(y, mean);
      y = Isa::mul(y, inverse);
      if (a.weight) y = Isa::mul(y, load(a.weight, Dtype::f32, k, K));
      if (a.bias) y = Isa::add(y, load(a.bias, Dtype::f32, k, K));
      y = rounded<kDtype>(y);
      if (k + Isa::kLanes > K) y = first_lanes(y, K - k);
      if (a.y) store_row<kDtype>(element(a.y, kDtype, m * K), k, K, y);
      Isa::store(a.scratch + k, y);
      largest[v] = Isa::max_i(largest[v], Isa::and_i(Isa::bits(y), magnitude));
    });
    for (int v = 1; v < kStatVecs; ++v) largest[0] = Isa::max_i(largest[0], largest[v]);
    return Isa::reduce_max(largest[0]);
  }

  // Reductions take as long as a third of a pass: each is followed by work that does not wait for it.
  void run() const {
    Moments next = moments(0);
    for (int64_t m = 0; m < a.M; ++m) {
      const int32_t absmax = normalize(m, next);
      if (m + 1 < a.M) next = moments(m + 1);
      quantize_by<Dtype::f32, false>(a.scratch, a.K, absmax, a.q + m * a.K, a.scale + m, a.row_sum + m);
    }
  }
};

template <Dtype kDtype>
void norm_rows(const NormArgs& a) {
  if (a.rms) {
    a.residual.x ? Norm<kDtype, true, true>{a}.run() : Norm<kDtype, false, true>{a}.run();
  } else {
    a.residual.x ? Norm<kDtype, true, false>{a}.run() : Norm<kDtype, false, false>{a}.run();
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
