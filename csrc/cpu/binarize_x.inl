// Float rows to rows of bits and a scale: the formula of BinarizeArgs in kernel_table.h, one pass over a row.

namespace tersor::TERSOR_ISA {
namespace {

constexpr int kMeanLanes = 64;  // sums of |x - threshold|, lane k mod 64: the same on every instruction set

// Within a word element k stands at bit k. A 1-bit tile wants k = 4j + b at bit 8b + j: the five bits of the index, (j2 j1 j0 b1
// b0) from the top, become (b1 b0 j2 j1 j0). Each step below exchanges two bits of the index, in two words at once.
inline uint64_t to_tile_order(uint64_t words) {
  auto exchange = [&](int distance, uint64_t mask) {
    const uint64_t differ = (words >> distance ^ words) & mask;
    words ^= differ ^ differ << distance;
  };
  exchange(3, 0x0a0a0a0a0a0a0a0a);   // index bits 0 and 2
  exchange(6, 0x00cc00cc00cc00cc);   // 1 and 3
  exchange(12, 0x0000f0f00000f0f0);  // 2 and 4
  exchange(8, 0x0000ff000000ff00);   // 3 and 4
  return words;
}

// The 64 sums in a tree: runs of 16 lanes first, then halves.
inline float add_lanes(float (&sums)[kMeanLanes]) {
  for (int i = 0; i < 16; ++i) sums[i] = (sums[i] + sums[16 + i]) + (sums[32 + i] + sums[48 + i]);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] = sums[i] + sums[half + i];
  }
  return sums[0];
}

template <Dtype kDtype>
void binarize_row(const void* x, const float* threshold, int64_t K, uint8_t* bits, float* scale) {
  constexpr int kVecs = kMeanLanes / Isa::kLanes;
  const Vf share = Isa::set1(1.0f / static_cast<float>(K));
  Vf sums[kVecs];
#pragma GCC unroll 16
  for (int v = 0; v < kVecs; ++v) sums[v] = Isa::set1(0.0f);

  auto add = [&](int v, Vf value, Vf limit) __attribute__((always_inline)) {
    sums[v] = Isa::add(sums[v], Isa::mul(abs_(Isa::sub(value, limit)), share));
    return static_cast<uint64_t>(Isa::mask_ge(value, limit)) << v * Isa::kLanes;
  };
  int64_t k = 0;
  for (; k + kMeanLanes <= K; k += kMeanLanes) {
    uint64_t words = 0;
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) {
      const int64_t at = k + v * Isa::kLanes;
      words |= add(v, load_as(x, kDtype, at), Isa::load(threshold + at));
    }
    words = to_tile_order(words);
    __builtin_memcpy(bits + k / 8, &words, 8);
  }
  if (k < K) {
    uint64_t words = 0;
    for (int v = 0; v < kVecs && k + v * Isa::kLanes < K; ++v) {
      const int64_t at = k + v * Isa::kLanes;
      const bool whole = at + Isa::kLanes <= K;
      words |= add(v, whole ? load_as(x, kDtype, at) : load_tail(x, kDtype, at, K),
                   whole ? Isa::load(threshold + at) : load_tail(threshold, Dtype::f32, at, K));
    }
    words = to_tile_order(words & ((uint64_t{1} << (K - k)) - 1));  // pads compare as 0 >= 0
    __builtin_memcpy(bits + k / 8, &words, K - k > 32 ? 8 : 4);
  }

  float lanes[kMeanLanes];
#pragma GCC unroll 16
  for (int v = 0; v < kVecs; ++v) Isa::store(lanes + v * Isa::kLanes, sums[v]);
  *scale = add_lanes(lanes);
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
