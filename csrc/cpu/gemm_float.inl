// Float rows x 8-bit tiles. Codes become signed floats in registers (few rows) or in a block of scratch that all rows of the range
// share; a float [N,K] never exists. A tile's word holds four k of one channel, so lane = channel all the way:
//   f32(w) of step j = (word ^ 0x80808080) << (24 - 8j) >> 24 (arithmetic), exact.

namespace tersor::TERSOR_ISA {
namespace {

constexpr int64_t kFloatBlockK = 128;  // k of a block of expanded weights: 2 tiles x 128 x 64 B = 16 KiB, half of L1
constexpr int kDirectRows = 4;         // up to here weights are expanded in registers for each row block

template <int kStep>
Vf code_f32(Vi word) {
  return Isa::to_f32(Isa::sar<24>(Isa::shl<24 - 8 * kStep>(word)));
}

inline Vi signed_codes(const uint8_t* p) { return Isa::xor_i(Isa::load_i(p), Isa::set1_i(static_cast<int32_t>(0x80808080u))); }

// scale, bias and store of kRows x kTiles sums; `sum` is [kRows][width] floats.
void store_float_block(const FloatGemmArgs& g, float* sum, int rows, int64_t width, int64_t m, int64_t n) {
  const int64_t columns = n + width <= g.N ? width : g.N - n;
  const Channels channels(g.weight_scale, g.bias, n, width, columns);
  for (int i = 0; i < rows; ++i) {
    for (int64_t v = 0; v < width; v += Isa::kLanes) {
      Vf f = Isa::mul(Isa::load(sum + i * width + v), Isa::load(channels.scale + v));
      if (channels.bias) f = Isa::add(f, Isa::load(channels.bias + v));
      Isa::store(sum + i * width + v, f);
    }
  }
  finish_block(sum, rows, width, columns, g.activation, {element(g.y, g.y_dtype, m * g.ldy + n), g.y_dtype, g.ldy, nullptr, 0});
}

// Few rows: expand a tile in registers, use it kRows times. K past a multiple of 4 meets x = 0 through a padded copy of the row's
// end.
template <int kRows>
void direct_kernel(const FloatGemmArgs& g, int64_t m, int64_t t) {
  const int64_t k_steps = ceil_div(g.K, kTileK8), whole = g.K / kTileK8;
  const uint8_t* w = g.weight_packed + t * k_steps * kTileBytes;
  const float* x = g.x + m * g.ldx;
  Vf acc[kRows][2][kTileVecs];  // even and odd k apart: two chains of adds in flight per vector
  TERSOR_UNROLL(4)
  for (int i = 0; i < kRows; ++i) {
    TERSOR_UNROLL(4)
    for (int v = 0; v < kTileVecs; ++v) acc[i][0][v] = acc[i][1][v] = Isa::set1(0.0f);
  }
  auto step = [&](const uint8_t* tile, const float* xs, int64_t ldx) TERSOR_INLINE_LAMBDA {
    TERSOR_UNROLL(4)
    for (int v = 0; v < kTileVecs; ++v) {
      const Vi word = signed_codes(tile + v * Isa::kLanes * 4);
      const Vf w0 = code_f32<0>(word), w1 = code_f32<1>(word), w2 = code_f32<2>(word), w3 = code_f32<3>(word);
      TERSOR_UNROLL(4)
      for (int i = 0; i < kRows; ++i) {
        const float* row = xs + i * ldx;
        acc[i][0][v] = Isa::muladd(Isa::set1(row[0]), w0, acc[i][0][v]);
        acc[i][1][v] = Isa::muladd(Isa::set1(row[1]), w1, acc[i][1][v]);
        acc[i][0][v] = Isa::muladd(Isa::set1(row[2]), w2, acc[i][0][v]);
        acc[i][1][v] = Isa::muladd(Isa::set1(row[3]), w3, acc[i][1][v]);
      }
    }
  };
  for (int64_t k = 0; k < whole; ++k) step(w + k * kTileBytes, x + k * kTileK8, g.ldx);
  if (whole < k_steps) {
    // Pad codes are 0, which is -128 once signed: x must be 0 there.
    float last[kRows][kTileK8] = {};
    for (int i = 0; i < kRows; ++i) {
      for (int64_t k = whole * kTileK8; k < g.K; ++k) last[i][k - whole * kTileK8] = x[i * g.ldx + k];
    }
    step(w + whole * kTileBytes, last[0], kTileK8);
  }
  alignas(64) float sum[kRows * kTileN];
  TERSOR_UNROLL(4)
  for (int i = 0; i < kRows; ++i) {
    TERSOR_UNROLL(4)
    for (int v = 0; v < kTileVecs; ++v) Isa::store(sum + i * kTileN + v * Isa::kLanes, Isa::add(acc[i][0][v], acc[i][1][v]));
  }
  store_float_block(g, sum, kRows, kTileN, m, t * kTileN);
}

// Expanded block:  [ k ][ tiles of the panel ][ 16 ] f32
template <int kTiles>
void expand_weights(const uint8_t* w, int64_t tile_stride, int64_t steps, float* out) {
  constexpr int64_t kRow = kTiles * kTileN;
  for (int64_t s = 0; s < steps; ++s) {
    for (int v = 0; v < kTiles * kTileVecs; ++v) {
      const int t = v / kTileVecs, part = v % kTileVecs;
      const Vi word = signed_codes(w + t * tile_stride + s * kTileBytes + part * Isa::kLanes * 4);
      float* at = out + s * kTileK8 * kRow + v * Isa::kLanes;
      Isa::store(at, code_f32<0>(word));
      Isa::store(at + kRow, code_f32<1>(word));
      Isa::store(at + 2 * kRow, code_f32<2>(word));
      Isa::store(at + 3 * kRow, code_f32<3>(word));
    }
  }
}

// sum[i][:] += x[i][0..k) * w[0..k)[:], sums kept in memory between blocks of K.
template <int kRows, int kTiles>
void float_kernel(const float* x, int64_t ldx, const float* w, int64_t K, float* sum) {
  constexpr int kVecs = kTiles * kTileVecs;
  constexpr int64_t kRow = kTiles * kTileN;
  Vf acc[kRows][kVecs];
  TERSOR_UNROLL(12)
  for (int i = 0; i < kRows; ++i) {
    TERSOR_UNROLL(4)
    for (int v = 0; v < kVecs; ++v) acc[i][v] = Isa::load(sum + i * kRow + v * Isa::kLanes);
  }
  for (int64_t k = 0; k < K; ++k) {
    Vf wk[kVecs];
    TERSOR_UNROLL(4)
    for (int v = 0; v < kVecs; ++v) wk[v] = Isa::load(w + k * kRow + v * Isa::kLanes);
    TERSOR_UNROLL(12)
    for (int i = 0; i < kRows; ++i) {
      const Vf xk = Isa::set1(x[i * ldx + k]);
      TERSOR_UNROLL(4)
      for (int v = 0; v < kVecs; ++v) acc[i][v] = Isa::muladd(xk, wk[v], acc[i][v]);
    }
  }
  TERSOR_UNROLL(12)
  for (int i = 0; i < kRows; ++i) {
    TERSOR_UNROLL(4)
    for (int v = 0; v < kVecs; ++v) Isa::store(sum + i * kRow + v * Isa::kLanes, acc[i][v]);
  }
}

using FloatKernel = void (*)(const float*, int64_t, const float*, int64_t, float*);

template <int kTiles, int kRows = 1>
FloatKernel pick_float(int64_t rows) {
  if constexpr (kRows < Isa::kFloatMaxRows) {
    if (rows > kRows) return pick_float<kTiles, kRows + 1>(rows);
  }
  return float_kernel<kRows, kTiles>;
}

template <int kRows = 1>
void run_direct(const FloatGemmArgs& g, int64_t m, int64_t rows, int64_t t) {
  if constexpr (kRows < kDirectRows) {
    if (rows > kRows) return run_direct<kRows + 1>(g, m, rows, t);
  }
  direct_kernel<kRows>(g, m, t);
}

// One panel of kTiles tiles for all rows of the range, K in blocks.
template <int kTiles>
void run_panel(const FloatGemmArgs& g, const GemmRange& r, int64_t t) {
  constexpr int64_t kRow = kTiles * kTileN;
  const int64_t k_steps = ceil_div(g.K, kTileK8), rows = r.m1 - r.m0;
  auto* expanded = static_cast<float*>(r.scratch);
  float* sum = expanded + kFloatBlockK * kRow;
  __builtin_memset(sum, 0, static_cast<size_t>(rows * kRow) * sizeof(float));
  const uint8_t* w = g.weight_packed + t * k_steps * kTileBytes;
  const int64_t row_blocks = ceil_div(rows, Isa::kFloatMaxRows);
  const int64_t short_rows = rows / row_blocks, long_blocks = rows % row_blocks;
  for (int64_t k = 0; k < g.K; k += kFloatBlockK) {
    const int64_t depth = k + kFloatBlockK < g.K ? kFloatBlockK : g.K - k;
    expand_weights<kTiles>(w + k / kTileK8 * kTileBytes, k_steps * kTileBytes, ceil_div(depth, kTileK8), expanded);
    int64_t m = 0;
    for (int64_t i = 0; i < row_blocks; ++i) {
      const int64_t height = short_rows + (i < long_blocks ? 1 : 0);
      pick_float<kTiles>(height)(g.x + (r.m0 + m) * g.ldx + k, g.ldx, expanded, depth, sum + m * kRow);
      m += height;
    }
  }
  store_float_block(g, sum, static_cast<int>(rows), kRow, r.m0, t * kTileN);
}

void gemm_f32_w8(const FloatGemmArgs& g, const GemmRange& r) {
  const int64_t rows = r.m1 - r.m0;
  if (rows <= 0) return;
  if (rows <= kDirectRows) {
    for (int64_t t = r.t0; t < r.t1; ++t) run_direct<>(g, r.m0, rows, t);
    return;
  }
  int64_t t = r.t0;
  for (; t + Isa::kFloatTiles <= r.t1; t += Isa::kFloatTiles) run_panel<Isa::kFloatTiles>(g, r, t);
  for (; t < r.t1; ++t) run_panel<1>(g, r, t);
}

}  // namespace
}  // namespace tersor::TERSOR_ISA
