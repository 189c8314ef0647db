// Vector vocabulary of AVX-512 with VNNI: one 512-bit register is one tile, 16 channels.
// Each function of the vocabulary is described once, in isa_scalar.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "isa_expand_table.h"

namespace tersor::TERSOR_ISA {
namespace {

struct Avx512Vnni {
  static constexpr bool kAllKernels = true;
  static constexpr bool kMatrixUnit = false;
  static constexpr int kLanes = 16;
  using Vi = __m512i;
  using Vf = __m512;

  static Vi zero_i() { return _mm512_setzero_si512(); }
  static Vi set1_i(int32_t v) { return _mm512_set1_epi32(v); }
  static Vi load_i(const void* p) { return _mm512_loadu_si512(p); }
  static void store_i(void* p, Vi v) { _mm512_storeu_si512(p, v); }
  static Vi add_i(Vi a, Vi b) { return _mm512_add_epi32(a, b); }
  static Vi sub_i(Vi a, Vi b) { return _mm512_sub_epi32(a, b); }
  static Vi max_i(Vi a, Vi b) { return _mm512_max_epi32(a, b); }
  static Vi and_i(Vi a, Vi b) { return _mm512_and_si512(a, b); }
  static Vi xor_i(Vi a, Vi b) { return _mm512_xor_si512(a, b); }
  static Vi select_gt(Vi a, Vi b, Vi yes, Vi no) { return _mm512_mask_blend_epi32(_mm512_cmpgt_epi32_mask(a, b), no, yes); }
  template <int kBits>
  static Vi shl(Vi a) {
    return _mm512_slli_epi32(a, kBits);
  }
  template <int kBits>
  static Vi shr(Vi a) {
    return _mm512_srli_epi32(a, kBits);
  }
  template <int kBits>
  static Vi sar(Vi a) {
    return _mm512_srai_epi32(a, kBits);
  }
  static Vi sar_by(Vi a, int bits) { return _mm512_srai_epi32(a, static_cast<unsigned>(bits)); }
  static int32_t reduce_add(Vi a) { return _mm512_reduce_add_epi32(a); }
  static int32_t reduce_max(Vi a) { return _mm512_reduce_max_epi32(a); }

