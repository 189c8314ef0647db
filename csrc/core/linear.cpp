#include "linear.h"

#include <cstring>

#include "parallel.h"
#include "scratch.h"

namespace tersor {
namespace {

constexpr const char* kOutOfMemory = "out of memory for scratch";

// Rows of a block share one pass over the weights. 64 rows of s8 at K = 4096 are 260 KiB: they stay in L2 beside a panel of tiles.
constexpr int64_t kBlockRows = 64;
// Above this many rows threads take rows each; below, n tiles each (every thread then quantises the few rows for itself).
constexpr int64_t kSplitRows = 32;
// Multiply-adds below which a second thread costs more than it brings: about 4 us of int8 work (bench/threads.py). Few rows wait
// for the weights: one takes as long as three.
constexpr int64_t kMinThreadWork = int64_t{3} << 18;
constexpr int64_t kMinCostRows = 3;
constexpr int64_t kXnorSpeed = 4;                       // bits x bits are about so many times as fast
constexpr int64_t kMaxScratchBytes = int64_t{4} << 20;  // per thread
// Rows of s8 are kept apart by a line beyond the next multiple of 64: a stride of exactly 4096 would make them collide in L1.
int64_t s8_stride(int64_t K) { return round_up(K, 64) + 64; }

thread_local Scratch thread_scratch;

struct Carver {
  char* at;
  template <typename T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(at);
    at += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }
};

// The split of C over threads: row_pieces x tile_pieces rectangles.
struct Split {
  int64_t row_pieces, tile_pieces;
  int64_t pieces() const { return row_pieces * tile_pieces; }
};

Split split_work(int64_t M, int64_t N, int64_t K) {
  const int64_t tiles = ceil_div(N, kTileN);
  const double work = static_cast<double>(M < kMinCostRows ? kMinCostRows : M) * static_cast<double>(N) * static_cast<double>(K);
  if (work < static_cast<double>(2 * kMinThreadWork)) return {1, 1};
  int64_t threads = thread_pool.threads();
  if (work < static_cast<double>(threads) * kMinThreadWork) threads = static_cast<int64_t>(work / kMinThreadWork);
  int64_t rows = M > kSplitRows ? ceil_div(M, kSplitRows) : 1;
  if (rows > threads) rows = threads;
  // Fewer pieces along M where that leaves fewer threads idle: 40 rows on 3 threads are 1 x 3 pieces, not 2 x 1.
  Split best{0, 0};
  for (; rows > 0; --rows) {
    const int64_t cols = threads / rows < tiles ? threads / rows : tiles;
    if (rows * cols > best.pieces()) best = {rows, cols};
  }
  return best;
}

struct Rectangle {
  int64_t m0, m1, t0, t1;
};

Rectangle piece_of(const Split& s, int64_t M, int64_t N, int64_t i) {
  const int64_t tiles = ceil_div(N, kTileN);
  const int64_t r = i / s.tile_pieces, c = i % s.tile_pieces;
  // Rows are dealt in units of 8, the height of a register block, where there are enough of them.
  const int64_t unit = M >= 8 * s.row_pieces ? 8 : 1;
  const int64_t units = ceil_div(M, unit);
  const int64_t m0 = r * units / s.row_pieces * unit, m1 = (r + 1) * units / s.row_pieces * unit;
  return {m0, m1 < M ? m1 : M, c * tiles / s.tile_pieces, (c + 1) * tiles / s.tile_pieces};
}

// Of a layer: gate and up are not parted.
Rectangle piece_of(const Split& s, int64_t M, const LinearWeights& w, int64_t i) {
  if (!w.glu) return piece_of(s, M, w.N, i);
  const Rectangle r = piece_of(s, M, w.N / 2, i);
  return {r.m0, r.m1, 2 * r.t0, 2 * r.t1};
}

// Block of rows whose scratch stays under the bound, equal blocks rather than a short last one.
int64_t block_rows(int64_t rows, int64_t bytes_per_row) {
  int64_t most = kMaxScratchBytes / bytes_per_row;
  if (most > kBlockRows) most = kBlockRows;
  if (most < 1) most = 1;
  if (rows <= most) return rows < 1 ? 1 : rows;
  const int64_t blocks = ceil_div(rows, most);
  const int64_t even = round_up(ceil_div(rows, blocks), 8);
  return even < most ? even : most;
}

const char* at(const StridedRows& x, int64_t m) { return static_cast<const char*>(x.x) + m * x.stride_m * dtype_bytes(x.dtype); }

template <int64_t kBytes>
void gather(const char* from, int64_t step_bytes, int64_t K, char* out) {
  for (int64_t k = 0; k < K; ++k) std::memcpy(out + k * kBytes, from + k * step_bytes, kBytes);
}

// Contiguous copy of row m, for a last dimension with a stride.
void gather_row(const StridedRows& x, int64_t m, int64_t K, char* out) {
  const int64_t bytes = dtype_bytes(x.dtype);
  (bytes == 4 ? gather<4> : gather<2>)(at(x, m), x.stride_k * bytes, K, out);
}

int64_t gather_bytes(const StridedRows& x, int64_t K) { return x.stride_k == 1 ? 0 : round_up(K * 4, 64); }

// Quantises rows [m0, m1); `row` holds one gathered row.
void quantize_block(const KernelTable& kt, const StridedRows& x, int64_t m0, int64_t m1, int64_t K, const float* absmax,
                    const float* input_scale, int8_t* q, int64_t ldq, float* scale, int32_t* row_sum, char* row) {
  if (x.stride_k == 1) {
    kt.quantize_x.run(
        {{at(x, m0), x.dtype, x.stride_m}, m1 - m0, K, absmax ? absmax + m0 : nullptr, q, ldq, scale, row_sum, input_scale});
    return;
  }
  for (int64_t m = m0; m < m1; ++m) {
    gather_row(x, m, K, row);
    const int64_t i = m - m0;
    kt.quantize_x.run(
        {{row, x.dtype, K}, 1, K, absmax ? absmax + m : nullptr, q + i * ldq, ldq, scale + i, row_sum + i, input_scale});
  }
}

// The bias as f32: the caller's own, or converted into `out`.
const float* widen_bias(const KernelTable& kt, const LinearWeights& w, float* out) {
  if (!w.bias || w.bias_dtype == Dtype::f32) return static_cast<const float*>(w.bias);
  kt.widen_x.run(w.bias, w.bias_dtype, w.N, out);
  return out;
}
int64_t bias_bytes(const LinearWeights& w) { return w.bias && w.bias_dtype != Dtype::f32 ? round_up(w.N * 4, 64) : 0; }

void* row_of(const Output& out, int64_t m, int64_t N) { return static_cast<char*>(out.y) + m * N * dtype_bytes(out.dtype); }

int64_t out_features(const LinearWeights& w) { return w.glu ? w.N / 2 : w.N; }

bool streams(const KernelTable& kt, const Output& out, int64_t M, int64_t N) {
  return out.dtype == Dtype::f32 && N % kTileN == 0 && reinterpret_cast<uintptr_t>(out.y) % 64 == 0 && kt.stream_bytes > 0 &&
         M * N * 4 >= kt.stream_bytes;
}

// Rows [m0, m1) of x as bits; `row` holds one gathered row.
void binarize_block(const KernelTable& kt, const StridedRows& x, int64_t m0, int64_t m1, int64_t K, const float* threshold,
                    uint8_t* bits, int64_t ld_bits, float* scale, char* row) {
  if (x.stride_k == 1) {
    kt.binarize_x.run({{at(x, m0), x.dtype, x.stride_m}, m1 - m0, K, threshold, bits, ld_bits, scale});
    return;
  }
  for (int64_t m = m0; m < m1; ++m) {
    gather_row(x, m, K, row);
    const int64_t i = m - m0;
    kt.binarize_x.run({{row, x.dtype, K}, 1, K, threshold, bits + i * ld_bits, ld_bits, scale + i});
  }
}

// Operands of a block of rows whose first is row m of the output.
GemmArgs gemm_args(const LinearWeights& w, const int8_t* q, int64_t ldq, const float* scale, const int32_t* row_sum,
                   const float* bias, const Output& out, int64_t m, bool stream) {
  return {w.N,
          w.K,
          q,
          ldq,
          scale,
          row_sum,
          w.weight_packed,
          w.weight_scale,
          bias,
          w.activation,
          row_of(out, m, out_features(w)),
          out.dtype,
          out_features(w),
          stream,
          w.group_scale,
          w.group_size,
          out.residual ? static_cast<const char*>(out.residual) + m * out.residual_stride * dtype_bytes(out.dtype) : nullptr,
          out.residual_stride,
          w.sparse};
}

// The kernel of a layer's width.
const IntGemm& gemm_of(const KernelTable& kt, const LinearWeights& w) {
  if (w.sparse) return kt.spmm_s8;
  if (w.group_scale) return kt.gemm_w4_grouped;
  return w.bits == 8 ? kt.gemm_w8 : w.bits == 4 ? kt.gemm_w4 : w.bits == 2 ? kt.gemm_w2 : kt.gemm_w1;
}

// The last word of a row reaches past K, where it meets code 0, or -128 on an instruction set that flips the top bit of codes.
void zero_past_k(int8_t* q, int64_t rows, int64_t ldq, const LinearWeights& w) {
  const int64_t past = round_up(w.K, tile_k(w.bits)) - w.K;
  for (int64_t m = 0; m < rows && past; ++m) std::memset(q + m * ldq + w.K, 0, static_cast<size_t>(past));
}

// Tiles of gate and up that are multiplied before they become one: they stay in L1 or L2 meanwhile. 12 are whole panels of every
// register block.
constexpr int64_t kGluTiles = 12;
constexpr int64_t kGluBytes = kBlockRows * kGluTiles * kTileN * 4;
int64_t glu_tiles(int64_t rows) {
  const int64_t fit = kGluBytes / (rows * kTileN * 4 * kGluTiles) * kGluTiles;
  return fit > kGluTiles ? fit : kGluTiles;
}
// Rows are a line further apart than they are long, as those of s8 are.
int64_t glu_stride(int64_t rows) { return (glu_tiles(rows) + 1) * kTileN; }
int64_t glu_bytes(const LinearWeights& w) { return w.glu ? kGluBytes + kBlockRows * kTileN * 4 : 0; }

// A block of rows times the tiles of a range; `both` holds glu_bytes.
void multiply(const KernelTable& kt, const IntGemm& gemm, const LinearWeights& w, const GemmArgs& args, const GemmRange& range,
              float* both) {
  if (!w.glu) return gemm.run(args, range);
  const int64_t rows = range.m1, step = glu_tiles(rows), tile_bytes = ceil_div(w.K, tile_k(w.bits)) * kTileBytes;
  for (int64_t t = range.t0; t < range.t1; t += step) {
    const int64_t tiles = t + step < range.t1 ? step : range.t1 - t, n = t * kTileN;
    GemmArgs part = args;
    part.N = tiles * kTileN;
    part.weight_packed += t * tile_bytes;
    part.weight_scale += n;
    if (part.bias) part.bias += n;
    part.activation = Activation::none;
    part.y = both;
    part.y_dtype = Dtype::f32;
    part.ldy = glu_stride(rows);
    gemm.run(part, {0, rows, 0, tiles, range.scratch});
    char* y = static_cast<char*>(args.y) + n / 2 * dtype_bytes(args.y_dtype);
    kt.glu.run({rows, part.N / 2, both, part.ldy, w.activation, y, args.y_dtype, args.ldy});
  }
}

// K of a dense layer with as many multiply-adds.
int64_t working_k(const LinearWeights& w) {
  if (!w.sparse || w.sparse->storage == SparseStorage::masks) return w.K;
  const int64_t per_entry = w.sparse->storage == SparseStorage::tiles ? kTileK8 : 2 * kTileK8;  // a window's x is looked up first
  return ceil_div(w.sparse->entries * per_entry, ceil_div(w.N, kTileN));
}

int64_t groups_of(const LinearWeights& w) { return w.group_scale ? w.K / w.group_size : 0; }

// [rows][groups] sums of q over each group.
void sum_groups(const int8_t* q, int64_t rows, int64_t ldq, const LinearWeights& w, int32_t* sums) {
  for (int64_t m = 0; m < rows; ++m) {
    const int8_t* at = q + m * ldq;
    for (int64_t g = 0; g < groups_of(w); ++g, at += w.group_size) {
      int32_t sum = 0;
      for (int64_t k = 0; k < w.group_size; ++k) sum += at[k];
      *sums++ = sum;
    }
  }
}

}  // namespace

