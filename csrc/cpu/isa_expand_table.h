// Expanding a tile by its mask without VBMI2: eight bytes at a time, by a table of shuffles.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace tersor::TERSOR_ISA {
namespace {

// Row m: for each bit of m that is set the number of set bits below it, else 0x80, which makes vpshufb write 0.
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

inline void expand_by_table(uint64_t mask, const uint8_t* values, uint8_t* tile) {
  for (int i = 0; i < 64; i += 8, mask >>= 8) {
    const auto byte = static_cast<uint8_t>(mask);
    const __m128i from = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
    const __m128i order = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpandTable.row[byte]));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(tile + i), _mm_shuffle_epi8(from, order));
    values += __builtin_popcount(byte);
  }
}

}  // namespace
}  // namespace tersor::TERSOR_ISA
