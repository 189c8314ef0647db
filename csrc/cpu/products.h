// The products of a word of weights (32 bits of 16 channels) with x: what gemm_int.inl needs to know of a width.
//
//   kBlocks           register blocks, see Isa
//   kXWordBytes       bytes of x that meet one word
//   kWordBytes        bytes of a tile at one k step, as word() reads it
//   kUnroll           words in one turn of the loop
//   sets(rows, tiles) sets of sums: they hide latency, or hold what still has to be shifted (see Codes)
//   stream_tiles(rows, words)
//                     of a panel whose tiles are read as long streams, see run_blocks; 0: max_tiles(rows) neighbours
//   kPrefetchRows     from so many rows on the next panel is prefetched
//   kFlushWords       words after which narrow sums go into 32-bit ones; 0: they are 32-bit at once
//   together(rows)    words that word() takes at a time while there are so many
//   word<n>(sums, ..) adds n words of each tile times each row
//   join(sums)        the sets as one sum, in sums[0]
//   value(g, m, sum)  the integer sum of w * q
#pragma once

#include "../core/kernel_table.h"

namespace tersor::TERSOR_ISA {
namespace {

using Vi = Isa::Vi;
using Vf = Isa::Vf;
constexpr int kTileVecs = static_cast<int>(kTileN) / Isa::kLanes;

// The words of a panel at one k step, and the rows they meet.
struct Operands {
  const uint8_t* w;
  int64_t tile_stride;  // bytes
  const char* x;
  int64_t ldx;  // bytes

  const uint8_t* vec(int v) const { return w + v / kTileVecs * tile_stride + v % kTileVecs * Isa::kLanes * 4; }
};

// Codes of kBits x s8.
//
// Few rows leave no work to hide the unpacking behind. There codes are masked where they stand, without the shift, and each of the
// word's positions has sums of its own: they are multiples of 2^(bits * j), shifted back once at the end. They cannot wrap:
// (255 - 2^(8 - bits) + 1) * 128 * K / (8 / bits) < 2^31 for every K <= kMaxK.
template <int kBits>
struct Codes {
  using D = Isa::Dot<kBits>;
  static constexpr bool kGrouped = false;
  static constexpr int kSteps = 8 / kBits;  // of four k
  static constexpr int64_t kXStepBytes = 4 * D::kXBytesPerK;
  static constexpr int64_t kXWordBytes = kSteps * kXStepBytes;
  static constexpr int64_t kWordBytes = kTileBytes;
  static constexpr int kUnroll = kSteps >= 4 ? 8 / kSteps : 4 / kSteps;
  static constexpr int kFlushWords = D::kPartialSteps / kSteps;
  static constexpr int kMaxRows = Isa::kMaxRows;
  static constexpr bool in_place(int rows) { return kBits < 8 && rows <= Isa::kInPlaceRows; }
  static constexpr int sets(int rows, int tiles) {
    return !in_place(rows) ? Isa::acc_sets(rows, tiles) : kSteps * tiles <= 4 ? kSteps * kUnroll : kSteps;
  }
  static constexpr int max_tiles(int rows) { return in_place(rows) && kBits == 1 ? 2 : Isa::max_tiles(rows); }
  static constexpr int stream_tiles(int rows, int64_t words) { return Isa::stream_tiles(kBits, rows, words); }
  static constexpr int kPrefetchRows = Isa::prefetch_rows(kBits);

  // Rows in twos and k steps in twos, see Isa::Dot::kPairs. Codes of 8 bits take the second step from the next word.
  static constexpr bool pairs(int rows) { return D::kPairs && rows > 1; }
  static constexpr int together(int rows) { return pairs(rows) && kBits == 8 ? 2 : 1; }