const char* quantize_rows(const KernelTable& kt, int64_t M, int64_t K, const StridedRows& x, const float* absmax,
                          const float* input_scale, int8_t* q, float* scale, int32_t* row_sum) {
  if (M == 0) return nullptr;
  constexpr int64_t kWorkPerElement = 64;  // a row element costs about as much as this many int8 multiply-adds
  Split split = split_work(M, kWorkPerElement, K);
  split = {split.pieces() < M ? split.pieces() : M, 1};
  const int64_t slice = gather_bytes(x, K);
  char* scratch = thread_scratch.get(slice * split.pieces());
  if (slice && !scratch) return kOutOfMemory;
  auto piece = [&](int64_t i) {
    const Rectangle r = piece_of(split, M, kTileN, i);
    quantize_block(kt, x, r.m0, r.m1, K, absmax, input_scale, q + r.m0 * K, K, scale + r.m0, row_sum + r.m0, scratch + i * slice);
  };
  parallel_for(split.pieces(), piece);
  return nullptr;
}

const char* binarize_rows(const KernelTable& kt, int64_t M, int64_t K, const StridedRows& x, const float* threshold, uint8_t* bits,
                          float* scale) {
  const int64_t ld = 4 * ceil_div(K, tile_k(1));
  char* row = nullptr;
  if (x.stride_k != 1 && !(row = thread_scratch.get(gather_bytes(x, K)))) return kOutOfMemory;
  binarize_block(kt, x, 0, M, K, threshold, bits, ld, scale, row);
  return nullptr;
}

