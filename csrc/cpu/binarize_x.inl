// Float rows to rows of bits and a scale: the formula of BinarizeArgs in kernel_table.h, one pass over a row.

namespace tersor::TERSOR_ISA {
namespace {

// Sums along a row go to lane k mod 64 on every instruction set: enough registers to hide the latency of an addition.
constexpr int kSumLanes = 64;
constexpr int kSumVecs = kSumLanes / Isa::kLanes;

// Comparisons leave element k of a word at bit k. A 1-bit tile wants k = 4j + b at bit 8b + j: the five bits of the index, (j2 j1
// j0 b1 b0) from the top, become (b1 b0 j2 j1 j0). Each step exchanges two bits of the index.
template <int kDistance>
Vi exchange(Vi words, int32_t mask) {
  const Vi differ = Isa::and_i(Isa::xor_i(Isa::shr<kDistance>(words), words), Isa::set1_i(mask));
  return Isa::xor_i(words, Isa::xor_i(differ, Isa::shl<kDistance>(differ)));
}
inline Vi to_tile_order(Vi words) {
  words = exchange<3>(words, 0x0a0a0a0a);   // index bits 0 and 2
  words = exchange<6>(words, 0x00cc00cc);   // 1 and 3
  words = exchange<12>(words, 0x0000f0f0);  // 2 and 4
  return exchange<8>(words, 0x0000ff00);    // 3 and 4
}
inline void to_tile_order(uint8_t* bits, int64_t bytes) {
  constexpr int64_t kVecBytes = 4 * Isa::kLanes;
  int64_t i = 0;
  for (; i + kVecBytes <= bytes; i += kVecBytes) Isa::store_i(bits + i, to_tile_order(Isa::load_i(bits + i)));
  if (i < bytes) {
    uint8_t last[kVecBytes] = {};
    __builtin_memcpy(last, bits + i, static_cast<size_t>(bytes - i));
    Isa::store_i(last, to_tile_order(Isa::load_i(last)));
    __builtin_memcpy(bits + i, last, static_cast<size_t>(bytes - i));
  }
}

// The 64 sums in a tree: (s[i] + s[16 + i]) + (s[32 + i] + s[48 + i]), then halves, 8, 4, 2, 1.
inline float add_lanes(Vf (&sums)[kSumVecs]) {
  constexpr int kRun = kSumVecs / 4;  // registers of 16 lanes
  TERSOR_UNROLL(4)
  for (int i = 0; i < kRun; ++i) {
    sums[i] = Isa::add(Isa::add(sums[i], sums[kRun + i]), Isa::add(sums[2 * kRun + i], sums[3 * kRun + i]));
  }
  TERSOR_UNROLL(2)
  for (int half = kRun / 2; half > 0; half /= 2) {
    TERSOR_UNROLL(2)
    for (int i = 0; i < half; ++i) sums[i] = Isa::add(sums[i], sums[half + i]);
  }
  return Isa::reduce_add(sums[0]);
}

template <Dtype kDtype>
void binarize_row(const void* x, const float* threshold, int64_t K, uint8_t* bits, float* scale) {
  const Vf share = Isa::set1(1.0f / static_cast<float>(K));
  Vf sums[kSumVecs];
  TERSOR_UNROLL(16)
  for (int v = 0; v < kSumVecs; ++v) sums[v] = Isa::set1(0.0f);

  auto add = [&](int v, Vf value, Vf limit) TERSOR_INLINE_LAMBDA {
    sums[v] = Isa::add(sums[v], Isa::mul(abs_(Isa::sub(value, limit)), share));
    return static_cast<uint64_t>(Isa::mask_ge(value, limit)) << v * Isa::kLanes;
  };
  int64_t k = 0;
  for (; k + kSumLanes <= K; k += kSumLanes) {
    uint64_t words = 0;
    TERSOR_UNROLL(16)
    for (int v = 0; v < kSumVecs; ++v) {
      const int64_t at = k + v * Isa::kLanes;
      words |= add(v, load_as(x, kDtype, at), Isa::load(threshold + at));
    }
    __builtin_memcpy(bits + k / 8, &words, 8);
  }
  if (k < K) {
    uint64_t words = 0;
    for (int v = 0; v < kSumVecs && k + v * Isa::kLanes < K; ++v) {
      const int64_t at = k + v * Isa::kLanes;
      const bool whole = at + Isa::kLanes <= K;
      words |= add(v, whole ? load_as(x, kDtype, at) : load_tail(x, kDtype, at, K),
                   whole ? Isa::load(threshold + at) : load_tail(threshold, Dtype::f32, at, K));
    }
    words &= (uint64_t{1} << (K - k)) - 1;  // pads compare as 0 >= 0
    __builtin_memcpy(bits + k / 8, &words, K - k > 32 ? 8 : 4);
  }
  to_tile_order(bits, ceil_div(K, 32) * 4);

  *scale = add_lanes(sums);
  // NaN or inf in the row makes the sum NaN or inf; so may finite values beyond the float range, which stay.
  if (!(__builtin_fabsf(*scale) <= __FLT_MAX__) && absmax_bits<kDtype>(x, K) >= kInfBits) {
    __builtin_memset(bits, 0, static_cast<size_t>(ceil_div(K, 32) * 4));
    *scale = __builtin_nanf("");
  }
}

template <Dtype kDtype>
void binarize_rows(const BinarizeArgs& a) {
  for (int64_t m = 0; m < a.M; ++m) {
    const char* x = static_cast<const char*>(a.x.x) + m * a.x.ld * dtype_bytes(kDtype);
    binarize_row<kDtype>(x, a.threshold, a.K, a.bits + m * a.ld_bits, a.scale + m);
  }
}

void binarize_x(const BinarizeArgs& a) {
  switch (a.x.dtype) {
    case Dtype::f32:
      return binarize_rows<Dtype::f32>(a);
    case Dtype::bf16:
      return binarize_rows<Dtype::bf16>(a);
    case Dtype::f16:
      return binarize_rows<Dtype::f16>(a);
    case Dtype::s32:
      return;
  }
}

}  // namespace
}  // namespace tersor::TERSOR_ISA
