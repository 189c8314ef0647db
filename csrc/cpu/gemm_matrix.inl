// Integer GEMM on a unit that multiplies registers of 16 rows x 64 k by 64 k x 16 channels. Sixteen k steps of a tile of 8-bit
// codes are such a register as they lie in memory; codes of few bits are expanded into scratch, once for all rows.
//
//   for n panel (2 tiles):
//     for row block (up to 32 rows):  all whole 64 k on the unit, sums to memory (4 KiB, L1)
//       for rows in blocks of the vector kernel: the words past a multiple of 64 k, and the epilogue
//
// Row blocks are of one height, so that the unit is set up once; the last begins where it ends with the rows, and repeats some.

namespace tersor::TERSOR_ISA {
namespace {

// Sums of kRows rows from memory, the words that are left, the store.
template <typename P, int kRows, int kTiles>
void finish_sums(const BlockArgs& b, int64_t words, int64_t width, const int32_t* from) {
  constexpr int kSets = P::kFlushWords ? 1 : P::sets(kRows, kTiles);
  constexpr int kVecs = kTiles * kTileVecs;
  const int64_t done = b.words - words;
  Vi sums[kSets][kRows][kVecs];
  Operands o{b.w + done * kTileBytes, b.tile_stride(), b.x + done * P::kXWordBytes, b.ldx};
  sum_words<P>(sums, o, words, [] {});
  TERSOR_UNROLL(8)
  for (int m = 0; m < kRows; ++m) {
    const int32_t repair = P::repair(*b.gemm, b.m + m);
    TERSOR_UNROLL(16)
    for (int v = 0; v < kVecs; ++v) {
      const Vi sum = Isa::add_i(sums[0][m][v], Isa::load_i(from + m * width + v * Isa::kLanes));
      sums[0][m][v] = P::value(sum, repair);
    }
  }
  store_block<P, kRows, kTiles>(b, sums[0]);
}

template <typename P, int kTiles, int kRows = 1>
void finish_rows(int64_t rows, const BlockArgs& b, int64_t words, int64_t width, const int32_t* from) {
  if constexpr (kRows < P::kMaxRows) {
    if (rows > kRows) return finish_rows<P, kTiles, kRows + 1>(rows, b, words, width, from);
  }
  finish_sums<P, kRows, kTiles>(b, words, width, from);
}

// Words of kBits become 8 / kBits steps of codes in bytes.
template <int kBits>
void expand_codes(const uint8_t* w, int64_t words, uint8_t* out) {
  constexpr int kSteps = Codes<kBits>::kSteps;
  for (int64_t i = 0; i < words; ++i) {
    TERSOR_UNROLL(8)
    for (int j = 0; j < kSteps; ++j) {
      TERSOR_UNROLL(4)
      for (int v = 0; v < kTileVecs; ++v) {
        const int64_t at = v * Isa::kLanes * 4;
        Isa::store_i(out + (i * kSteps + j) * kTileBytes + at, Isa::Dot<kBits>::codes(w + i * kTileBytes + at, j));
      }
    }
  }
}

template <typename I, typename P, int kBits>
bool gemm_matrix(const GemmArgs& g, const GemmRange& r) {
  const int64_t rows = r.m1 - r.m0;
  // One block of rows reads the weights once either way, and waits for them.
  if (rows <= P::kMaxRows || g.K < I::kMatrixK) return false;
  constexpr int64_t kTiles = I::kMatrixTiles, kWidth = kTiles * kTileN, kStepBytes = I::kMatrixK / kTileK8 * kTileBytes;
  const int64_t words = ceil_div(g.K, tile_k(kBits)), steps = g.K / I::kMatrixK;
  const int64_t step_words = I::kMatrixK / tile_k(kBits), left = words - steps * step_words;
  const int64_t blocks = ceil_div(rows, 2 * I::kMatrixRows), height = ceil_div(rows, blocks);
  const typename I::Matrix unit(height);
  alignas(64) int32_t sums[2 * I::kMatrixRows * kWidth];
  auto* expanded = static_cast<uint8_t*>(r.scratch);

  for (int64_t t = r.t0; t < r.t1; t += kTiles) {
    const int tiles = static_cast<int>(t + kTiles < r.t1 ? kTiles : r.t1 - t);
    BlockArgs b{};
    b.gemm = &g;
    b.w = g.weight_packed + t * words * kTileBytes;
    b.ldx = g.ldq;
    b.words = words;
    b.step = 1;
    b.n = t * kTileN;
    const uint8_t* w = b.w;
    int64_t tile_stride = b.tile_stride();
    if constexpr (kBits < 8) {
      w = expanded;
      tile_stride = steps * kStepBytes;
      for (int i = 0; i < tiles; ++i) {
        expand_codes<kBits>(b.w + i * b.tile_stride(), steps * step_words, expanded + i * tile_stride);
      }
    }
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t m = i + 1 < blocks ? i * height : rows - height;
      const int8_t* x = g.q + (r.m0 + m) * g.ldq;
      unit.multiply(w, tile_stride, tiles, x, g.ldq, steps, sums);
      for (int64_t j = 0; j < height; j += P::kMaxRows) {
        const int64_t some = height - j < P::kMaxRows ? height - j : P::kMaxRows;
        b.x = reinterpret_cast<const char*>(x + j * g.ldq);
        b.m = r.m0 + m + j;
        (tiles == kTiles ? finish_rows<P, kTiles> : finish_rows<P, 1>)(some, b, left, kWidth, sums + j * kWidth);
      }
    }
  }
  unit.release();
  if (g.stream_y) Isa::stream_fence();
  return true;
}

}  // namespace
}  // namespace tersor::TERSOR_ISA
