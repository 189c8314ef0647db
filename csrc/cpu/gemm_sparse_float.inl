// Sparse float weights x float rows, class F.
//
// One row: a scalar loop over the non-zeros of each channel. More: kVecs registers of rows at a time, x transposed, so that a
// non-zero is a broadcast and kVecs multiply-adds whose x lie beside each other:
//
//   x transposed  [ K ][ kVecs * kLanes rows ] f32        sums  [ 16 channels ][ kVecs * kLanes rows ] f32
//
// The transposed rows stay in L2: fewer of them where K is large.

namespace tersor::TERSOR_ISA {
namespace {

constexpr int kMostVecs = 4;
constexpr int64_t kMostFloatRows = kMostVecs * Isa::kLanes;

inline int64_t held_k(const uint8_t* index, int64_t i, int64_t K) {
  uint16_t k;
  __builtin_memcpy(&k, index + 2 * i, 2);
  return k < K ? k : 0;
}

inline float value_at(const uint8_t* values, int64_t i) {
  float v;
  __builtin_memcpy(&v, values + 4 * i, 4);
  return v;
}

struct Range {
  int64_t first, end;
};

inline Range entries_of(const SparseFloatWeights& s, int64_t n) {
  int64_t first = s.offset[n], end = s.offset[n + 1];
  first = first < 0 ? 0 : first < s.entries ? first : s.entries;
  end = end < first ? first : end < s.entries ? end : s.entries;
  return {first, end};
}

inline float channel_dot(const SparseFloatWeights& s, Range r, const float* x, int64_t K) {
  constexpr int kSums = 8;  // independent chains
  float sum[kSums] = {};
  int64_t i = r.first;
  for (; i + kSums <= r.end; i += kSums) {
    TERSOR_UNROLL(8)
    for (int u = 0; u < kSums; ++u) sum[u] += value_at(s.values, i + u) * x[held_k(s.index, i + u, K)];
  }
  for (; i < r.end; ++i) sum[0] += value_at(s.values, i) * x[held_k(s.index, i, K)];
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

// The sums of one channel with kVecs registers of rows.
template <int kVecs>
void channel_rows(const SparseFloatWeights& s, Range r, const float* xt, int64_t K, float* out) {
  constexpr int kSets = kMostVecs / kVecs;  // four chains in flight at least
  constexpr int64_t kRow = kVecs * Isa::kLanes;
  Vf sum[kSets][kVecs];
  TERSOR_UNROLL(4)
  for (int u = 0; u < kSets; ++u) {
    TERSOR_UNROLL(4)
    for (int v = 0; v < kVecs; ++v) sum[u][v] = Isa::set1(0.0f);
  }
  auto add = [&](int u, int64_t i) TERSOR_INLINE_LAMBDA {
    const float* x = xt + held_k(s.index, i, K) * kRow;
    const Vf w = Isa::set1(value_at(s.values, i));
    TERSOR_UNROLL(4)
    for (int v = 0; v < kVecs; ++v) sum[u][v] = Isa::muladd(w, Isa::load(x + v * Isa::kLanes), sum[u][v]);
  };
  int64_t i = r.first;
  for (; i + 4 <= r.end; i += 4) {
    TERSOR_UNROLL(4)
    for (int u = 0; u < 4; ++u) add(u % kSets, i + u);
  }
  for (; i < r.end; ++i) add(0, i);
  TERSOR_UNROLL(4)
  for (int v = 0; v < kVecs; ++v) {
    TERSOR_UNROLL(4)
    for (int u = 1; u < kSets; ++u) sum[0][v] = Isa::add(sum[0][v], sum[u][v]);
    Isa::store(out + v * Isa::kLanes, sum[0][v]);
  }
}

// out[c][r] = in[r][c] for rows x columns; what is missing of a whole number of 16 x 16 blocks is zero in out.
void transpose_rows(const float* in, int64_t ld_in, int64_t rows, int64_t columns, float* out, int64_t ld_out) {
  for (int64_t c = 0; c < columns; c += 16) {
    for (int64_t r = 0; r < ld_out; r += 16) {
      const int64_t width = ld_out - r < 16 ? ld_out - r : 16;
      if (c + 16 <= columns && r + 16 <= rows) {
        Isa::transpose16(in + r * ld_in + c, ld_in, out + c * ld_out + r, ld_out);
        continue;
      }
      const int64_t stop = columns - c < 16 ? columns - c : 16;
      for (int64_t i = 0; i < stop; ++i) {
        for (int64_t j = 0; j < width; ++j) out[(c + i) * ld_out + r + j] = r + j < rows ? in[(r + j) * ld_in + c + i] : 0.0f;
      }
    }
  }
}

// bias and store of [rows][16] sums.
void store_sparse_float(const FloatGemmArgs& g, float* block, int64_t rows, int64_t m, int64_t t) {
  const int64_t n = t * kTileN, columns = n + kTileN <= g.N ? kTileN : g.N - n;
  const Channels channels(nullptr, g.bias, n, kTileN, columns);
  for (int64_t i = 0; i < rows && channels.bias; ++i) {
    for (int64_t v = 0; v < kTileN; v += Isa::kLanes) {
      float* at = block + i * kTileN + v;
      Isa::store(at, Isa::add(Isa::load(at), Isa::load(channels.bias + v)));
    }
  }
  finish_block(block, static_cast<int>(rows), kTileN, columns, g.activation,
               {element(g.y, g.y_dtype, m * g.ldy + n), g.y_dtype, g.ldy, nullptr, 0});
}

template <int kVecs>
void run_rows(const FloatGemmArgs& g, const GemmRange& r, int64_t m, int64_t rows) {
  constexpr int64_t kRow = kVecs * Isa::kLanes;
  auto* xt = static_cast<float*>(r.scratch);
  float* sums = xt + g.K * kRow;
  float* block = sums + kTileN * kMostFloatRows;
  transpose_rows(g.x + m * g.ldx, g.ldx, rows, g.K, xt, kRow);
  for (int64_t t = r.t0; t < r.t1; ++t) {
    for (int64_t c = 0; c < kTileN; ++c) {
      const int64_t n = t * kTileN + c;
      channel_rows<kVecs>(*g.sparse, n < g.N && g.K > 0 ? entries_of(*g.sparse, n) : Range{0, 0}, xt, g.K, sums + c * kRow);
    }
    transpose_rows(sums, kRow, kTileN, rows, block, kTileN);
    store_sparse_float(g, block, rows, m, t);
  }
}

void spmm_f32(const FloatGemmArgs& g, const GemmRange& r) {
  const int64_t rows = r.m1 - r.m0;
  if (rows <= 0) return;
  if (rows == 1) {
    for (int64_t t = r.t0; t < r.t1; ++t) {
      alignas(64) float sums[kTileN] = {};
      for (int64_t c = 0; c < kTileN && t * kTileN + c < g.N && g.K > 0; ++c) {
        sums[c] = channel_dot(*g.sparse, entries_of(*g.sparse, t * kTileN + c), g.x + r.m0 * g.ldx, g.K);
      }
      store_sparse_float(g, sums, 1, r.m0, t);
    }
    return;
  }
  int64_t vecs = kTransposedBytes / 4 / Isa::kLanes / (g.K > 0 ? g.K : 1);
  vecs = vecs >= 4 ? 4 : vecs >= 2 ? 2 : 1;
  for (int64_t m = r.m0; m < r.m1;) {
    const int64_t left = r.m1 - m;
    while (vecs > 1 && left <= vecs / 2 * Isa::kLanes) vecs /= 2;
    const int64_t height = left < vecs * Isa::kLanes ? left : vecs * Isa::kLanes;
    (vecs == 4 ? run_rows<4> : vecs == 2 ? run_rows<2> : run_rows<1>)(g, r, m, height);
    m += height;
  }
}

}  // namespace
}  // namespace tersor::TERSOR_ISA
