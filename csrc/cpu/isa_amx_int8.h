// AMX: a register holds 16 rows of 64 bytes. Sixteen k steps of a tile are one such register as they lie in memory, and
// tdpbsud multiplies s8 rows by them. Few rows, and what the matrix unit does not do, stay with AVX-512.
#pragma once

#define TERSOR_ISA_EXTENDED
#include "../core/kernel_table.h"
#include "isa_avx512_icl.h"

namespace tersor::TERSOR_ISA {
namespace {

struct Isa : Avx512Icl {
  static constexpr bool kMatrixUnit = true;
  static constexpr int64_t kMatrixRows = 16;  // of a register
  static constexpr int64_t kMatrixK = 64;     // k of a register: 16 words of 8-bit codes
  static constexpr int kMatrixTiles = 2;      // of a block, which is twice kMatrixRows high at most

  // The shapes of the registers while blocks of `rows` rows are multiplied:
  //   0..3  sums, (first 16 rows, the rest) x (first tile, second)     4, 5  rows     6, 7  tiles
  class Matrix {
   public:
    explicit Matrix(int64_t rows) : two_(rows > kMatrixRows) {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
      } shapes;
      const auto first = static_cast<uint8_t>(two_ ? kMatrixRows : rows), second = static_cast<uint8_t>(rows - first);
      const uint8_t heights[8] = {first, first, second, second, first, second, kMatrixRows, kMatrixRows};
      for (int i = 0; i < 8; ++i) {
        shapes.rows[i] = heights[i];
        shapes.row_bytes[i] = heights[i] ? 64 : 0;
      }
      fence();
      _tile_loadconfig(&shapes);
      fence();
    }
    // At the end; not a destructor, whose unwinding would bring a weak symbol into the object.
    static void release() { _tile_release(); }

    // out[m][n], kMatrixTiles * 16 to a row: `steps` times kMatrixK of x against one or two tiles, tile_stride bytes apart.
    void multiply(const uint8_t* w, int64_t tile_stride, int tiles, const int8_t* x, int64_t ldx, int64_t steps,
                  int32_t* out) const {
      if (two_) {
        tiles == 2 ? run<true, true>(w, tile_stride, x, ldx, steps, out) : run<true, false>(w, tile_stride, x, ldx, steps, out);
      } else {
        tiles == 2 ? run<false, true>(w, tile_stride, x, ldx, steps, out) : run<false, false>(w, tile_stride, x, ldx, steps, out);
      }
    }
    // Multiply-adds of four products a turn that share nothing but their operands.
    static int64_t limit(int64_t iterations) {
      const Matrix unit(2 * kMatrixRows);
      clear<true, true>();
      _tile_zero(4);
      _tile_zero(5);
      _tile_zero(6);
      _tile_zero(7);
      for (int64_t i = 0; i < iterations; ++i) multiply_registers<true, true>();
      release();
      return iterations * 4 * kMatrixRows * kTileN * kMatrixK;
    }

   private:
    bool two_;

    static void fence() { TERSOR_MEMORY_BARRIER(); }  // gcc 12's tile intrinsics do not say that they touch memory
    template <bool kTwoRows, bool kTwoTiles>
    static void clear() {
      _tile_zero(0);
      if constexpr (kTwoTiles) _tile_zero(1);
      if constexpr (kTwoRows) _tile_zero(2);
      if constexpr (kTwoRows && kTwoTiles) _tile_zero(3);
    }
    template <bool kTwoRows, bool kTwoTiles>
    static void multiply_registers() {
      _tile_dpbsud(0, 4, 6);
      if constexpr (kTwoTiles) _tile_dpbsud(1, 4, 7);
      if constexpr (kTwoRows) _tile_dpbsud(2, 5, 6);
      if constexpr (kTwoRows && kTwoTiles) _tile_dpbsud(3, 5, 7);
    }
    template <bool kTwoRows, bool kTwoTiles>
    static void run(const uint8_t* w, int64_t tile_stride, const int8_t* x, int64_t ldx, int64_t steps, int32_t* out) {
      constexpr int64_t kOutBytes = kMatrixTiles * kTileN * 4;
      fence();
      clear<kTwoRows, kTwoTiles>();
      for (int64_t s = 0; s < steps; ++s) {
        _tile_loadd(4, x + s * kMatrixK, ldx);
        _tile_loadd(6, w + s * kMatrixRows * kTileBytes, kTileBytes);
        if constexpr (kTwoTiles) _tile_loadd(7, w + tile_stride + s * kMatrixRows * kTileBytes, kTileBytes);
        if constexpr (kTwoRows) _tile_loadd(5, x + kMatrixRows * ldx + s * kMatrixK, ldx);
        multiply_registers<kTwoRows, kTwoTiles>();
      }
      _tile_stored(0, out, kOutBytes);
      if constexpr (kTwoTiles) _tile_stored(1, out + kTileN, kOutBytes);
      if constexpr (kTwoRows) _tile_stored(2, out + kMatrixRows * kMatrixTiles * kTileN, kOutBytes);
      if constexpr (kTwoRows && kTwoTiles) _tile_stored(3, out + kMatrixRows * kMatrixTiles * kTileN + kTileN, kOutBytes);
      fence();
    }
  };
};

}  // namespace
}  // namespace tersor::TERSOR_ISA
