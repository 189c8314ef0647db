// Vector vocabulary of aarch64 NEON: four 128-bit registers hold one tile, 4 channels each.
// Each function of the vocabulary is described once, in isa_scalar.h.
#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

#include "isa_expand_table.h"

namespace tersor::TERSOR_ISA {
namespace {

struct Neon {
  static constexpr bool kAllKernels = true;
  static constexpr bool kMatrixUnit = false;
  static constexpr int kLanes = 4;
  using Vi = int32x4_t;
  using Vf = float32x4_t;

  static Vi zero_i() { return vdupq_n_s32(0); }
  static Vi set1_i(int32_t v) { return vdupq_n_s32(v); }
  static Vi load_i(const void* p) { return as_words(bytes(p)); }
  static void store_i(void* p, Vi v) { vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_s32(v)); }
  static Vi add_i(Vi a, Vi b) { return vaddq_s32(a, b); }
  static Vi sub_i(Vi a, Vi b) { return vsubq_s32(a, b); }
  static Vi max_i(Vi a, Vi b) { return vmaxq_s32(a, b); }
  static Vi and_i(Vi a, Vi b) { return vandq_s32(a, b); }
  static Vi xor_i(Vi a, Vi b) { return veorq_s32(a, b); }
  static Vi select_gt(Vi a, Vi b, Vi yes, Vi no) { return vbslq_s32(vcgtq_s32(a, b), yes, no); }
  template <int kBits>
  static Vi shl(Vi a) {
    return vshlq_n_s32(a, kBits);
  }
  template <int kBits>
  static Vi shr(Vi a) {
    if constexpr (kBits == 0) return a;
    return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a), kBits > 0 ? kBits : 1));
  }
  template <int kBits>
  static Vi sar(Vi a) {
    if constexpr (kBits == 0) return a;
    return vshrq_n_s32(a, kBits > 0 ? kBits : 1);
  }
  static Vi sar_by(Vi a, int bits) { return vshlq_s32(a, vdupq_n_s32(-bits)); }
  static int32_t reduce_add(Vi a) { return vaddvq_s32(a); }
  static int32_t reduce_max(Vi a) { return vmaxvq_s32(a); }

  static Vf set1(float v) { return vdupq_n_f32(v); }
  static Vf load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, Vf v) { vst1q_f32(p, v); }
  static void stream(float* p, Vf v) { vst1q_f32(p, v); }
  static void stream_fence() {}
  static Vf add(Vf a, Vf b) { return vaddq_f32(a, b); }
  static Vf sub(Vf a, Vf b) { return vsubq_f32(a, b); }
  static Vf mul(Vf a, Vf b) { return vmulq_f32(a, b); }
  static Vf div(Vf a, Vf b) { return vdivq_f32(a, b); }
  // Not fmin and fmax, which keep a NaN on either side.
  static Vf min_(Vf a, Vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
  static Vf max_(Vf a, Vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static Vf muladd(Vf a, Vf b, Vf c) { return fma(a, b, c); }
  static Vf fma(Vf a, Vf b, Vf c) { return vfmaq_f32(c, a, b); }
  static float reduce_add(Vf a) {
    const float32x2_t halves = vadd_f32(vget_low_f32(a), vget_high_f32(a));
    return vget_lane_f32(halves, 0) + vget_lane_f32(halves, 1);
  }
  static Vf to_f32(Vi v) { return vcvtq_f32_s32(v); }
  static uint32_t mask_ge(Vf a, Vf b) {
    const uint32x4_t lane = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcgeq_f32(a, b), lane));
  }
  static Vi round(Vf v) { return vcvtnq_s32_f32(v); }
  static Vi bits(Vf v) { return vreinterpretq_s32_f32(v); }
  static Vf from_bits(Vi v) { return vreinterpretq_f32_s32(v); }

  static Vi load_u16(const uint16_t* p) { return vreinterpretq_s32_u32(vmovl_u16(halves(p))); }
  static void store_u16(uint16_t* p, Vi v) { store_halves(p, vmovn_u32(vreinterpretq_u32_s32(v))); }
  static Vf load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(halves(p))); }
  static void store_f16(uint16_t* p, Vf v) { store_halves(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
  static Vi pack_s8(Vi a, Vi b, Vi c, Vi d) {
    const int16x8_t ab = vcombine_s16(vmovn_s32(a), vmovn_s32(b)), cd = vcombine_s16(vmovn_s32(c), vmovn_s32(d));
    return vreinterpretq_s32_s8(vcombine_s8(vmovn_s16(ab), vmovn_s16(cd)));
  }
  static Vi add_s8(Vi acc, Vi packed) { return vpadalq_s16(acc, vpaddlq_s8(vreinterpretq_s8_s32(packed))); }

  // Four products of a channel from two widening multiplications and an addition of neighbours. Codes turn signed on loading: a
  // pair of products is at most 2 * 128 * 127 = 32512 and fits s16.
  struct Products {
    using W = int8x16_t;
    using X = int8x16_t;
    static constexpr int kXBytesPerK = 1;
    static X load_x(const char* p) {
      int32_t word;
      __builtin_memcpy(&word, p, 4);
      return vreinterpretq_s8_s32(vdupq_n_s32(word));
    }
    static Vi dot4(Vi acc, W w, X x) {
      const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
      acc = vpadalq_s16(acc, vpaddq_s16(low, vmull_high_s8(w, x)));
      opaque(acc);  // or gcc forms all products of a step first and spills
      return acc;
    }
    static Vi widen(Vi acc) { return acc; }
  };
  template <int kBits, typename Product>
  struct SignedCodes : Product {
    static constexpr int kPartialSteps = 0;
    static constexpr bool kSigned = kBits == 8;
    static constexpr bool kPairs = false;
    static int8x16_t codes(const uint8_t* p, int j) { return vreinterpretq_s8_u8(unsigned_codes<kBits>(p, j, kSigned)); }
  };
  template <int kBits>
  using Dot = SignedCodes<kBits, Products>;

  template <typename Product>
  struct SignedProducts : Product {
    static constexpr int kSumShift = -1;
    static void prepare(const int8_t* q, int64_t K, char* out) { __builtin_memcpy(out, q, static_cast<size_t>(K)); }
    static void prepare_bytes(const int8_t* q, int64_t K, char* out) { prepare(q, K, out); }
    static int8x16_t load_w(const uint8_t* p) { return vreinterpretq_s8_u8(bytes(p)); }
    static Vi dot_bytes(Vi acc, Vi x, Vi w) { return Product::dot4(acc, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x)); }
  };
  using SignedDot = SignedProducts<Products>;

  static uint32_t high_bits16(const uint8_t* p) {
    const uint8x16_t bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint8x16_t set = vandq_u8(vcltzq_s8(vreinterpretq_s8_u8(bytes(p))), bit);
    return vaddv_u8(vget_low_u8(set)) | static_cast<uint32_t>(vaddv_u8(vget_high_u8(set))) << 8;
  }
  static Vi lookup(const char* window, Vi index) {
    const auto* w = reinterpret_cast<const uint8_t*>(window);
    const uint8x16x4_t first = {bytes(w), bytes(w + 16), bytes(w + 32), bytes(w + 48)};
    const uint8x16x4_t second = {bytes(w + 64), bytes(w + 80), bytes(w + 96), bytes(w + 112)};
    const uint8x16_t at = vandq_u8(vreinterpretq_u8_s32(index), vdupq_n_u8(127));
    // An index of 64 and more looks up 0 in the first half; less than 64 wraps, and leaves what the first half gave.
    return as_words(vqtbx4q_u8(vqtbl4q_u8(first, at), second, vsubq_u8(at, vdupq_n_u8(64))));
  }
  static void expand_tile(uint64_t mask, const uint8_t* values, uint8_t* tile) { expand_by_table(mask, values, tile); }

  // Blocks of 4 x 4: pairs of lanes, then halves.
  static void transpose16(const float* in, int64_t ld_in, float* out, int64_t ld_out) {
    for (int64_t r = 0; r < 16; r += 4) {
      TERSOR_UNROLL(4)
      for (int64_t c = 0; c < 16; c += 4) {
        const float* from = in + r * ld_in + c;
        const Vf a = load(from), b = load(from + ld_in), d = load(from + 2 * ld_in), e = load(from + 3 * ld_in);
        const float64x2_t ab0 = pairs(vtrn1q_f32(a, b)), ab1 = pairs(vtrn2q_f32(a, b));
        const float64x2_t de0 = pairs(vtrn1q_f32(d, e)), de1 = pairs(vtrn2q_f32(d, e));
        float* to = out + c * ld_out + r;
        store(to, vreinterpretq_f32_f64(vzip1q_f64(ab0, de0)));
        store(to + ld_out, vreinterpretq_f32_f64(vzip1q_f64(ab1, de1)));
        store(to + 2 * ld_out, vreinterpretq_f32_f64(vzip2q_f64(ab0, de0)));
        store(to + 3 * ld_out, vreinterpretq_f32_f64(vzip2q_f64(ab1, de1)));
      }
    }
  }

  // The bits of each byte, counted in bytes: 31 times 8 fits one.
  struct Popcount {
    static constexpr int kPartialSteps = 31;
    static Vi add(Vi acc, Vi a) { return as_words(vaddq_u8(vreinterpretq_u8_s32(acc), vcntq_u8(vreinterpretq_u8_s32(a)))); }
    static Vi widen(Vi acc) { return vreinterpretq_s32_u32(vpaddlq_u16(vpaddlq_u8(vreinterpretq_u8_s32(acc)))); }
  };
  template <typename V>
  static void opaque(V& v) {
    TERSOR_OPAQUE("w", v);
  }

  // 32 registers hold 4 rows x 1 tile: 16 accumulators, 4 vectors of codes, one of x, products. Few rows take more tiles, so that
  // 8 sums at least are in flight.
  static constexpr int kMaxRows = 4;
  static constexpr int kXnorMaxRows = 4;
  static constexpr int max_tiles(int rows) { return rows == 1 ? 3 : rows == 2 ? 2 : 1; }
  static constexpr int acc_sets(int, int) { return 1; }
  static constexpr int kInPlaceRows = 0;  // codes are multiplied as s8
  static constexpr int stream_tiles(int, int, int64_t) { return 0; }
  static constexpr int xnor_stream_tiles(int) { return 0; }
  static constexpr int prefetch_rows(int) { return kMaxRows / 2 + 1; }
  static constexpr int kGroupedMaxRows = 3;
  static constexpr int grouped_tiles(int rows) { return rows == 1 ? 2 : 1; }
  static constexpr int kSparseMaxRows = 4;
  static constexpr int sparse_sets(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
  // Float GEMM: 6 x 4 accumulators, 4 weights, a broadcast.
  static constexpr int kFloatMaxRows = 6;
  static constexpr int kFloatTiles = 1;

 protected:
  static uint8x16_t bytes(const void* p) { return vld1q_u8(static_cast<const uint8_t*>(p)); }
  static uint16x4_t halves(const uint16_t* p) {
    uint16x4_t v;
    __builtin_memcpy(&v, p, 8);
    return v;
  }
  static void store_halves(uint16_t* p, uint16x4_t v) { __builtin_memcpy(p, &v, 8); }
  static Vi as_words(uint8x16_t v) { return vreinterpretq_s32_u8(v); }
  static float64x2_t pairs(Vf v) { return vreinterpretq_f64_f32(v); }

  // A step's codes stay within their byte, so that bytes are shifted. Flipping the top bit subtracts 128 from a code of 8 bits.
  template <int kBits>
  static uint8x16_t unsigned_codes(const uint8_t* p, int j, bool flip = false) {
    uint8x16_t w = bytes(p);
    if constexpr (kBits == 8) return flip ? veorq_u8(w, vdupq_n_u8(0x80)) : w;
    w = w >> static_cast<uint8_t>(kBits * j);
    return kBits * (j + 1) == 8 ? w : vandq_u8(w, vdupq_n_u8((1 << kBits) - 1));
  }
};

#ifndef TERSOR_ISA_EXTENDED  // by a header that builds on this one
using Isa = Neon;
#endif

}  // namespace
}  // namespace tersor::TERSOR_ISA
