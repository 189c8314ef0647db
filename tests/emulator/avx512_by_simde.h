// The AVX-512 of our variants on a CPU without it, by SIMDe (https://github.com/simd-everywhere/simde, 0.7.4): included before the
// source of a variant that is compiled for AVX2. Its own aliases serve most of the vocabulary; what it lacks, or what it would
// round otherwise, stands below. For tests: it says what the source computes, not how fast.
#pragma once

#include <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#if defined(SIMDE_X86_AVX512F_NATIVE) || !defined(SIMDE_X86_AVX2_NATIVE) || !defined(SIMDE_X86_FMA_NATIVE)
#error "the sources of AVX-512 go through SIMDe with the flags of AVX2, FMA and F16C, and without -mavx512"
#endif

namespace tersor::simde {
namespace {

// A vector as two of 256 bits.
template <typename Whole, typename Half>
struct Halves {
  Half low, high;
  static Halves of(Whole v) {
    Halves h;
    __builtin_memcpy(&h, &v, sizeof h);
    return h;
  }
  Whole whole() const {
    Whole v;
    __builtin_memcpy(&v, this, sizeof v);
    return v;
  }
};
using I = Halves<__m512i, __m256i>;
using F = Halves<__m512, __m256>;

inline __m512i srai_epi32(__m512i v, unsigned bits) {
  const I h = I::of(v);
  const int count = static_cast<int>(bits);
  return I{_mm256_srai_epi32(h.low, count), _mm256_srai_epi32(h.high, count)}.whole();
}
inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const F x = F::of(a), y = F::of(b), z = F::of(c);
  return F{_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)}.whole();
}
inline __m512 min_ps(__m512 a, __m512 b) {
  const F x = F::of(a), y = F::of(b);
  return F{_mm256_min_ps(x.low, y.low), _mm256_min_ps(x.high, y.high)}.whole();
}
inline __m512 max_ps(__m512 a, __m512 b) {
  const F x = F::of(a), y = F::of(b);
  return F{_mm256_max_ps(x.low, y.low), _mm256_max_ps(x.high, y.high)}.whole();
}
inline __m512 cvtepi32_ps(__m512i v) {
  const I h = I::of(v);
  return F{_mm256_cvtepi32_ps(h.low), _mm256_cvtepi32_ps(h.high)}.whole();
}
inline __m512i cvtps_epi32(__m512 v) {
  const F h = F::of(v);
  return I{_mm256_cvtps_epi32(h.low), _mm256_cvtps_epi32(h.high)}.whole();
}
inline __m512i cvtepu16_epi32(__m256i v) {
  return I{_mm256_cvtepu16_epi32(_mm256_castsi256_si128(v)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(v, 1))}.whole();
}
inline __m256i cvtepi32_epi16(__m512i v) {
  uint32_t word[16];
  uint16_t half[16];
  __builtin_memcpy(word, &v, sizeof word);
  for (int i = 0; i < 16; ++i) half[i] = static_cast<uint16_t>(word[i]);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(half));
}
inline __m512 cvtph_ps(__m256i v) {
  return F{_mm256_cvtph_ps(_mm256_castsi256_si128(v)), _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1))}.whole();
}
template <int kRounding>
__m256i cvtps_ph(__m512 v) {
  const F h = F::of(v);
  return _mm256_set_m128i(_mm256_cvtps_ph(h.high, kRounding), _mm256_cvtps_ph(h.low, kRounding));
}
inline int32_t reduce_add_epi32(__m512i v) {
  uint32_t word[16], sum = 0;
  __builtin_memcpy(word, &v, sizeof word);
  for (uint32_t w : word) sum += w;
  return static_cast<int32_t>(sum);
}
inline int32_t reduce_max_epi32(__m512i v) {
  int32_t word[16];
  __builtin_memcpy(word, &v, sizeof word);
  int32_t most = word[0];
  for (int32_t w : word) most = w > most ? w : most;
  return most;
}
inline __m512i maskz_expand_epi8(uint64_t mask, __m512i v) {
  uint8_t from[64], to[64];
  __builtin_memcpy(from, &v, sizeof from);
  int next = 0;
  for (int i = 0; i < 64; ++i) to[i] = mask >> i & 1 ? from[next++] : uint8_t{0};
  __builtin_memcpy(&v, to, sizeof to);
  return v;
}

}  // namespace
}  // namespace tersor::simde

// clang-format off
#undef _mm512_fmadd_ps
#undef _mm512_min_ps
#undef _mm512_max_ps
#undef _mm512_shuffle_f64x2
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtps_epi32
#undef _mm512_cvtps_ph
#define _mm512_fmadd_ps ::tersor::simde::fmadd_ps
#define _mm512_min_ps ::tersor::simde::min_ps
#define _mm512_max_ps ::tersor::simde::max_ps
#define _mm512_srai_epi32 ::tersor::simde::srai_epi32
#define _mm512_cvtepi32_ps ::tersor::simde::cvtepi32_ps
#define _mm512_cvtps_epi32 ::tersor::simde::cvtps_epi32
#define _mm512_cvtepu16_epi32 ::tersor::simde::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 ::tersor::simde::cvtepi32_epi16
#define _mm512_cvtph_ps ::tersor::simde::cvtph_ps
#define _mm512_cvtps_ph(v, rounding) ::tersor::simde::cvtps_ph<rounding>(v)
#define _mm512_extractf32x8_ps(v, half) ((half) ? ::tersor::simde::F::of(v).high : ::tersor::simde::F::of(v).low)
#define _mm512_reduce_add_epi32 ::tersor::simde::reduce_add_epi32
#define _mm512_reduce_max_epi32 ::tersor::simde::reduce_max_epi32
#define _mm512_maskz_expand_epi8 ::tersor::simde::maskz_expand_epi8
#define _mm512_shuffle_f64x2(a, b, order) simde_mm512_shuffle_f64x2(a, b, order)
#define _mm512_stream_ps _mm512_storeu_ps
// clang-format on
