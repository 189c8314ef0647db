// NEON with the mixed-sign products of Armv8.6: usdot takes codes as they are, usmmla multiplies two channels by two rows.
#pragma once

#define TERSOR_ISA_EXTENDED
#include "isa_neon_dotprod.h"

namespace tersor::TERSOR_ISA {
namespace {

struct Isa : NeonDotprod {
  // Pairs: two k steps of four channels and of two rows meet in two usmmla.
  //   codes      [ 4 channels ][ 4 k ] of a step, twice: zipped, [ 2 channels ][ 8 k ], twice
  //   x          [ 2 rows ][ 8 k ]
  //   sums       [ 2 channels ][ 2 rows ] of either half, until unzip() makes rows of them
  template <int kBits>
  struct Dot {
    using W = uint8x16_t;
    using X = int8x16_t;
    static constexpr int kXBytesPerK = 1;
    static constexpr int kPartialSteps = 0;
    static constexpr bool kSigned = false;
    static constexpr bool kPairs = true;
    static W codes(const uint8_t* p, int j) {
      W w = unsigned_codes<kBits>(p, j);
      opaque(w);  // or gcc loads every tile of a step first and spills sums
      return w;
    }
    static X load_x(const char* p) { return Neon::Products::load_x(p); }
    static Vi dot4(Vi acc, W w, X x) { return vusdotq_s32(acc, w, x); }
    static Vi widen(Vi acc) { return acc; }

    static W no_codes() { return vdupq_n_u8(0); }
    static W zip_low(W a, W b) { return vreinterpretq_u8_u32(vzip1q_u32(vreinterpretq_u32_u8(a), vreinterpretq_u32_u8(b))); }
    static W zip_high(W a, W b) { return vreinterpretq_u8_u32(vzip2q_u32(vreinterpretq_u32_u8(a), vreinterpretq_u32_u8(b))); }
    // kWhole: 8 bytes of each row, else 4 and zeros.
    template <bool kWhole>
    static X load_pair(const char* a, const char* b) {
      if constexpr (kWhole)
        return vcombine_s8(vld1_s8(reinterpret_cast<const int8_t*>(a)), vld1_s8(reinterpret_cast<const int8_t*>(b)));
      int32_t rows[4] = {};
      __builtin_memcpy(&rows[0], a, 4);
      __builtin_memcpy(&rows[2], b, 4);
      return vreinterpretq_s8_s32(vld1q_s32(rows));
    }
    static Vi matmul(Vi acc, W w, X x) {
      acc = vusmmlaq_s32(acc, w, x);
      opaque(acc);
      return acc;
    }
    static void unzip(Vi& low, Vi& high) {
      const Vi first = vuzp1q_s32(low, high);
      high = vuzp2q_s32(low, high);
      low = first;
    }
  };
};

}  // namespace
}  // namespace tersor::TERSOR_ISA