const char* linear_dynamic(const KernelTable& kt, int64_t M, const StridedRows& x, const LinearWeights& w, const Output& out) {
  if (M == 0 || w.N == 0) return nullptr;
  const IntGemm& gemm = gemm_of(kt, w);
  const Split split = split_work(M, w.N, working_k(w));
  const bool stream = !w.glu && streams(kt, out, M, w.N);
  const int64_t ldq = s8_stride(w.K), groups = groups_of(w);
  const int64_t row_bytes = ldq + gemm.row_scratch(w.K) + 8 + 4 * groups;
  const int64_t mc = block_rows(ceil_div(M, split.row_pieces), row_bytes);
  const int64_t slice = round_up(mc * row_bytes, 64) + 320 + gather_bytes(x, w.K) + glu_bytes(w) + gemm.panel_scratch(w.K);
  char* scratch = thread_scratch.get(slice * split.pieces() + bias_bytes(w));
  if (!scratch) return kOutOfMemory;
  const float* bias = widen_bias(kt, w, reinterpret_cast<float*>(scratch + slice * split.pieces()));

  auto piece = [&](int64_t i) {
    const Rectangle r = piece_of(split, M, w, i);
    Carver carve{scratch + i * slice};
    auto* q = carve.take<int8_t>(mc * ldq);
    auto* scale = carve.take<float>(mc);
    auto* row_sum = carve.take<int32_t>(mc);
    auto* group_sum = carve.take<int32_t>(mc * groups);
    char* row = carve.take<char>(gather_bytes(x, w.K));
    auto* both = carve.take<float>(glu_bytes(w) / 4);
    void* gemm_scratch = carve.at;
    for (int64_t m = r.m0; m < r.m1; m += mc) {
      const int64_t rows = m + mc < r.m1 ? mc : r.m1 - m;
      quantize_block(kt, x, m, m + rows, w.K, nullptr, w.input_scale, q, ldq, scale, row_sum, row);
      zero_past_k(q, rows, ldq, w);
      if (groups) sum_groups(q, rows, ldq, w, group_sum);
      multiply(kt, gemm, w, gemm_args(w, q, ldq, scale, groups ? group_sum : row_sum, bias, out, m, stream),
               {0, rows, r.t0, r.t1, gemm_scratch}, both);
    }
  };
  parallel_for(split.pieces(), piece);
  return nullptr;
}

