// Integer GEMM over tiles of any width. A register block is kRows rows x kTiles tiles; all of K stays in registers, the epilogue
// follows at once.
//
//   for n panel (kTiles tiles, all of K):          streams once, stays in L1/L2 for the row blocks
//     for row block (kRows rows, s8, in L1/L2):
//       for k step (a word of 32 bits for each channel), for each of the word's 8 / bits groups of four codes:
//         kTiles loads and unpackings of weights, kRows broadcasts of x, kRows * kTiles dot4
//
// What a word is and what it does to the sums is the product P (products.h); its loops, blocks and stores are here.

namespace tersor::TERSOR_ISA {
namespace {

struct BlockArgs {
  const GemmArgs* gemm;
  const uint8_t* w;     // first tile of the panel
  const char* x;        // first row, in the form the product reads
  int64_t ldx;          // bytes
  int64_t words;        // k steps
  int64_t m, n;         // first row of the block within the range's arrays, first channel
  int64_t step;         // from one tile of the panel to the next, in tiles; not 1 only where kApart<P, rows>
  const uint8_t* next;  // tiles of the next panel to bring into L2 meanwhile
  int64_t next_lines;   // cache lines of it for this block

  int64_t tile_stride() const { return step * words * kTileBytes; }
};

// Whether the tiles of a panel of so many rows may lie apart, see run_blocks.
template <typename P, int kRows>
inline constexpr bool kApart = P::stream_tiles(kRows, INT64_MAX) > 1;

template <typename Sum>
inline constexpr bool kIsFloat = false;
template <>
inline constexpr bool kIsFloat<Vf> = true;
inline Vf as_f32(Vi v) { return Isa::to_f32(v); }
inline Vf as_f32(Vf v) { return v; }

// The channels from n on. Sums: Vi (the integers) or Vf (sums of scaled groups).
template <int kRows, int kTiles, typename Sum>
void store_channels(const BlockArgs& b, int64_t n, const Sum (&sum)[kRows][kTiles * kTileVecs]) {
  constexpr int64_t kWidth = kTiles * kTileN;
  const GemmArgs& g = *b.gemm;
  const int64_t columns = n + kWidth <= g.N ? kWidth : g.N - n;
  const Destination to{element(g.y, g.y_dtype, b.m * g.ldy + n), g.y_dtype, g.ldy,
                       g.residual ? element(g.residual, g.y_dtype, b.m * g.ldr + n) : nullptr, g.ldr};
  alignas(64) float block[kRows * kWidth];

  if constexpr (!kIsFloat<Sum>) {
    if (g.y_dtype == Dtype::s32) {
      TERSOR_UNROLL(8)
      for (int m = 0; m < kRows; ++m) {
        TERSOR_UNROLL(16)
        for (int v = 0; v < kTiles * kTileVecs; ++v) Isa::store_i(block + m * kWidth + v * Isa::kLanes, sum[m][v]);
      }
      finish_block(block, kRows, kWidth, columns, Activation::none, to);
      return;
    }
  }

  const Channels channels(g.weight_scale, g.bias, n, kWidth, columns);
  const bool direct =
      g.y_dtype == Dtype::f32 && columns == kWidth && (g.activation == Activation::none || g.activation == Activation::relu);
  const bool relu = direct && g.activation == Activation::relu;
  const float* residual = direct ? static_cast<const float*>(to.residual) : nullptr;
  float* y = direct ? static_cast<float*>(to.y) : block;
  const int64_t ldy = direct ? g.ldy : kWidth;
  auto finish = [&](auto put) TERSOR_INLINE_LAMBDA {
    TERSOR_UNROLL(8)
    for (int m = 0; m < kRows; ++m) {
      const Vf scale = Isa::set1(g.scale[b.m + m]);
      TERSOR_UNROLL(16)
      for (int v = 0; v < kTiles * kTileVecs; ++v) {
        Vf f = Isa::mul(as_f32(sum[m][v]), scale);
        f = Isa::mul(f, Isa::load(channels.scale + v * Isa::kLanes));
        if (channels.bias) f = Isa::add(f, Isa::load(channels.bias + v * Isa::kLanes));
        if (relu) f = activation::relu::apply(f);
        if (residual) f = Isa::add(f, Isa::load(residual + m * g.ldr + v * Isa::kLanes));
        put(y + m * ldy + v * Isa::kLanes, f);
      }
    }
  };
  if (direct && g.stream_y) {
    finish([](float* p, Vf v) { Isa::stream(p, v); });
  } else {
    finish([](float* p, Vf v) { Isa::store(p, v); });
  }
  if (!direct) finish_block(block, kRows, kWidth, columns, g.activation, to);
}

template <typename P, int kRows, int kTiles, typename Sum>
TERSOR_INLINE void store_block(const BlockArgs& b, const Sum (&sum)[kRows][kTiles * kTileVecs]) {
  if constexpr (!kApart<P, kRows> || kTiles == 1) {
    store_channels<kRows, kTiles>(b, b.n, sum);
  } else {
    TERSOR_UNROLL(4)
    for (int t = 0; t < kTiles; ++t) {
      Sum tile[kRows][kTileVecs];
      TERSOR_UNROLL(8)
      for (int m = 0; m < kRows; ++m) {
        TERSOR_UNROLL(4)
        for (int v = 0; v < kTileVecs; ++v) tile[m][v] = sum[m][t * kTileVecs + v];
      }
      store_channels<kRows, 1>(b, b.n + t * b.step * kTileN, tile);
    }
  }
}

template <int kSets, int kRows, int kVecs>
TERSOR_INLINE void clear(Vi (&sums)[kSets][kRows][kVecs]) {
  TERSOR_UNROLL(8)
  for (int s = 0; s < kSets; ++s) {
    TERSOR_UNROLL(8)
    for (int m = 0; m < kRows; ++m) {
      TERSOR_UNROLL(16)
      for (int v = 0; v < kVecs; ++v) sums[s][m][v] = Isa::zero_i();
    }
  }
}

// Adds `words` words to the sums and moves o past them. `turn` runs before each kUnroll words.
template <typename P, int kSets, int kRows, int kVecs, typename Turn>
TERSOR_INLINE void add_words(Vi (&sums)[kSets][kRows][kVecs], Operands& o, int64_t words, Turn& turn) {
  constexpr int kTogether = P::together(kRows);
  int64_t k = 0;
  for (; k + P::kUnroll <= words; k += P::kUnroll) {
    turn();
    TERSOR_UNROLL(4)
    for (int u = 0; u < P::kUnroll; u += kTogether) {
      P::template word<kTogether>(sums, u, {o.w + u * P::kWordBytes, o.tile_stride, o.x + u * P::kXWordBytes, o.ldx});
    }
    o.w += P::kUnroll * P::kWordBytes;
    o.x += P::kUnroll * P::kXWordBytes;
  }
  for (; k < words; ++k) {
    P::template word<1>(sums, 0, o);
    o.w += P::kWordBytes;
    o.x += P::kXWordBytes;
  }
}

// The sums of `words` words, 32 bits wide, in total[0]; o moves past them.
template <typename P, int kSets, int kRows, int kVecs, typename Turn>
TERSOR_INLINE void sum_words(Vi (&total)[kSets][kRows][kVecs], Operands& o, int64_t words, Turn&& turn) {
  clear(total);
  if constexpr (P::kFlushWords == 0) {
    add_words<P>(total, o, words, turn);
    P::join(total);
  } else {
    for (int64_t k = 0; k < words; k += P::kFlushWords) {
      Vi narrow[1][kRows][kVecs];
      clear(narrow);
      add_words<P>(narrow, o, k + P::kFlushWords < words ? P::kFlushWords : words - k, turn);
      TERSOR_UNROLL(8)
      for (int m = 0; m < kRows; ++m) {
        TERSOR_UNROLL(16)
        for (int v = 0; v < kVecs; ++v) total[0][m][v] = Isa::add_i(total[0][m][v], P::widen(narrow[0][m][v]));
      }
    }
  }
}

// Brings the tiles of the next panel into L2 at the pace at which this one is used; past the last line of the matrix a prefetch
// does nothing. Below kPrefetchRows the hardware prefetcher streams the weights; a software prefetch only costs a slot.
template <typename P, int kRows, int kTiles>
class NextPanel {
 public:
  explicit NextPanel(const BlockArgs& b) : next_(b.next) {
    if constexpr (kRows > kFew) stride_ = ceil_div(b.next_lines, b.words / P::kUnroll + 1) * kTileBytes;
  }
  // Before each kUnroll words.
  TERSOR_INLINE void operator()() {
    if constexpr (kRows < P::kPrefetchRows) return;
    if constexpr (kRows <= kFew) {  // the only block of its panel, as a rule
      TERSOR_UNROLL(16)
      for (int i = 0; i < kTiles * P::kUnroll; ++i) __builtin_prefetch(next_ + i * kTileBytes, 0, 2);
      next_ += kTiles * P::kUnroll * kTileBytes;
    } else {
      for (const uint8_t* stop = next_ + stride_; next_ < stop; next_ += kTileBytes) __builtin_prefetch(next_, 0, 2);
    }
  }

