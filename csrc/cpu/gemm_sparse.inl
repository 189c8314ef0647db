// Sparse s8 weights x s8 rows, class I: the sums are those of the dense weight, whatever is stored (SparseStorage in
// kernel_table.h).
//
//   for n tile:                       its entries stream once, stay in L1/L2 for the row blocks
//     for row block (kRows rows):
//       tiles    a tile and its k step: a load, kRows broadcasts of x, kRows dot4
//       masks    expanded into a panel of scratch, once for all rows; then as tiles, of every k step
//       windows  64 positions and 64 values: kRows times the x bytes at the positions, looked up in a window of the row, and a dot4
//
// Index and offset come from files. What they say is held within the arrays here: wrong bytes give wrong numbers, no stray read.

namespace tersor::TERSOR_ISA {
namespace {

using SignedDot = Isa::SignedDot;

// Past a row: a whole window after its last step, and rows begin at a line.
constexpr int64_t kSparsePastRow = kWindowK + kWindowStep;
constexpr int64_t kSparseRowPad = kSparsePastRow + 64;

struct SparseArgs {
  const GemmArgs* gemm;
  const char* x;         // first row of the block, prepared
  int64_t ldx;           // bytes
  int64_t m, t;          // first row within the arrays, n tile
  const uint8_t* w;      // first entry of the n tile
  const uint8_t* index;  // k steps of tiles; null: entry i is k step i
  int64_t entries;
  int64_t last;  // largest index
};

inline int64_t held_index(const uint8_t* index, int64_t i, int64_t last) {
  uint16_t at;
  __builtin_memcpy(&at, index + 2 * i, 2);
  return at < last ? at : last;
}

inline int64_t window_begin(const uint8_t* positions, int64_t last) {
  const int64_t at = Isa::high_bits16(positions);
  return (at < last ? at : last) * kWindowStep;
}

inline int64_t held_offset(const SparseWeights& s, int64_t t) {
  const int64_t at = s.offset[t] < s.entries ? s.offset[t] : s.entries;
  return at > 0 ? at : 0;
}

template <int kSets, int kRows>
TERSOR_INLINE void store_sparse(const SparseArgs& a, Vi (&sums)[kSets][kRows][kTileVecs]) {
  TERSOR_UNROLL(8)
  for (int s = 1; s < kSets; ++s) {
    TERSOR_UNROLL(8)
    for (int m = 0; m < kRows; ++m) {
      TERSOR_UNROLL(4)
      for (int v = 0; v < kTileVecs; ++v) sums[0][m][v] = Isa::add_i(sums[0][m][v], sums[s][m][v]);
    }
  }
  if constexpr (SignedDot::kSumShift >= 0) {
    TERSOR_UNROLL(4)
    for (int v = 0; v < kTileVecs; ++v) {
      const Vi sum = Isa::load_i(a.gemm->sparse->sum + a.t * kTileN + v * Isa::kLanes);
      const Vi excess = Isa::shl<SignedDot::kSumShift >= 0 ? SignedDot::kSumShift : 0>(sum);
      TERSOR_UNROLL(8)
      for (int m = 0; m < kRows; ++m) sums[0][m][v] = Isa::sub_i(sums[0][m][v], excess);
    }
  }
  BlockArgs b{};
  b.gemm = a.gemm;
  b.m = a.m;
  b.n = a.t * kTileN;
  store_channels<kRows, 1>(b, b.n, sums[0]);
}

// Runs step(set, i) for all entries, the sets of sums in turn.
template <int kSets, typename Step>
TERSOR_INLINE void each_entry(int64_t entries, Step step) {
  constexpr int kUnroll = kSets < 2 ? 2 : kSets;
  int64_t i = 0;
  for (; i + kUnroll <= entries; i += kUnroll) {
    TERSOR_UNROLL(4)
    for (int u = 0; u < kUnroll; ++u) step(u % kSets, i + u);
  }
  for (; i < entries; ++i) step(0, i);
}

template <int kRows, bool kIndexed>
void tiles_kernel(const SparseArgs& a) {
  constexpr int kSets = Isa::sparse_sets(kRows);
  Vi sums[kSets][kRows][kTileVecs];
  clear(sums);
  each_entry<kSets>(a.entries, [&](int set, int64_t i) TERSOR_INLINE_LAMBDA {
    const int64_t k = kIndexed ? held_index(a.index, i, a.last) : i;
    const char* x = a.x + k * kTileK8 * SignedDot::kXBytesPerK;
    typename SignedDot::W w[kTileVecs];
    TERSOR_UNROLL(4)
    for (int v = 0; v < kTileVecs; ++v) w[v] = SignedDot::load_w(a.w + i * kTileBytes + v * Isa::kLanes * 4);
    TERSOR_UNROLL(8)
    for (int m = 0; m < kRows; ++m) {
      const typename SignedDot::X xm = SignedDot::load_x(x + m * a.ldx);
      TERSOR_UNROLL(4)
      for (int v = 0; v < kTileVecs; ++v) sums[set][m][v] = SignedDot::dot4(sums[set][m][v], w[v], xm);
    }
  });
  store_sparse(a, sums);
}

template <int kRows>
void windows_kernel(const SparseArgs& a) {
  constexpr int kSets = Isa::sparse_sets(kRows);
  Vi sums[kSets][kRows][kTileVecs];
  clear(sums);
  each_entry<kSets>(a.entries, [&](int set, int64_t i) TERSOR_INLINE_LAMBDA {
    const uint8_t* w = a.w + i * 2 * kTileBytes;
    const char* x = a.x + window_begin(w, a.last);
    TERSOR_UNROLL(4)
    for (int v = 0; v < kTileVecs; ++v) {
      const Vi at = Isa::load_i(w + v * Isa::kLanes * 4), values = Isa::load_i(w + kTileBytes + v * Isa::kLanes * 4);
      TERSOR_UNROLL(8)
      for (int m = 0; m < kRows; ++m) {
        sums[set][m][v] = SignedDot::dot_bytes(sums[set][m][v], Isa::lookup(x + m * a.ldx, at), values);
      }
    }
  });
  store_sparse(a, sums);
}

template <int kRows>
void sparse_kernel(const SparseArgs& a) {
  if (a.gemm->sparse->storage == SparseStorage::windows) return windows_kernel<kRows>(a);
  a.index ? tiles_kernel<kRows, true>(a) : tiles_kernel<kRows, false>(a);
}

template <int kRows = 1>
void pick_sparse(int64_t rows, const SparseArgs& a) {
  if constexpr (kRows < Isa::kSparseMaxRows) {
    if (rows > kRows) return pick_sparse<kRows + 1>(rows, a);
  }
  sparse_kernel<kRows>(a);
}

// Panel of scratch: every tile of n tile t, expanded.
inline void expand_panel(const SparseWeights& s, int64_t t, int64_t steps, uint8_t* panel) {
  const uint8_t* at = s.packed + held_offset(s, t);
  const uint8_t* end = s.packed + s.entries;
  const uint8_t* masks = s.index + t * steps * 8;
  for (int64_t k = 0; k < steps; ++k) {
    uint64_t mask;
    __builtin_memcpy(&mask, masks + 8 * k, 8);
    Isa::expand_tile(mask, at, panel + k * kTileBytes);
    at += __builtin_popcountll(mask);
    at = at < end ? at : end;
  }
}

void spmm_s8(const GemmArgs& g, const GemmRange& r) {
  const int64_t rows = r.m1 - r.m0;
  if (rows <= 0) return;
  const SparseWeights& s = *g.sparse;
  const bool windows = s.storage == SparseStorage::windows;
  const int64_t steps = ceil_div(g.K, kTileK8);
  const int64_t x_bytes = windows ? 1 : SignedDot::kXBytesPerK;
  const int64_t ldx = round_up(round_up(g.K, kTileK8) * x_bytes + kSparsePastRow, 64);
  char* x = static_cast<char*>(r.scratch);
  for (int64_t m = 0; m < rows; ++m) {
    (windows ? SignedDot::prepare_bytes : SignedDot::prepare)(g.q + (r.m0 + m) * g.ldq, g.K, x + m * ldx);
    // Past K weights are 0; zeroed all the same, so that no uninitialised byte is ever read.
    if (windows || x_bytes == 1) __builtin_memset(x + m * ldx + g.K, 0, static_cast<size_t>(ldx - g.K));
  }
  auto* panel = reinterpret_cast<uint8_t*>(x + rows * ldx);

  const int64_t row_blocks = ceil_div(rows, Isa::kSparseMaxRows);
  const int64_t short_rows = rows / row_blocks, long_blocks = rows % row_blocks;  // nearly equal heights
  const int64_t entry_bytes = windows ? 2 * kTileBytes : kTileBytes;
  SparseArgs a{};
  a.gemm = &g;
  a.ldx = ldx;
  a.last = windows ? (g.K > 0 ? (g.K - 1) / kWindowStep : 0) : steps - 1;
  for (int64_t t = r.t0; t < r.t1; ++t) {
    a.t = t;
    if (s.storage == SparseStorage::masks) {
      expand_panel(s, t, steps, panel);
      a.w = panel;
      a.entries = steps;
    } else {
      const int64_t first = held_offset(s, t), end = held_offset(s, t + 1);
      a.w = s.packed + first * entry_bytes;
      a.index = windows ? nullptr : s.index + first * 2;
      a.entries = end > first && a.last >= 0 ? end - first : 0;
    }
    int64_t m = 0;
    for (int64_t i = 0; i < row_blocks; ++i) {
      const int64_t height = short_rows + (i < long_blocks ? 1 : 0);
      a.x = x + m * ldx;
      a.m = r.m0 + m;
      pick_sparse<>(height, a);
      m += height;
    }
  }
  if (g.stream_y) Isa::stream_fence();
}

}  // namespace
}  // namespace tersor::TERSOR_ISA