const char* linear_s8(const KernelTable& kt, int64_t M, const S8Rows& x, const LinearWeights& w, const Output& out) {
  if (M == 0 || w.N == 0) return nullptr;
  const IntGemm& gemm = gemm_of(kt, w);
  const Split split = split_work(M, w.N, w.K);
  const bool stream = !w.glu && streams(kt, out, M, w.N);
  // The last word would reach past K, perhaps past the buffer: such rows are copied.
  const bool copy = w.K % tile_k(w.bits) != 0;
  const int64_t ldq = copy ? s8_stride(w.K) : x.ldq, groups = groups_of(w);
  const int64_t row_bytes = (copy ? ldq : 0) + gemm.row_scratch(w.K) + 1 + 4 * groups;
  const int64_t mc = block_rows(ceil_div(M, split.row_pieces), row_bytes);
  const int64_t slice = round_up(mc * row_bytes, 64) + 128 + glu_bytes(w) + gemm.panel_scratch(w.K);
  char* scratch = thread_scratch.get(slice * split.pieces() + bias_bytes(w));
  if (!scratch) return kOutOfMemory;
  const float* bias = widen_bias(kt, w, reinterpret_cast<float*>(scratch + slice * split.pieces()));

  auto piece = [&](int64_t i) {
    const Rectangle r = piece_of(split, M, w, i);
    Carver carve{scratch + i * slice};
    auto* rows_copy = carve.take<int8_t>(copy ? mc * ldq : 0);
    auto* group_sum = carve.take<int32_t>(mc * groups);
    auto* both = carve.take<float>(glu_bytes(w) / 4);
    void* gemm_scratch = carve.at;
    for (int64_t m = r.m0; m < r.m1; m += mc) {
      const int64_t rows = m + mc < r.m1 ? mc : r.m1 - m;
      const int8_t* q = x.q + m * x.ldq;
      if (copy) {
        for (int64_t j = 0; j < rows; ++j) std::memcpy(rows_copy + j * ldq, q + j * x.ldq, static_cast<size_t>(w.K));
        zero_past_k(rows_copy, rows, ldq, w);
        q = rows_copy;
      }
      if (groups) sum_groups(q, rows, ldq, w, group_sum);
      const float* scale = x.scale ? x.scale + m : nullptr;
      multiply(kt, gemm, w, gemm_args(w, q, ldq, scale, groups ? group_sum : x.row_sum + m, bias, out, m, stream),
               {0, rows, r.t0, r.t1, gemm_scratch}, both);
    }
  };
  parallel_for(split.pieces(), piece);
  return nullptr;
}

