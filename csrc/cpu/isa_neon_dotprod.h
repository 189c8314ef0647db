// NEON with the dot product instructions of Armv8.2: sdot adds four products of s8 to each lane.
#pragma once

#ifndef TERSOR_ISA_EXTENDED
#define TERSOR_ISA_EXTENDED
#define TERSOR_ISA_IS_DOTPROD
#endif
#include "isa_neon.h"

namespace tersor::TERSOR_ISA {
namespace {

struct NeonDotprod : Neon {
  struct Products : Neon::Products {
    static Vi dot4(Vi acc, int8x16_t w, int8x16_t x) {
      acc = vdotq_s32(acc, w, x);
      opaque(acc);  // or gcc mixes the products of two steps and spills sums
      return acc;
    }
  };
  template <int kBits>
  using Dot = SignedCodes<kBits, Products>;
  using SignedDot = SignedProducts<Products>;
  static Vi add_s8(Vi acc, Vi packed) { return vdotq_s32(acc, vreinterpretq_s8_s32(packed), vdupq_n_s8(1)); }

  // 6 rows x 1 tile: 24 accumulators, 4 vectors of codes, one of x.
  static constexpr int kMaxRows = 6;
  static constexpr int kSparseMaxRows = 6;
  static constexpr int sparse_sets(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
};

#ifdef TERSOR_ISA_IS_DOTPROD
using Isa = NeonDotprod;
#endif

}  // namespace
}  // namespace tersor::TERSOR_ISA