  static Vf set1(float v) { return _mm512_set1_ps(v); }
  static Vf load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vf v) { _mm512_storeu_ps(p, v); }
  static void stream(float* p, Vf v) { _mm512_stream_ps(p, v); }
  static void stream_fence() { _mm_sfence(); }
  static Vf add(Vf a, Vf b) { return _mm512_add_ps(a, b); }
  static Vf sub(Vf a, Vf b) { return _mm512_sub_ps(a, b); }
  static Vf mul(Vf a, Vf b) { return _mm512_mul_ps(a, b); }
  static Vf div(Vf a, Vf b) { return _mm512_div_ps(a, b); }
  static Vf min_(Vf a, Vf b) { return _mm512_min_ps(a, b); }
  static Vf max_(Vf a, Vf b) { return _mm512_max_ps(a, b); }
  static Vf muladd(Vf a, Vf b, Vf c) { return fma(a, b, c); }
  static Vf fma(Vf a, Vf b, Vf c) { return _mm512_fmadd_ps(a, b, c); }
  static float reduce_add(Vf a) {
    const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
  }
  static Vf to_f32(Vi v) { return _mm512_cvtepi32_ps(v); }
  static uint32_t mask_ge(Vf a, Vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static Vi round(Vf v) { return _mm512_cvtps_epi32(v); }
  static Vi bits(Vf v) { return _mm512_castps_si512(v); }
  static Vf from_bits(Vi v) { return _mm512_castsi512_ps(v); }

  static Vi load_u16(const uint16_t* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static void store_u16(uint16_t* p, Vi v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v)); }
  static Vf load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static void store_f16(uint16_t* p, Vf v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static Vi pack_s8(Vi a, Vi b, Vi c, Vi d) {
    // Packing works within 128 bits: dwords arrive as (a0 b0 c0 d0, a1 b1 ...), four bytes each, and are put in order at the end.
    const Vi order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d)));
  }
  static Vi add_s8(Vi acc, Vi packed) { return _mm512_dpbusd_epi32(acc, _mm512_set1_epi8(1), packed); }

  // vpdpbusd multiplies u8 by s8 and adds four products to an s32 lane without saturation: codes and activations as they are.
  template <int kBits>
  struct Dot {
    using W = __m512i;
    using X = __m512i;
    static constexpr int kXBytesPerK = 1;
    static constexpr int kPartialSteps = 0;
    static constexpr bool kSigned = false, kPairs = false;
    static constexpr uint8_t kMask = (1 << kBits) - 1;
    static W codes(const uint8_t* p, int j) {
      W w = _mm512_loadu_si512(p);
      if constexpr (kBits == 8) {
        opaque(w);  // or gcc 12 loads it again for each row
        return w;
      }
      return _mm512_and_si512(_mm512_srli_epi32(w, static_cast<unsigned>(kBits * j)), _mm512_set1_epi8(kMask));
    }
    static W masked(Vi words, int j) { return _mm512_and_si512(words, _mm512_set1_epi8(static_cast<char>(kMask << kBits * j))); }
    static X load_x(const char* p) {
      int32_t word;
      __builtin_memcpy(&word, p, 4);
      return _mm512_set1_epi32(word);
    }
    static Vi dot4(Vi acc, W w, X x) { return _mm512_dpbusd_epi32(acc, w, x); }
    static Vi widen(Vi acc) { return acc; }
  };

  // vpdpbusd takes x + 128 as unsigned: sums are too large by 128 times the sum of w.
  struct SignedDot {
    using W = __m512i;
    using X = __m512i;
    static constexpr int kXBytesPerK = 1;
    static constexpr int kSumShift = 7;
    static void prepare(const int8_t* q, int64_t K, char* out) {
      const __m512i sign = _mm512_set1_epi8(-128);
      int64_t k = 0;
      for (; k + 64 <= K; k += 64) _mm512_storeu_si512(out + k, _mm512_xor_si512(_mm512_loadu_si512(q + k), sign));
      for (; k < K; ++k) out[k] = static_cast<char>(q[k] ^ -128);
    }
    static void prepare_bytes(const int8_t* q, int64_t K, char* out) { prepare(q, K, out); }
    static W load_w(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static X load_x(const char* p) { return Dot<8>::load_x(p); }
    static Vi dot4(Vi acc, W w, X x) { return _mm512_dpbusd_epi32(acc, x, w); }
    static Vi dot_bytes(Vi acc, Vi x, Vi w) { return _mm512_dpbusd_epi32(acc, x, w); }
  };
  static uint32_t high_bits16(const uint8_t* p) {
    return static_cast<uint32_t>(_mm_movemask_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static Vi lookup(const char* window, Vi index) {
    const __m512i part = _mm512_and_si512(index, _mm512_set1_epi8(0x70)), at = _mm512_and_si512(index, _mm512_set1_epi8(15));
    __m512i found = _mm512_setzero_si512();
    TERSOR_UNROLL(8)
    for (int i = 0; i < 8; ++i) {
      const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(window) + i));
      const __mmask64 here = _mm512_cmpeq_epi8_mask(part, _mm512_set1_epi8(static_cast<char>(16 * i)));
      found = _mm512_mask_shuffle_epi8(found, here, table, at);
    }
    return found;
  }
  static void expand_tile(uint64_t mask, const uint8_t* values, uint8_t* tile) { expand_by_table(mask, values, tile); }

  // Pairs of rows, of pairs, then of quarters: 64 shuffles.
  static void transpose16(const float* in, int64_t ld_in, float* out, int64_t ld_out) {
    __m512d a[16], b[16];
    TERSOR_UNROLL(16)
    for (int i = 0; i < 16; i += 2) {
      const __m512 x = _mm512_loadu_ps(in + i * ld_in), y = _mm512_loadu_ps(in + (i + 1) * ld_in);
      a[i] = _mm512_castps_pd(_mm512_unpacklo_ps(x, y));
      a[i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(x, y));
    }
    TERSOR_UNROLL(16)
    for (int i = 0; i < 16; i += 4) {  // b[i + c]: columns c, c + 4, c + 8, c + 12 of rows i .. i + 3
      b[i] = _mm512_unpacklo_pd(a[i], a[i + 2]);
      b[i + 1] = _mm512_unpackhi_pd(a[i], a[i + 2]);
      b[i + 2] = _mm512_unpacklo_pd(a[i + 1], a[i + 3]);
      b[i + 3] = _mm512_unpackhi_pd(a[i + 1], a[i + 3]);
    }
    TERSOR_UNROLL(4)
    for (int c = 0; c < 4; ++c) {
      const __m512d low = _mm512_shuffle_f64x2(b[c], b[c + 4], 0x88), low2 = _mm512_shuffle_f64x2(b[c + 8], b[c + 12], 0x88);
      const __m512d high = _mm512_shuffle_f64x2(b[c], b[c + 4], 0xdd), high2 = _mm512_shuffle_f64x2(b[c + 8], b[c + 12], 0xdd);
      _mm512_storeu_pd(out + c * ld_out, _mm512_shuffle_f64x2(low, low2, 0x88));
      _mm512_storeu_pd(out + (c + 8) * ld_out, _mm512_shuffle_f64x2(low, low2, 0xdd));
      _mm512_storeu_pd(out + (c + 4) * ld_out, _mm512_shuffle_f64x2(high, high2, 0x88));
      _mm512_storeu_pd(out + (c + 12) * ld_out, _mm512_shuffle_f64x2(high, high2, 0xdd));
    }
  }

  // The bits of each half byte from a table, bytes to words with a product by one.
  struct Popcount {
    static constexpr int kPartialSteps = 0;
    static Vi add(Vi acc, Vi a) {
      const Vi table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
      const Vi low = _mm512_set1_epi8(15);
      const Vi bytes = _mm512_add_epi8(_mm512_shuffle_epi8(table, _mm512_and_si512(a, low)),
                                       _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(a, 4), low)));
      return _mm512_dpbusd_epi32(acc, bytes, _mm512_set1_epi8(1));
    }
    static Vi widen(Vi acc) { return acc; }
  };