const char* linear_xnor(const KernelTable& kt, int64_t M, const StridedRows& x, const LinearWeights& w, const Output& out) {
  if (M == 0 || w.N == 0) return nullptr;
  const Split split = split_work(M, w.N, ceil_div(w.K, kXnorSpeed));
  const bool stream = streams(kt, out, M, w.N);
  const int64_t ld = s8_stride(4 * ceil_div(w.K, tile_k(1)));
  const int64_t row_bytes = ld + 4;
  const int64_t mc = block_rows(ceil_div(M, split.row_pieces), row_bytes);
  const int64_t slice = round_up(mc * row_bytes, 64) + 128 + gather_bytes(x, w.K);
  char* scratch = thread_scratch.get(slice * split.pieces() + bias_bytes(w));
  if (!scratch) return kOutOfMemory;
  const float* bias = widen_bias(kt, w, reinterpret_cast<float*>(scratch + slice * split.pieces()));

  auto piece = [&](int64_t i) {
    const Rectangle r = piece_of(split, M, w.N, i);
    Carver carve{scratch + i * slice};
    auto* bits = carve.take<uint8_t>(mc * ld);
    auto* scale = carve.take<float>(mc);
    char* row = carve.take<char>(gather_bytes(x, w.K));
    for (int64_t m = r.m0; m < r.m1; m += mc) {
      const int64_t rows = m + mc < r.m1 ? mc : r.m1 - m;
      binarize_block(kt, x, m, m + rows, w.K, w.threshold, bits, ld, scale, row);
      kt.gemm_xnor.run(gemm_args(w, reinterpret_cast<const int8_t*>(bits), ld, scale, nullptr, bias, out, m, stream),
                       {0, rows, r.t0, r.t1, nullptr});
    }
  };
  parallel_for(split.pieces(), piece);
  return nullptr;
}

