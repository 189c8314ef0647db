// Integer GEMM over tiles. A register block is kRows rows x kTiles tiles; all of K stays in registers, the epilogue follows at
// once.
//
//   for n panel (kTiles tiles, all of K):          streams once, stays in L1/L2 for the row blocks
//     for row block (kRows rows, s8, in L1/L2):
//       for k step: kTiles loads of weights, kRows broadcasts of x, kRows * kTiles dot4

namespace tersor::TERSOR_ISA {
namespace {

constexpr int64_t kXStepBytes = kTileK8 * Isa::kXBytesPerK;

struct BlockArgs {
  const GemmArgs* gemm;
  const uint8_t* w;  // first tile of the panel
  const char* x;     // first row, in the form Isa::load_x reads
  int64_t ldx;       // bytes
  int64_t k_steps;
  int64_t m, n;         // first row of the block within the range's arrays, first channel
  const uint8_t* next;  // tiles of the next panel to bring into L2 meanwhile
  int64_t next_lines;   // cache lines of it for this block
};

template <int kRows, int kTiles>
void store_block(const BlockArgs& b, const Vi (&sum)[kRows][kTiles * kTileVecs]) {
  constexpr int64_t kWidth = kTiles * kTileN;
  const GemmArgs& g = *b.gemm;
  const int64_t columns = b.n + kWidth <= g.N ? kWidth : g.N - b.n;
  const int64_t offset = b.m * g.ldy + b.n;
  alignas(64) float block[kRows * kWidth];

  if (g.y_dtype == Dtype::s32) {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Vi repair = Isa::shl<7>(Isa::set1_i(g.row_sum[b.m + m]));
#pragma GCC unroll 16
      for (int v = 0; v < kTiles * kTileVecs; ++v)
        Isa::store_i(block + m * kWidth + v * Isa::kLanes, Isa::sub_i(sum[m][v], repair));
    }
    finish_block(block, kRows, kWidth, columns, Activation::none, g.y, g.y_dtype, g.ldy, offset);
    return;
  }

  const Channels channels(g.weight_scale, g.bias, b.n, kWidth, columns);
  const bool direct =
      g.y_dtype == Dtype::f32 && columns == kWidth && (g.activation == Activation::none || g.activation == Activation::relu);
  const bool relu = direct && g.activation == Activation::relu;
  float* y = direct ? static_cast<float*>(g.y) + offset : block;
  const int64_t ldy = direct ? g.ldy : kWidth;
  auto finish = [&](auto put) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Vi repair = Isa::shl<7>(Isa::set1_i(g.row_sum[b.m + m]));  // 128 * sum(q), modulo 2^32
      const Vf scale = Isa::set1(g.scale[b.m + m]);
#pragma GCC unroll 16
      for (int v = 0; v < kTiles * kTileVecs; ++v) {
        Vf f = Isa::mul(Isa::to_f32(Isa::sub_i(sum[m][v], repair)), scale);
        f = Isa::mul(f, Isa::load(channels.scale + v * Isa::kLanes));
        if (channels.bias) f = Isa::add(f, Isa::load(channels.bias + v * Isa::kLanes));
        if (relu) f = activation::relu::apply(f);
        put(y + m * ldy + v * Isa::kLanes, f);
      }
    }
  };
  if (direct && g.stream_y) {
    finish([](float* p, Vf v) { Isa::stream(p, v); });
  } else {
    finish([](float* p, Vf v) { Isa::store(p, v); });
  }
  if (!direct) finish_block(block, kRows, kWidth, columns, g.activation, g.y, g.y_dtype, g.ldy, offset);
}