  template <int kWords, int kSets, int kRows, int kVecs>
  TERSOR_INLINE static void pair_words(Vi (&sums)[kSets][kRows][kVecs], const Operands& o) {
    constexpr bool kWhole = kWords * kSteps > 1;
    TERSOR_UNROLL(4)
    for (int j = 0; j < kWords * kSteps; j += 2) {
      const char* at = o.x + j * kXStepBytes;
      typename D::X x[kRows];  // of two rows in each second; of one where a row is left over
      TERSOR_UNROLL(8)
      for (int m = 0; m + 1 < kRows; m += 2) {
        x[m] = D::template load_pair<kWhole>(at + m * o.ldx, at + (m + 1) * o.ldx);
      }
      TERSOR_UNROLL(16)
      for (int v = 0; v < kVecs; ++v) {
        const uint8_t* w = o.vec(v);
        const typename D::W first = D::codes(w, kBits == 8 ? 0 : j);
        const typename D::W second = !kWhole ? D::no_codes() : kBits == 8 ? D::codes(w + kTileBytes, 0) : D::codes(w, j + 1);
        const typename D::W low = D::zip_low(first, second), high = D::zip_high(first, second);
        TERSOR_UNROLL(8)
        for (int m = 0; m + 1 < kRows; m += 2) {
          sums[0][m][v] = D::matmul(sums[0][m][v], low, x[m]);
          sums[0][m + 1][v] = D::matmul(sums[0][m + 1][v], high, x[m]);
        }
        if constexpr (kRows % 2) {
          Vi& sum = sums[0][kRows - 1][v];
          const char* row = at + (kRows - 1) * o.ldx;
          sum = D::dot4(sum, first, D::load_x(row));
          if constexpr (kWhole) sum = D::dot4(sum, second, D::load_x(row + kXStepBytes));
        }
      }
    }
  }

  template <int kWords, int kSets, int kRows, int kVecs>
  TERSOR_INLINE static void word(Vi (&sums)[kSets][kRows][kVecs], int u, const Operands& o) {
    if constexpr (pairs(kRows)) return pair_words<kWords>(sums, o);
    Vi words[kVecs];
    if constexpr (in_place(kRows)) {
      TERSOR_UNROLL(16)
      for (int v = 0; v < kVecs; ++v) {
        words[v] = Isa::load_i(o.vec(v));
        Isa::opaque(words[v]);  // or each step would load them again, and loads are what few rows wait for
      }
    }
    TERSOR_UNROLL(8)
    for (int j = 0; j < kSteps; ++j) {
      typename D::W codes[kVecs];
      TERSOR_UNROLL(16)
      for (int v = 0; v < kVecs; ++v) {
        if constexpr (in_place(kRows)) {
          codes[v] = D::masked(words[v], j);
        } else {
          codes[v] = D::codes(o.vec(v), j);
        }
      }
      auto& sum = sums[(u * kSteps + j) % kSets];
      TERSOR_UNROLL(8)
      for (int m = 0; m < kRows; ++m) {
        const typename D::X x = D::load_x(o.x + m * o.ldx + j * kXStepBytes);
        TERSOR_UNROLL(16)
        for (int v = 0; v < kVecs; ++v) sum[m][v] = D::dot4(sum[m][v], codes[v], x);
      }
    }
  }

  static Vi widen(Vi partial) { return D::widen(partial); }

  template <int kSets, int kRows, int kVecs>
  TERSOR_INLINE static void join(Vi (&sums)[kSets][kRows][kVecs]) {
    TERSOR_UNROLL(8)
    for (int s = 1; s < kSets; ++s) {
      TERSOR_UNROLL(8)
      for (int m = 0; m < kRows; ++m) {
        TERSOR_UNROLL(16)
        for (int v = 0; v < kVecs; ++v) {
          const Vi sum = in_place(kRows) ? Isa::sar_by(sums[s][m][v], kBits * (s % kSteps)) : sums[s][m][v];
          sums[0][m][v] = Isa::add_i(sums[0][m][v], sum);
        }
      }
    }
    if constexpr (pairs(kRows)) {
      TERSOR_UNROLL(8)
      for (int m = 0; m + 1 < kRows; m += 2) {
        TERSOR_UNROLL(16)
        for (int v = 0; v < kVecs; ++v) D::unzip(sums[0][m][v], sums[0][m + 1][v]);
      }
    }
  }

  // Modulo 2^32: sum of codes and sum of x may each wrap, the value does not.
  static Vi value(Vi sum, int32_t row_sum) {
    if constexpr (D::kSigned) return sum;
    return Isa::sub_i(Isa::shl<code_shift(kBits)>(sum), Isa::shl<offset_shift(kBits)>(Isa::set1_i(row_sum)));
  }
  static int32_t repair(const GemmArgs& g, int64_t m) { return g.row_sum[m]; }
};

// Codes of 8 bits that an instruction set splits before it multiplies, split beforehand: once for all row blocks of a panel,
// aligned to 64.
//   [ Kt ][ kTileVecs ] D::W
struct SplitCodes : Codes<8> {
  static constexpr int64_t kWordBytes = kTileVecs * static_cast<int64_t>(sizeof(D::W));
  static constexpr int max_tiles(int) { return 1; }
  static constexpr int stream_tiles(int, int64_t) { return 0; }