const char* linear_weight_only(const KernelTable& kt, int64_t M, const StridedRows& x, const LinearWeights& w, const Output& out) {
  if (M == 0 || w.N == 0) return nullptr;
  const FloatGemm& gemm = w.sparse_float ? kt.spmm_f32 : kt.gemm_f32_w8;
  // A float multiply-add costs four int8 ones.
  const Split split = split_work(M, w.N, 4 * (w.sparse_float ? ceil_div(w.sparse_float->entries, w.N) : w.K));
  const bool direct = x.dtype == Dtype::f32 && x.stride_k == 1;
  const int64_t ldx = direct ? x.stride_m : round_up(w.K, 16) + 16;
  const int64_t row_bytes = (direct ? 0 : ldx * 4) + gemm.row_bytes;
  const int64_t mc = block_rows(ceil_div(M, split.row_pieces), row_bytes);
  const int64_t slice = round_up(mc * row_bytes, 64) + 64 + gather_bytes(x, w.K) + round_up(gemm.scratch(w.K), 64);
  char* scratch = thread_scratch.get(slice * split.pieces() + bias_bytes(w));
  if (!scratch) return kOutOfMemory;
  const float* bias = widen_bias(kt, w, reinterpret_cast<float*>(scratch + slice * split.pieces()));

  auto piece = [&](int64_t i) {
    const Rectangle r = piece_of(split, M, w.N, i);
    Carver carve{scratch + i * slice};
    auto* floats = carve.take<float>(direct ? 0 : mc * ldx);
    char* row = carve.take<char>(gather_bytes(x, w.K));
    void* gemm_scratch = carve.at;
    for (int64_t m = r.m0; m < r.m1; m += mc) {
      const int64_t rows = m + mc < r.m1 ? mc : r.m1 - m;
      if (!direct) {
        for (int64_t j = 0; j < rows; ++j) {
          const void* from = at(x, m + j);
          if (x.stride_k != 1) {
            gather_row(x, m + j, w.K, row);
            from = row;
          }
          kt.widen_x.run(from, x.dtype, w.K, floats + j * ldx);
        }
      }
      const float* rows_f32 = direct ? reinterpret_cast<const float*>(at(x, m)) : floats;
      const FloatGemmArgs args{
          w.N,       w.K, rows_f32,      ldx, w.weight_packed, w.weight_scale, bias, w.activation, row_of(out, m, w.N),
          out.dtype, w.N, w.sparse_float};
      gemm.run(args, {0, rows, r.t0, r.t1, gemm_scratch});
    }
  };
  parallel_for(split.pieces(), piece);
  return nullptr;
}

}  // namespace tersor
