// AVX-512 of Ice Lake and Zen 4 on: counts the bits of a word in one instruction. Only signs x signs gain by it.
#pragma once

#define TERSOR_ISA_EXTENDED
#include "isa_avx512_vnni.h"

namespace tersor::TERSOR_ISA {
namespace {

struct Isa : Avx512Vnni {
  static constexpr bool kAllKernels = false;
  struct Popcount {
    static constexpr int kPartialSteps = 0;
    static Vi add(Vi acc, Vi a) { return _mm512_add_epi32(acc, _mm512_popcnt_epi32(a)); }
    static Vi widen(Vi acc) { return acc; }
  };
};

}  // namespace
}  // namespace tersor::TERSOR_ISA
