// Expanding a tile by its mask without VBMI2: eight bytes at a time, by a table of shuffles.
#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

#include <cstdint>

#include "../core/compiler.h"

namespace tersor::TERSOR_ISA {
namespace {

// Row m: for each bit of m that is set the number of set bits below it, else 0x80, which makes vpshufb and tbl write 0.
struct ExpandTable {
  uint8_t row[256][8];
  constexpr ExpandTable() : row() {
    for (int m = 0; m < 256; ++m) {
      uint8_t next = 0;
      for (int i = 0; i < 8; ++i) row[m][i] = m >> i & 1 ? next++ : uint8_t{0x80};
    }
  }
};
alignas(64) constexpr ExpandTable kExpandTable;

// to[i] = from[order[i]], 0 where order[i] is 0x80.
inline void shuffle8(const uint8_t* from, const uint8_t* order, uint8_t* to) {
#if defined(__aarch64__)
  vst1_u8(to, vtbl1_u8(vld1_u8(from), vld1_u8(order)));
#else
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  const __m128i at = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(order));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(bytes, at));
#endif
}

inline void expand_by_table(uint64_t mask, const uint8_t* values, uint8_t* tile) {
  for (int i = 0; i < 64; i += 8, mask >>= 8) {
    const auto byte = static_cast<uint8_t>(mask);
    shuffle8(values, kExpandTable.row[byte], tile + i);
    values += __builtin_popcount(byte);
  }
}

}  // namespace
}  // namespace tersor::TERSOR_ISA