 private:
  static constexpr int kFew = P::kMaxRows / 2;
  const uint8_t* next_;
  int64_t stride_ = 0;
};

// Brings what store_block will write, and the residual it will read, into L1 while the block is still being summed. A line past
// the edge of y does no harm.
template <typename P, int kRows, int kTiles>
TERSOR_INLINE void expect_store(const BlockArgs& b) {
  if constexpr (kRows <= P::kMaxRows / 2) return;
  const GemmArgs& g = *b.gemm;
  if (g.stream_y) return;
  const int64_t bytes = dtype_bytes(g.y_dtype), width = kTiles * kTileN * bytes;
  const char* y = element(g.y, g.y_dtype, b.m * g.ldy + b.n);
  TERSOR_UNROLL(8)
  for (int m = 0; m < kRows; ++m, y += g.ldy * bytes) {
    TERSOR_UNROLL(8)
    for (int i = 0; i < kTiles; ++i) __builtin_prefetch(y + i * width / kTiles, 1, 3);
  }
  if (!g.residual) return;
  const char* residual = element(g.residual, g.y_dtype, b.m * g.ldr + b.n);
  TERSOR_UNROLL(8)
  for (int m = 0; m < kRows; ++m, residual += g.ldr * bytes) {
    TERSOR_UNROLL(8)
    for (int i = 0; i < kTiles; ++i) __builtin_prefetch(residual + i * width / kTiles, 0, 3);
  }
}

template <typename P, int kRows, int kTiles>
void micro_kernel(const BlockArgs& b) {
  constexpr int kSets = P::kFlushWords ? 1 : P::sets(kRows, kTiles);
  constexpr int kVecs = kTiles * kTileVecs;
  NextPanel<P, kRows, kTiles> next(b);

  expect_store<P, kRows, kTiles>(b);
  Vi sums[kSets][kRows][kVecs];
  Operands o{b.w, b.tile_stride(), b.x, b.ldx};
  sum_words<P>(sums, o, b.words, next);
  TERSOR_UNROLL(8)
  for (int m = 0; m < kRows; ++m) {
    const int32_t repair = P::repair(*b.gemm, b.m + m);
    TERSOR_UNROLL(16)
    for (int v = 0; v < kVecs; ++v) sums[0][m][v] = P::value(sums[0][m][v], repair);
  }
  store_block<P, kRows, kTiles>(b, sums[0]);
}

// 4-bit codes whose scale changes along K: the exact sum of each group becomes float and is added times its scale.
struct Grouped : Codes<4> {
  static constexpr bool kGrouped = true;
  static constexpr int kMaxRows = Isa::kGroupedMaxRows;
  static constexpr int max_tiles(int rows) { return Isa::grouped_tiles(rows); }
  static constexpr int stream_tiles(int, int64_t) { return 0; }
  static constexpr int kPrefetchRows = 1;
};

template <int kRows, int kTiles>
void grouped_kernel(const BlockArgs& b) {
  using P = Grouped;
  constexpr int kSets = P::kFlushWords ? 1 : P::sets(kRows, kTiles);
  constexpr int kVecs = kTiles * kTileVecs;
  const GemmArgs& g = *b.gemm;
  const int64_t groups = g.K / g.group_size, words = g.group_size / tile_k(4);
  const uint8_t* scales = g.group_scale + b.n / kTileN * groups * kGroupScaleBytes;
  NextPanel<P, kRows, kTiles> next(b);
  Operands o{b.w, b.tile_stride(), b.x, b.ldx};

  expect_store<P, kRows, kTiles>(b);
  Vf total[kRows][kVecs];
  TERSOR_UNROLL(8)
  for (int m = 0; m < kRows; ++m) {
    TERSOR_UNROLL(16)
    for (int v = 0; v < kVecs; ++v) total[m][v] = Isa::set1(0.0f);
  }
  for (int64_t i = 0; i < groups; ++i) {
    Vi sums[kSets][kRows][kVecs];
    sum_words<P>(sums, o, words, next);
    Vf scale[kVecs];
    TERSOR_UNROLL(16)
    for (int v = 0; v < kVecs; ++v) {
      const uint8_t* at = scales + (v / kTileVecs * groups + i) * kGroupScaleBytes + v % kTileVecs * Isa::kLanes * 2;
      scale[v] = Isa::load_f16(reinterpret_cast<const uint16_t*>(at));
    }
    TERSOR_UNROLL(8)
    for (int m = 0; m < kRows; ++m) {
      const int32_t repair = g.row_sum[(b.m + m) * groups + i];
      TERSOR_UNROLL(16)
      for (int v = 0; v < kVecs; ++v) {
        total[m][v] = Isa::muladd(Isa::to_f32(P::value(sums[0][m][v], repair)), scale[v], total[m][v]);
      }
    }
  }
  store_block<P, kRows, kTiles>(b, total);
}

using BlockKernel = void (*)(const BlockArgs&);

template <typename P>
struct Kernel {
  template <int kRows, int kTiles>
  static constexpr BlockKernel of = micro_kernel<P, kRows, kTiles>;
};
template <>
struct Kernel<Grouped> {
  template <int kRows, int kTiles>
  static constexpr BlockKernel of = grouped_kernel<kRows, kTiles>;
};

template <typename P, int kRows>
BlockKernel pick_tiles(int64_t tiles) {
  constexpr int kMost = P::max_tiles(kRows);
  if constexpr (kMost >= 4) {
    if (tiles >= 4) return Kernel<P>::template of<kRows, 4>;
  }
  if constexpr (kMost >= 3) {
    if (tiles >= 3) return Kernel<P>::template of<kRows, 3>;
  }
  if constexpr (kMost >= 2) {
    if (tiles >= 2) return Kernel<P>::template of<kRows, 2>;
  }
  return Kernel<P>::template of<kRows, 1>;
}

template <typename P, int kRows = 1>
BlockKernel pick(int64_t rows, int64_t tiles) {
  if constexpr (kRows < P::kMaxRows) {
    if (rows > kRows) return pick<P, kRows + 1>(rows, tiles);
  }
  return pick_tiles<P, kRows>(tiles);
}

// All blocks of a range. x: its first row, in the form the product reads; split: room for a panel of
// SplitCodes, or null.
//
// The tiles of a panel are neighbours:              0 1 2 | 3 4 5 | ...
// Where few rows wait for weights, one or two that
// lie half the range apart (stream_tiles):          0 n/2 | 1 n/2+1 | ...
// Each is then a stream from the first byte of its part to the last, which the hardware prefetcher follows from panel to panel;
// neighbours are streams that begin anew with each panel. It is x that then counts, read again for each panel.
template <typename P>
void run_blocks(const GemmArgs& g, const GemmRange& r, const char* x, int64_t ldx, int64_t words, uint8_t* split = nullptr) {
  const int64_t rows = r.m1 - r.m0;
  const int64_t row_blocks = ceil_div(rows, P::kMaxRows);
  const int64_t short_rows = rows / row_blocks, long_blocks = rows % row_blocks;  // nearly equal heights
  const int tallest = static_cast<int>(short_rows + (long_blocks ? 1 : 0));
  const int streams = row_blocks == 1 ? P::stream_tiles(tallest, words) : 0;
  const int64_t tiles = r.t1 - r.t0, width = streams ? streams : P::max_tiles(tallest), panels = tiles / width;
  const bool apart = streams > 1;
  BlockArgs b;
  b.gemm = &g;
  b.ldx = ldx;
  b.words = words;
  auto panel = [&](int64_t t, int64_t count, int64_t step) {
    b.w = g.weight_packed + t * words * kTileBytes;
    b.n = t * kTileN;
    b.step = step;
    const uint8_t* next = b.w + count * words * kTileBytes;
    const int64_t left = r.t1 - t - count, lines = (left < width ? left : width) * words;
    if (split) {
      SplitCodes::split(b.w, words, split);
      b.w = split;
    }
    int64_t m = 0;
    for (int64_t i = 0; i < row_blocks; ++i) {
      const int64_t height = short_rows + (i < long_blocks ? 1 : 0);
      b.x = x + m * ldx;
      b.m = r.m0 + m;
      b.next = next + i * lines / row_blocks * kTileBytes;
      b.next_lines = (i + 1) * lines / row_blocks - i * lines / row_blocks;
      pick<P>(height, count)(b);
      m += height;
    }
  };
  for (int64_t i = 0; i < panels; ++i) panel(r.t0 + (apart ? i : i * width), width, apart ? panels : 1);
  if (const int64_t rest = tiles - panels * width) panel(r.t1 - rest, rest, 1);
  if (g.stream_y) Isa::stream_fence();
}

// In gemm_matrix.inl; false: these rows are for the vector kernels.
template <typename I, typename P, int kBits>
bool gemm_matrix(const GemmArgs& g, const GemmRange& r);

// From so many rows on a panel is split once for all its blocks: below, that costs more than it saves. A panel of longer rows would
// not stay in L2 (512 KiB at 32 bytes for each k).
constexpr int64_t kSplitRows = 32;
constexpr int64_t kSplitMaxK = 16384;

template <int kBits, typename P = Codes<kBits>>
void gemm_codes(const GemmArgs& g, const GemmRange& r) {
  using D = typename P::D;
  const int64_t rows = r.m1 - r.m0;
  if (rows <= 0) return;
  if constexpr (Isa::kMatrixUnit && !P::kGrouped) {
    if (gemm_matrix<Isa, P, kBits>(g, r)) return;
  }
  const int64_t words = ceil_div(g.K, tile_k(kBits));
  int64_t ldx = g.ldq;
  const char* x = reinterpret_cast<const char*>(g.q + r.m0 * g.ldq);
  if constexpr (D::kXBytesPerK > 1) {  // the rows in the form that D::load_x reads
    const bool splits = kBits == 8 && g.K <= kSplitMaxK;
    auto* split = static_cast<uint8_t*>(r.scratch);
    char* out = static_cast<char*>(r.scratch) + (splits ? words * SplitCodes::kWordBytes : 0);
    const int64_t stride = words * P::kXWordBytes + 64;
    for (int64_t m = 0; m < rows; ++m) D::split_x(g.q + (r.m0 + m) * g.ldq, words, out + m * stride);
    x = out;
    ldx = stride;
    if (splits && rows >= kSplitRows) return run_blocks<SplitCodes>(g, r, x, ldx, words, split);
  }
  run_blocks<P>(g, r, x, ldx, words);
}

void gemm_w8(const GemmArgs& g, const GemmRange& r) { gemm_codes<8>(g, r); }
void gemm_w4(const GemmArgs& g, const GemmRange& r) { gemm_codes<4>(g, r); }
void gemm_w2(const GemmArgs& g, const GemmRange& r) { gemm_codes<2>(g, r); }
void gemm_w1(const GemmArgs& g, const GemmRange& r) { gemm_codes<1>(g, r); }
void gemm_w4_grouped(const GemmArgs& g, const GemmRange& r) { gemm_codes<4, Grouped>(g, r); }

void gemm_xnor(const GemmArgs& g, const GemmRange& r) {
  if (r.m1 <= r.m0) return;
  run_blocks<Xnor>(g, r, reinterpret_cast<const char*>(g.q + r.m0 * g.ldq), g.ldq, ceil_div(g.K, tile_k(1)));
}

}  // namespace
}  // namespace tersor::TERSOR_ISA
