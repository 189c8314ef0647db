// Vector vocabulary of SSE4.1, for x86 without AVX2: four 128-bit registers hold one tile, 4 channels each.
// Each function of the vocabulary is described once, in isa_scalar.h, which also has what SSE lacks: fma and 16-bit floats.
#pragma once

#include <smmintrin.h>

#include <cstdint>

#define TERSOR_ISA_EXTENDED
#include "isa_expand_table.h"
#include "isa_scalar.h"

namespace tersor::TERSOR_ISA {
namespace {

struct Isa {
  static constexpr bool kAllKernels = true;
  static constexpr bool kMatrixUnit = false;
  static constexpr int kLanes = 4;
  using Vi = __m128i;
  using Vf = __m128;

  static Vi zero_i() { return _mm_setzero_si128(); }
  static Vi set1_i(int32_t v) { return _mm_set1_epi32(v); }
  static Vi load_i(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static void store_i(void* p, Vi v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
  static Vi add_i(Vi a, Vi b) { return _mm_add_epi32(a, b); }
  static Vi sub_i(Vi a, Vi b) { return _mm_sub_epi32(a, b); }
  static Vi max_i(Vi a, Vi b) { return _mm_max_epi32(a, b); }
  static Vi and_i(Vi a, Vi b) { return _mm_and_si128(a, b); }
  static Vi xor_i(Vi a, Vi b) { return _mm_xor_si128(a, b); }
  static Vi select_gt(Vi a, Vi b, Vi yes, Vi no) { return _mm_blendv_epi8(no, yes, _mm_cmpgt_epi32(a, b)); }
  template <int kBits>
  static Vi shl(Vi a) {
    return _mm_slli_epi32(a, kBits);
  }
  template <int kBits>
  static Vi shr(Vi a) {
    return _mm_srli_epi32(a, kBits);
  }
  template <int kBits>
  static Vi sar(Vi a) {
    return _mm_srai_epi32(a, kBits);
  }
  static Vi sar_by(Vi a, int bits) { return _mm_srai_epi32(a, bits); }
  static int32_t reduce_add(Vi s) {
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }
  static int32_t reduce_max(Vi s) {
    s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }

  static Vf set1(float v) { return _mm_set1_ps(v); }
  static Vf load(const float* p) { return _mm_loadu_ps(p); }
  static void store(float* p, Vf v) { _mm_storeu_ps(p, v); }
  static void stream(float* p, Vf v) { _mm_stream_ps(p, v); }
  static void stream_fence() { _mm_sfence(); }
  static Vf add(Vf a, Vf b) { return _mm_add_ps(a, b); }
  static Vf sub(Vf a, Vf b) { return _mm_sub_ps(a, b); }
  static Vf mul(Vf a, Vf b) { return _mm_mul_ps(a, b); }
  static Vf div(Vf a, Vf b) { return _mm_div_ps(a, b); }
  static Vf min_(Vf a, Vf b) { return _mm_min_ps(a, b); }
  static Vf max_(Vf a, Vf b) { return _mm_max_ps(a, b); }
  static Vf muladd(Vf a, Vf b, Vf c) { return add(mul(a, b), c); }
  static Vf fma(Vf a, Vf b, Vf c) {
    float x[kLanes], y[kLanes], z[kLanes];
    store(x, a), store(y, b), store(z, c);
    for (int i = 0; i < kLanes; ++i) z[i] = Scalar::round_once(x[i], y[i], z[i]);
    return load(z);
  }
  static float reduce_add(Vf a) {
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps(a, a, 1)));
  }
  static Vf to_f32(Vi v) { return _mm_cvtepi32_ps(v); }
  static uint32_t mask_ge(Vf a, Vf b) { return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpge_ps(a, b))); }
  static Vi round(Vf v) { return _mm_cvtps_epi32(v); }
  static Vi bits(Vf v) { return _mm_castps_si128(v); }
  static Vf from_bits(Vi v) { return _mm_castsi128_ps(v); }