  static D::W* at(uint8_t* split) { return reinterpret_cast<D::W*>(split); }
  static const D::W* at(const uint8_t* split) { return reinterpret_cast<const D::W*>(split); }

  static void split(const uint8_t* w, int64_t words, uint8_t* out) {
    for (int64_t i = 0; i < words * kTileVecs; ++i) at(out)[i] = D::codes(w + i * Isa::kLanes * 4, 0);
  }

  template <int kWords, int kSets, int kRows, int kVecs>
  TERSOR_INLINE static void word(Vi (&sums)[kSets][kRows][kVecs], int u, const Operands& o) {
    static_assert(kVecs == kTileVecs);
    typename D::W codes[kVecs];
    TERSOR_UNROLL(4)
    for (int v = 0; v < kVecs; ++v) codes[v] = at(o.w)[v];
    auto& sum = sums[u % kSets];
    TERSOR_UNROLL(8)
    for (int m = 0; m < kRows; ++m) {
      const typename D::X x = D::load_x(o.x + m * o.ldx);
      TERSOR_UNROLL(4)
      for (int v = 0; v < kVecs; ++v) sum[m][v] = D::dot4(sum[m][v], codes[v], x);
    }
  }
};

// Bits x bits: the sums count the bits that differ.
struct Xnor {
  using P = Isa::Popcount;
  static constexpr int64_t kXWordBytes = 4;
  static constexpr int64_t kWordBytes = kTileBytes;
  static constexpr int kUnroll = 4;
  static constexpr int kFlushWords = P::kPartialSteps;
  static constexpr int kMaxRows = Isa::kXnorMaxRows;
  static constexpr int sets(int rows, int tiles) { return Isa::acc_sets(rows, tiles); }
  static constexpr int max_tiles(int rows) { return Isa::max_tiles(rows); }
  static constexpr int stream_tiles(int rows, int64_t) { return Isa::xnor_stream_tiles(rows); }
  static constexpr int kPrefetchRows = kMaxRows / 2 + 1;
  static constexpr int together(int) { return 1; }

  template <int kWords, int kSets, int kRows, int kVecs>
  TERSOR_INLINE static void word(Vi (&sums)[kSets][kRows][kVecs], int u, const Operands& o) {
    Vi w[kVecs];
    TERSOR_UNROLL(16)
    for (int v = 0; v < kVecs; ++v) w[v] = Isa::load_i(o.vec(v));
    TERSOR_UNROLL(8)
    for (int m = 0; m < kRows; ++m) {
      int32_t bits;
      __builtin_memcpy(&bits, o.x + m * o.ldx, 4);
      const Vi x = Isa::set1_i(bits);
      TERSOR_UNROLL(16)
      for (int v = 0; v < kVecs; ++v) sums[u % kSets][m][v] = P::add(sums[u % kSets][m][v], Isa::xor_i(w[v], x));
    }
  }

  static Vi widen(Vi partial) { return P::widen(partial); }

  template <int kSets, int kRows, int kVecs>
  TERSOR_INLINE static void join(Vi (&sums)[kSets][kRows][kVecs]) {
    TERSOR_UNROLL(8)
    for (int s = 1; s < kSets; ++s) {
      TERSOR_UNROLL(8)
      for (int m = 0; m < kRows; ++m) {
        TERSOR_UNROLL(16)
        for (int v = 0; v < kVecs; ++v) sums[0][m][v] = Isa::add_i(sums[0][m][v], sums[s][m][v]);
      }
    }
  }

  static Vi value(Vi differ, int32_t k) { return Isa::sub_i(Isa::set1_i(k), Isa::shl<1>(differ)); }
  static int32_t repair(const GemmArgs& g, int64_t) { return static_cast<int32_t>(g.K); }
};

}  // namespace
}  // namespace tersor::TERSOR_ISA