template <int kRows, int kTiles>
void micro_kernel(const BlockArgs& b) {
  constexpr int kSets = Isa::acc_sets(kRows);
  constexpr int kVecs = kTiles * kTileVecs;
  constexpr int kUnroll = 4;
  // Small blocks read weights that the hardware prefetcher already streams; there a software prefetch only costs a slot.
  constexpr bool kPrefetch = kRows > Isa::kMaxRows / 2;

  Vi acc[kSets][kRows][kVecs];
#pragma GCC unroll 2
  for (int s = 0; s < kSets; ++s) {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) acc[s][m][v] = Isa::zero_i();
    }
  }

  const int64_t tile_stride = b.k_steps * kTileBytes;
  const uint8_t* w = b.w;
  const char* x = b.x;
  const int64_t ldx = b.ldx;
  const uint8_t* next = b.next;
  // Spread evenly over the k steps; past the last line of the matrix a prefetch does nothing.
  const int64_t stride = kPrefetch ? ceil_div(b.next_lines, b.k_steps / kUnroll + 1) * kTileBytes : 0;

  auto step = [&](Vi(&sums)[kRows][kVecs], int64_t u) __attribute__((always_inline)) {
    Isa::W codes[kVecs];
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVecs; ++v) {
        codes[t * kTileVecs + v] = Isa::load_w8(w + t * tile_stride + u * kTileBytes + v * Isa::kLanes * 4);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Isa::X row = Isa::load_x(x + m * ldx + u * kXStepBytes);
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) sums[m][v] = Isa::dot4(sums[m][v], codes[v], row);
    }
  };

  int64_t k = 0;
  for (; k + kUnroll <= b.k_steps; k += kUnroll) {
    if constexpr (kPrefetch) {
      for (const uint8_t* stop = next + stride; next < stop; next += kTileBytes) __builtin_prefetch(next, 0, 2);
    }
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) step(acc[u % kSets], u);
    w += kUnroll * kTileBytes;
    x += kUnroll * kXStepBytes;
  }
  for (; k < b.k_steps; ++k) {
    step(acc[0], 0);
    w += kTileBytes;
    x += kXStepBytes;
  }

  if constexpr (kSets == 2) {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) acc[0][m][v] = Isa::add_i(acc[0][m][v], acc[1][m][v]);
    }
  }
  store_block<kRows, kTiles>(b, acc[0]);
}

using MicroKernel = void (*)(const BlockArgs&);

template <int kRows>
MicroKernel pick_tiles(int64_t tiles) {
  constexpr int kMost = Isa::max_tiles(kRows);
  if constexpr (kMost >= 4) {
    if (tiles >= 4) return micro_kernel<kRows, 4>;
  }
  if constexpr (kMost >= 3) {
    if (tiles >= 3) return micro_kernel<kRows, 3>;
  }
  if constexpr (kMost >= 2) {
    if (tiles >= 2) return micro_kernel<kRows, 2>;
  }
  return micro_kernel<kRows, 1>;
}

template <int kRows = 1>
MicroKernel pick(int64_t rows, int64_t tiles) {
  if constexpr (kRows < Isa::kMaxRows) {
    if (rows > kRows) return pick<kRows + 1>(rows, tiles);
  }
  return pick_tiles<kRows>(tiles);
}

// The rows in the form that I::load_x reads: themselves, or a copy in scratch.
template <typename I>
const char* prepare_x(const int8_t* q, int64_t rows, int64_t k_steps, void* scratch, int64_t* ld) {
  if constexpr (I::kXBytesPerK > 1) {
    char* out = static_cast<char*>(scratch);
    const int64_t stride = k_steps * kXStepBytes + 64;
    for (int64_t m = 0; m < rows; ++m) I::split_x(q + m * *ld, k_steps, out + m * stride);
    *ld = stride;
    return out;
  } else {
    return reinterpret_cast<const char*>(q);
  }
}

void gemm_w8(const GemmArgs& g, const GemmRange& r) {
  const int64_t rows = r.m1 - r.m0;
  if (rows <= 0) return;
  const int64_t k_steps = ceil_div(g.K, kTileK8);
  int64_t ldx = g.ldq;
  const char* x = prepare_x<Isa>(g.q + r.m0 * g.ldq, rows, k_steps, r.scratch, &ldx);

  const int64_t row_blocks = ceil_div(rows, Isa::kMaxRows);
  const int64_t short_rows = rows / row_blocks, long_blocks = rows % row_blocks;  // nearly equal heights
  const int64_t panel = Isa::max_tiles(static_cast<int>(short_rows + (long_blocks ? 1 : 0)));
  for (int64_t t = r.t0; t < r.t1; t += panel) {
    const int64_t tiles = t + panel < r.t1 ? panel : r.t1 - t;
    const int64_t tiles_after = r.t1 - t - tiles < panel ? r.t1 - t - tiles : panel;
    BlockArgs b;
    b.gemm = &g;
    b.w = g.weight_packed + t * k_steps * kTileBytes;
    b.ldx = ldx;
    b.k_steps = k_steps;
    b.n = t * kTileN;
    const uint8_t* next = b.w + tiles * k_steps * kTileBytes;
    const int64_t lines = tiles_after * k_steps;
    int64_t m = 0;
    for (int64_t i = 0; i < row_blocks; ++i) {
      const int64_t height = short_rows + (i < long_blocks ? 1 : 0);
      b.x = x + m * ldx;
      b.m = r.m0 + m;
      b.next = next + i * lines / row_blocks * kTileBytes;
      b.next_lines = (i + 1) * lines / row_blocks - i * lines / row_blocks;
      pick<>(height, tiles)(b);
      m += height;
    }
  }
  if (g.stream_y) Isa::stream_fence();
}

}  // namespace
}  // namespace tersor::TERSOR_ISA
