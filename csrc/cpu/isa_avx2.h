// Vector vocabulary of AVX2 with FMA and F16C: two 256-bit registers hold one tile, 8 channels each.
// Each function of the vocabulary is described once, in isa_scalar.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "isa_expand_table.h"

namespace tersor::TERSOR_ISA {
namespace {

// One of two types; the standard library's own may not be instantiated in a variant (see variant.cpp).
template <bool kFirst, typename A, typename B>
struct ChooseType {
  using type = A;
};
template <typename A, typename B>
struct ChooseType<false, A, B> {
  using type = B;
};
template <bool kFirst, typename A, typename B>
using Choose = typename ChooseType<kFirst, A, B>::type;

struct Avx2 {
  static constexpr bool kAllKernels = true;
  static constexpr bool kMatrixUnit = false;
  static constexpr int kLanes = 8;
  using Vi = __m256i;
  using Vf = __m256;

  static Vi zero_i() { return _mm256_setzero_si256(); }
  static Vi set1_i(int32_t v) { return _mm256_set1_epi32(v); }
  static Vi load_i(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store_i(void* p, Vi v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static Vi add_i(Vi a, Vi b) { return _mm256_add_epi32(a, b); }
  static Vi sub_i(Vi a, Vi b) { return _mm256_sub_epi32(a, b); }
  static Vi max_i(Vi a, Vi b) { return _mm256_max_epi32(a, b); }
  static Vi and_i(Vi a, Vi b) { return _mm256_and_si256(a, b); }
  static Vi xor_i(Vi a, Vi b) { return _mm256_xor_si256(a, b); }
  static Vi select_gt(Vi a, Vi b, Vi yes, Vi no) { return _mm256_blendv_epi8(no, yes, _mm256_cmpgt_epi32(a, b)); }
  template <int kBits>
  static Vi shl(Vi a) {
    return _mm256_slli_epi32(a, kBits);
  }
  template <int kBits>
  static Vi shr(Vi a) {
    return _mm256_srli_epi32(a, kBits);
  }
  template <int kBits>
  static Vi sar(Vi a) {
    return _mm256_srai_epi32(a, kBits);
  }
  static Vi sar_by(Vi a, int bits) { return _mm256_srai_epi32(a, bits); }
  static int32_t reduce_add(Vi a) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
    return _mm_cvtsi128_si32(s);
  }
  static int32_t reduce_max(Vi a) {
    __m128i s = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1));
    return _mm_cvtsi128_si32(s);
  }