  static Vi load_u16(const uint16_t* p) { return _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
  static void store_u16(uint16_t* p, Vi v) {
    const Vi low = _mm_and_si128(v, _mm_set1_epi32(0xffff));  // packus saturates: keep 16 bits
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, low));
  }
  static Vf load_f16(const uint16_t* p) {
    return _mm_setr_ps(Scalar::half_to_float(p[0]), Scalar::half_to_float(p[1]), Scalar::half_to_float(p[2]),
                       Scalar::half_to_float(p[3]));
  }
  static void store_f16(uint16_t* p, Vf v) {
    float lanes[kLanes];
    store(lanes, v);
    for (int i = 0; i < kLanes; ++i) p[i] = Scalar::float_to_half(lanes[i]);
  }
  static Vi pack_s8(Vi a, Vi b, Vi c, Vi d) { return _mm_packs_epi16(_mm_packs_epi32(a, b), _mm_packs_epi32(c, d)); }
  static Vi add_s8(Vi acc, Vi packed) {
    return _mm_add_epi32(acc, _mm_madd_epi16(_mm_maddubs_epi16(_mm_set1_epi8(1), packed), _mm_set1_epi16(1)));
  }

  // The halves of isa_avx2.h, 128 bits wide.
  struct Dot8 {
    struct W {
      __m128i even, odd;
    };
    using X = W;
    static constexpr int kXBytesPerK = 2;
    static constexpr int kPartialSteps = 0;
    static constexpr bool kSigned = false, kPairs = false;
    static void split_x(const int8_t* q, int64_t words, char* out) {
      const Vi order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, -1, -1, -1, -1, -1, -1, -1, -1);
      int64_t s = 0;
      for (; s + 2 <= words; s += 2) {
        const Vi two = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(q + 4 * s));
        store_i(out + 8 * s, _mm_cvtepi8_epi16(_mm_shuffle_epi8(two, order)));
      }
      if (s < words) {
        const int16_t halves[4] = {q[4 * s], q[4 * s + 2], q[4 * s + 1], q[4 * s + 3]};
        __builtin_memcpy(out + 8 * s, halves, 8);
      }
    }
    static W codes(const uint8_t* p, int) {
      const Vi w = load_i(p);
      return {_mm_and_si128(w, _mm_set1_epi16(0xff)), _mm_srli_epi16(w, 8)};
    }
    static X load_x(const char* p) {
      int32_t even, odd;
      __builtin_memcpy(&even, p, 4);
      __builtin_memcpy(&odd, p + 4, 4);
      return {_mm_set1_epi32(even), _mm_set1_epi32(odd)};
    }
    static Vi dot4(Vi acc, const W& w, const X& x) {
      acc = _mm_add_epi32(acc, _mm_add_epi32(_mm_madd_epi16(w.even, x.even), _mm_madd_epi16(w.odd, x.odd)));
      opaque(acc);
      return acc;
    }
    static Vi widen(Vi acc) { return acc; }
  };
  template <int kBits>
  struct DotFew {
    using W = __m128i;
    using X = __m128i;
    static constexpr int kXBytesPerK = 1;
    static constexpr int kPartialSteps = kBits == 4 ? 8 : kBits == 2 ? 32 : 64;
    static constexpr bool kSigned = false, kPairs = false;
    static W codes(const uint8_t* p, int j) {
      return _mm_and_si128(_mm_srli_epi32(load_i(p), kBits * j), _mm_set1_epi8((1 << kBits) - 1));
    }
    static X load_x(const char* p) {
      int32_t word;
      __builtin_memcpy(&word, p, 4);
      return _mm_set1_epi32(word);
    }
    static Vi dot4(Vi acc, W w, X x) {
      acc = _mm_add_epi16(acc, _mm_maddubs_epi16(w, x));
      opaque(acc);
      return acc;
    }
    static Vi widen(Vi acc) { return _mm_madd_epi16(acc, _mm_set1_epi16(1)); }
  };
  template <int kBits, typename = void>
  struct ChooseDot {
    using type = DotFew<kBits>;
  };
  template <typename Unused>
  struct ChooseDot<8, Unused> {
    using type = Dot8;
  };
  template <int kBits>
  using Dot = typename ChooseDot<kBits>::type;

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
    static W split(Vi w) { return {_mm_srai_epi16(_mm_slli_epi16(w, 8), 8), _mm_srai_epi16(w, 8)}; }
    static W load_w(const uint8_t* p) { return split(load_i(p)); }
    static X load_x(const char* p) { return Dot8::load_x(p); }
    static Vi dot4(Vi acc, const W& w, const X& x) { return Dot8::dot4(acc, w, x); }
    static Vi dot_bytes(Vi acc, Vi x, Vi w) { return dot4(acc, split(w), split(x)); }
  };
  static uint32_t high_bits16(const uint8_t* p) { return static_cast<uint32_t>(_mm_movemask_epi8(load_i(p))); }
  static Vi lookup(const char* window, Vi index) {
    const Vi part = _mm_and_si128(index, _mm_set1_epi8(0x70)), at = _mm_and_si128(index, _mm_set1_epi8(15));
    Vi found = zero_i();
    TERSOR_UNROLL(8)
    for (int i = 0; i < 8; ++i) {
      const Vi here = _mm_cmpeq_epi8(part, _mm_set1_epi8(static_cast<char>(16 * i)));
      found = _mm_or_si128(found, _mm_and_si128(here, _mm_shuffle_epi8(load_i(window + 16 * i), at)));
    }
    return found;
  }
  static void expand_tile(uint64_t mask, const uint8_t* values, uint8_t* tile) { expand_by_table(mask, values, tile); }
  static void transpose16(const float* in, int64_t ld_in, float* out, int64_t ld_out) {
    Scalar::transpose16(in, ld_in, out, ld_out);
  }

  // The bits of each half byte from a table, counted in bytes: 31 times 8 fits one.
  struct Popcount {
    static constexpr int kPartialSteps = 31;
    static Vi add(Vi acc, Vi a) {
      const Vi table = _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4), low = _mm_set1_epi8(15);
      acc = _mm_add_epi8(acc, _mm_shuffle_epi8(table, _mm_and_si128(a, low)));
      acc = _mm_add_epi8(acc, _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(a, 4), low)));
      opaque(acc);
      return acc;
    }
    static Vi widen(Vi acc) { return _mm_madd_epi16(_mm_maddubs_epi16(acc, _mm_set1_epi8(1)), _mm_set1_epi16(1)); }
  };
  template <typename V>
  static void opaque(V& v) {
    TERSOR_OPAQUE("x", v);
  }
  static void opaque(Dot8::W& w) {
    TERSOR_OPAQUE("x", w.even);
    TERSOR_OPAQUE("x", w.odd);
  }

  // 16 registers: 2 rows x 1 tile are 8 accumulators.
  static constexpr int kMaxRows = 2;
  static constexpr int kXnorMaxRows = 2;
  static constexpr int max_tiles(int) { return 1; }
  static constexpr int acc_sets(int, int) { return 1; }
  static constexpr int kInPlaceRows = 0;
  static constexpr int stream_tiles(int, int, int64_t) { return 0; }
  static constexpr int xnor_stream_tiles(int) { return 0; }
  static constexpr int prefetch_rows(int) { return kMaxRows / 2 + 1; }
  static constexpr int kGroupedMaxRows = 1;
  static constexpr int grouped_tiles(int) { return 1; }
  static constexpr int kSparseMaxRows = 2;
  static constexpr int sparse_sets(int) { return 1; }
  static constexpr int kFloatMaxRows = 2;
  static constexpr int kFloatTiles = 1;
};

}  // namespace
}  // namespace tersor::TERSOR_ISA