#ifdef TERSOR_SIMDE  // a test build, whose vectors are two registers each
  template <typename V>
  static void opaque(V&) {}
#else
  static void opaque(Vi& v) { TERSOR_OPAQUE("v", v); }
  static void opaque(Vf& v) { TERSOR_OPAQUE("v", v); }
#endif

  // Register blocks, rows x tiles of 16 channels. 32 registers hold 8 x 3 accumulators, 3 tiles and a broadcast. Few rows take four
  // tiles, or long streams (run_blocks), and several sets of accumulators: sums in flight cover the latency of vpdpbusd (4-5
  // cycles).
  static constexpr int kMaxRows = 8;
  static constexpr int max_tiles(int rows) { return rows <= 4 ? 4 : 3; }
  static constexpr int acc_sets(int rows, int tiles) { return rows * tiles <= 2 ? 4 : rows * tiles <= 4 ? 2 : 1; }
  static constexpr int kInPlaceRows = 1;
  // One stream where tiles are short: x stays in L1, and another stream gains nothing. Measured on Zen 4.
  static constexpr int stream_tiles(int bits, int rows, int64_t words) {
    if (bits == 8) return rows <= 4 && words <= (rows == 1 ? 512 : 384) ? 1 : rows <= 2 ? 2 : 0;
    return bits == 4 && rows == 1 ? words <= 96 ? 1 : 2 : 0;
  }
  static constexpr int xnor_stream_tiles(int rows) { return rows <= 2 ? rows : 0; }
  static constexpr int prefetch_rows(int bits) { return bits == 8 ? 3 : bits == 4 ? 2 : 1; }
  static constexpr int kXnorMaxRows = 4;  // x 4 tiles: no more loads of words than of bits
  // Groups: as many float sums again. 6 x 2 of each, 2 words or scales, a broadcast.
  static constexpr int kGroupedMaxRows = 6;
  static constexpr int grouped_tiles(int rows) { return rows <= 2 ? 4 : 2; }
  // Sparse: one tile at a time, so several sets of sums where rows are few.
  static constexpr int kSparseMaxRows = 8;
  static constexpr int sparse_sets(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
  // Float GEMM: 12 x 2 accumulators, 2 weights, a broadcast.
  static constexpr int kFloatMaxRows = 12;
  static constexpr int kFloatTiles = 2;
};

#ifndef TERSOR_ISA_EXTENDED  // by a header that builds on this one
using Isa = Avx512Vnni;
#endif

}  // namespace
}  // namespace tersor::TERSOR_ISA