  static Vf set1(float v) { return _mm256_set1_ps(v); }
  static Vf load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vf v) { _mm256_storeu_ps(p, v); }
  static void stream(float* p, Vf v) { _mm256_stream_ps(p, v); }
  static void stream_fence() { _mm_sfence(); }
  static Vf add(Vf a, Vf b) { return _mm256_add_ps(a, b); }
  static Vf sub(Vf a, Vf b) { return _mm256_sub_ps(a, b); }
  static Vf mul(Vf a, Vf b) { return _mm256_mul_ps(a, b); }
  static Vf div(Vf a, Vf b) { return _mm256_div_ps(a, b); }
  static Vf min_(Vf a, Vf b) { return _mm256_min_ps(a, b); }
  static Vf max_(Vf a, Vf b) { return _mm256_max_ps(a, b); }
  static Vf muladd(Vf a, Vf b, Vf c) { return fma(a, b, c); }
  static Vf fma(Vf a, Vf b, Vf c) { return _mm256_fmadd_ps(a, b, c); }
  static float reduce_add(Vf a) { return reduce_add(_mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1))); }
  static float reduce_add(__m128 a) {
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
  }
  static Vf to_f32(Vi v) { return _mm256_cvtepi32_ps(v); }
  static uint32_t mask_ge(Vf a, Vf b) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ))); }
  static Vi round(Vf v) { return _mm256_cvtps_epi32(v); }
  static Vi bits(Vf v) { return _mm256_castps_si256(v); }
  static Vf from_bits(Vi v) { return _mm256_castsi256_ps(v); }

  static Vi load_u16(const uint16_t* p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void store_u16(uint16_t* p, Vi v) {
    const __m256i low = _mm256_and_si256(v, _mm256_set1_epi32(0xffff));  // packus saturates: keep 16 bits
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static Vf load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void store_f16(uint16_t* p, Vf v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static Vi pack_s8(Vi a, Vi b, Vi c, Vi d) {
    const Vi order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing works within 128 bits
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d)), order);
  }
  static Vi add_s8(Vi acc, Vi packed) {
    const Vi pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), packed);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }

  // Exact u8*s8 without VNNI. vpmaddubsw would saturate its s16 pair sums (255*127*2 = 64770 > 32767), so both sides are widened to
  // s16 and vpmaddwd adds pairs into s32. Bytes 0 and 2 of a word are its even half, 1 and 3 its odd half: masking and shifting
  // 16-bit lanes splits the codes in two instructions, and no lane ever mixes two channels. The rows are split once per block:
  //   widened row  [ K/4 ][ even: k0 k2 | odd: k1 k3 ] s16, 8 bytes a k step
  struct Dot8 {
    struct W {
      __m256i even, odd;
    };
    struct X {
      __m256i even, odd;
    };
    static constexpr int kXBytesPerK = 2;
    static constexpr int kPartialSteps = 0;
    static constexpr bool kSigned = false, kPairs = false;
    static void split_x(const int8_t* q, int64_t words, char* out) {
      const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
      int64_t s = 0;
      for (; s + 4 <= words; s += 4) {
        const __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q + 4 * s));
        store_i(out + 8 * s, _mm256_cvtepi8_epi16(_mm_shuffle_epi8(four, order)));
      }
      for (; s < words; ++s) {
        const int16_t halves[4] = {q[4 * s], q[4 * s + 2], q[4 * s + 1], q[4 * s + 3]};
        __builtin_memcpy(out + 8 * s, halves, 8);
      }
    }
    static W codes(const uint8_t* p, int) {
      const __m256i w = load_i(p);
      return {_mm256_and_si256(w, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(w, 8)};
    }
    static X load_x(const char* p) {
      int32_t even, odd;
      __builtin_memcpy(&even, p, 4);
      __builtin_memcpy(&odd, p + 4, 4);
      return {_mm256_set1_epi32(even), _mm256_set1_epi32(odd)};
    }
    static Vi dot4(Vi acc, const W& w, const X& x) {
      acc = _mm256_add_epi32(acc, _mm256_madd_epi16(w.even, x.even));
      opaque(acc);  // gcc 12 would form all products of a step first and spill every accumulator to make room
      acc = _mm256_add_epi32(acc, _mm256_madd_epi16(w.odd, x.odd));
      opaque(acc);
      return acc;
    }
    static Vi widen(Vi acc) { return acc; }
  };
  // Of few bits vpmaddubsw is exact, and its pair sums may be added in s16 for a while: a step adds at most 2 * 128 * (2^bits - 1)
  // to a lane, 3840, 768 or 256, of 32767.
  template <int kBits>
  struct DotFew {
    using W = __m256i;
    using X = __m256i;
    static constexpr int kXBytesPerK = 1;
    static constexpr int kPartialSteps = kBits == 4 ? 8 : kBits == 2 ? 32 : 64;
    static constexpr bool kSigned = false, kPairs = false;
    static_assert(kPartialSteps * 256 * ((1 << kBits) - 1) <= 32767);
    static W codes(const uint8_t* p, int j) {
      return _mm256_and_si256(_mm256_srli_epi32(load_i(p), kBits * j), _mm256_set1_epi8((1 << kBits) - 1));
    }
    static X load_x(const char* p) {
      int32_t word;
      __builtin_memcpy(&word, p, 4);
      return _mm256_set1_epi32(word);
    }
    static Vi dot4(Vi acc, W w, X x) {
      acc = _mm256_add_epi16(acc, _mm256_maddubs_epi16(w, x));
      opaque(acc);
      return acc;
    }
    static Vi widen(Vi acc) { return _mm256_madd_epi16(acc, _mm256_set1_epi16(1)); }
  };
  template <int kBits>
  using Dot = Choose<kBits == 8, Dot8, DotFew<kBits>>;

  // s8 x s8: both sides sign-extended, in the halves of Dot8.
  struct SignedDot {
    using W = Dot8::W;
    using X = Dot8::X;
    static constexpr int kXBytesPerK = 2;
    static constexpr int kSumShift = -1;
    static void prepare(const int8_t* q, int64_t K, char* out) {
      const int64_t whole = K / 4;
      Dot8::split_x(q, whole, out);
      if (whole * 4 == K) return;
      int8_t last[4] = {};
      __builtin_memcpy(last, q + whole * 4, static_cast<size_t>(K - whole * 4));
      Dot8::split_x(last, 1, out + whole * 8);
    }
    static void prepare_bytes(const int8_t* q, int64_t K, char* out) { __builtin_memcpy(out, q, static_cast<size_t>(K)); }
    static W split(__m256i w) { return {_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), _mm256_srai_epi16(w, 8)}; }
    static W load_w(const uint8_t* p) { return split(load_i(p)); }
    static X load_x(const char* p) { return Dot8::load_x(p); }
    static Vi dot4(Vi acc, const W& w, const X& x) { return Dot8::dot4(acc, w, x); }
    static Vi dot_bytes(Vi acc, Vi x, Vi w) {
      const W a = split(x), b = split(w);
      return dot4(acc, b, X{a.even, a.odd});
    }
  };
  static uint32_t high_bits16(const uint8_t* p) {
    return static_cast<uint32_t>(_mm_movemask_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static Vi lookup(const char* window, Vi index) {
    const __m256i part = _mm256_and_si256(index, _mm256_set1_epi8(0x70)), at = _mm256_and_si256(index, _mm256_set1_epi8(15));
    __m256i found = _mm256_setzero_si256();
    TERSOR_UNROLL(8)
    for (int i = 0; i < 8; ++i) {
      const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(window) + i));
      const __m256i here = _mm256_cmpeq_epi8(part, _mm256_set1_epi8(static_cast<char>(16 * i)));
      found = _mm256_or_si256(found, _mm256_and_si256(here, _mm256_shuffle_epi8(table, at)));
    }
    return found;
  }
  static void expand_tile(uint64_t mask, const uint8_t* values, uint8_t* tile) { expand_by_table(mask, values, tile); }

  static void transpose16(const float* in, int64_t ld_in, float* out, int64_t ld_out) {
    for (int64_t c = 0; c < 16; ++c) {
      for (int64_t r = 0; r < 16; ++r) out[c * ld_out + r] = in[r * ld_in + c];
    }
  }

  // The bits of each half byte from a table, counted in bytes: 31 times 8 fits one.
  struct Popcount {
    static constexpr int kPartialSteps = 31;
    static Vi add(Vi acc, Vi a) {
      const Vi table =
          _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
      const Vi low = _mm256_set1_epi8(15);
      acc = _mm256_add_epi8(acc, _mm256_shuffle_epi8(table, _mm256_and_si256(a, low)));
      acc = _mm256_add_epi8(acc, _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(a, 4), low)));
      opaque(acc);
      return acc;
    }
    static Vi widen(Vi acc) { return _mm256_madd_epi16(_mm256_maddubs_epi16(acc, _mm256_set1_epi8(1)), _mm256_set1_epi16(1)); }
  };
  static void opaque(Vi& v) { TERSOR_OPAQUE("x", v); }
  static void opaque(Vf& v) { TERSOR_OPAQUE("x", v); }
  static void opaque(Dot8::W& w) {
    TERSOR_OPAQUE("x", w.even);
    TERSOR_OPAQUE("x", w.odd);
  }
  static void opaque(Dot8::X& x) {
    TERSOR_OPAQUE("x", x.even);
    TERSOR_OPAQUE("x", x.odd);
  }

  // 16 registers hold 4 rows x 1 tile: 8 accumulators, 4 halves of codes, 2 of x, one product.
  static constexpr int kMaxRows = 4;
  static constexpr int kXnorMaxRows = 4;
  static constexpr int max_tiles(int rows) { return rows == 1 ? 2 : 1; }
  static constexpr int acc_sets(int rows, int) { return rows == 1 ? 2 : 1; }
  static constexpr int kInPlaceRows = 0;  // shifted back after the narrow sums would not do
  static constexpr int stream_tiles(int, int, int64_t) { return 0; }
  static constexpr int xnor_stream_tiles(int rows) { return rows <= 2 ? 1 : 0; }
  static constexpr int prefetch_rows(int) { return 1; }
  static constexpr int kGroupedMaxRows = 2;
  static constexpr int grouped_tiles(int) { return 1; }
  static constexpr int kSparseMaxRows = 4;
  static constexpr int sparse_sets(int) { return 1; }
  // Float GEMM: 6 x 2 accumulators, 2 weights, a broadcast.
  static constexpr int kFloatMaxRows = 6;
  static constexpr int kFloatTiles = 1;
};

#ifndef TERSOR_ISA_EXTENDED  // by a header that builds on this one
using Isa = Avx2;
#endif

}  // namespace
}  // namespace tersor::TERSOR_ISA
