// AVX-512 of Ice Lake and Zen 4 on: counts the bits of a word, looks bytes up in two registers and expands them by a mask, each in
// one instruction. Signs x signs and sparse weights gain by it.
#pragma once

#ifndef TERSOR_ISA_EXTENDED
#define TERSOR_ISA_EXTENDED
#define TERSOR_ISA_IS_ICL
#endif
#include "isa_avx512_vnni.h"

namespace tersor::TERSOR_ISA {
namespace {

struct Avx512Icl : Avx512Vnni {
  static constexpr bool kAllKernels = false;
  struct Popcount {
    static constexpr int kPartialSteps = 0;
    static Vi add(Vi acc, Vi a) { return _mm512_add_epi32(acc, _mm512_popcnt_epi32(a)); }
    static Vi widen(Vi acc) { return acc; }
  };
  static Vi lookup(const char* window, Vi index) {
    return _mm512_permutex2var_epi8(_mm512_loadu_si512(window), index, _mm512_loadu_si512(window + 64));
  }
  static void expand_tile(uint64_t mask, const uint8_t* values, uint8_t* tile) {
    _mm512_storeu_si512(tile, _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(values)));
  }
};

#ifdef TERSOR_ISA_IS_ICL
using Isa = Avx512Icl;
#endif

}  // namespace
}  // namespace tersor::TERSOR_ISA
