// The contract between the kernels and everybody else: plain pointers, sizes and strides, and one table of function pointers per
// instruction set. No torch, no pybind11, no STL.
//
// C[M,N] = A[M,K] * W[N,K]^T throughout: A activations (s8 rows), W weights as nn.Linear stores them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tersor {

inline constexpr int64_t kTileN = 16;      // output channels of a tile
inline constexpr int64_t kTileBytes = 64;  // 16 channels x one 32-bit little-endian word along K
inline constexpr int64_t kMaxK = 132104;   // largest K with 128 * 127 * K < 2^31: int32 sums cannot wrap

inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Packed weights:  [ ceil(N/16) ][ ceil(K/kt) ][ 16 ][ 32 bits ]   kt = 32 / bits elements of K in a channel's word; pad codes are
// 0
//                     n tile        k step       n                 one 64-byte tile per step
// Element k = 4j + b of a word, b = 0..3, lies in byte b at bits [bits * j, bits * j + bits): shifting the word right by bits * j
// and masking each byte leaves four codes of neighbouring k, one in each byte. For 8 bits the word is four consecutive k.
inline constexpr int64_t tile_k(int bits) { return 32 / bits; }
inline constexpr int64_t packed_bytes(int64_t N, int64_t K, int bits) {
  return ceil_div(N, kTileN) * ceil_div(K, tile_k(bits)) * kTileBytes;
}
inline constexpr int64_t kTileK8 = tile_k(8);

// Codes are unsigned, u = w + 128 (8 bits), w + 8 (4), w + 1 (2: ternary, 3 is invalid) and 0, 1 for -1, +1 (1 bit):
//   sum(w q) = 2^code_shift * sum(u q) - 2^offset_shift * sum(q)
inline constexpr int offset_shift(int bits) { return bits == 8 ? 7 : bits == 4 ? 3 : 0; }
inline constexpr int code_shift(int bits) { return bits == 1 ? 1 : 0; }

// Scales of groups of K, relative to weight_scale:  [ ceil(N/16) ][ K / group_size ][ 16 ] float16, 32 bytes for a tile's group
inline constexpr int64_t kGroupScaleBytes = 2 * kTileN;
inline constexpr int64_t kGroupUnit = 32;  // a group is a multiple of it

// Sparse weights are s8 (absent = 0). An entry is what an n tile keeps a number of, [offset[t], offset[t + 1]):
//   tiles    [ entries ][ 64 ] kept tiles; index: u16 k step of each. Blocks of 16 x 4.
//   masks    [ entries + 64 ] non-zero bytes of all tiles, tile by tile; index: [ Nt ][ Kt ] u64, bit i: byte i of the tile is
//   there windows  [ entries ][ 64 positions | 64 values ], channel n in bytes 4n .. 4n + 3 of each half, as in a tile; no index.
//   Positions
//            are the low 7 bits, they count in a window of 128 k. Bit 7 of positions 0..15 are bits 0..15 of where it begins, in
//            steps of 32 k. A value of 0 is padding.
// Wherever a kernel reads, it holds what it read of index and offset within the arrays.
enum class SparseStorage : int32_t { tiles, masks, windows };
inline constexpr int64_t kMaskSlack = 64;  // bytes past the last value: a register of values is read at a time
inline constexpr int64_t kWindowK = 128;
inline constexpr int64_t kWindowStep = 32;
struct SparseWeights {
  SparseStorage storage;
  const uint8_t* packed;
  int64_t entries;
  const uint8_t* index;
  const int64_t* offset;  // [Nt + 1]
  const int32_t* sum;     // [Nt][16] sum of w over K, for instruction sets that multiply x + 128
};

// Non-zeros of sparse float weights, channel after channel: f32 values and their u16 k, both at any byte.
struct SparseFloatWeights {
  const uint8_t* values;  // [entries][4]
  const uint8_t* index;   // [entries][2], held below K by the kernel
  const int64_t* offset;  // [N + 1], held within [0, entries]
  int64_t entries;
};
inline constexpr int64_t kMaxFloatK = 65536;
inline constexpr int64_t kTransposedBytes = 512 << 10;  // of x, where K allows: half of an L2 of 1 MiB

enum class Dtype : int32_t { f32, bf16, f16, s32 };
inline constexpr int64_t dtype_bytes(Dtype t) { return t == Dtype::f32 || t == Dtype::s32 ? 4 : 2; }

enum class Activation : int32_t {
#define TERSOR_EPILOGUE_ROW(name) name,
#include "epilogue.inc"
#undef TERSOR_EPILOGUE_ROW
};

// Float rows: element (m, k) is at x + (m * ld + k) * dtype_bytes(dtype).
struct Rows {
  const void* x;
  Dtype dtype;
  int64_t ld;  // elements
};

// Rows [0, M) of x become s8 rows with one scale each: absmax over the row in f32, inv = 127 / absmax,
// q = rint(clamp(x * inv, -127, 127)), ties to even, scale = absmax * (1/127f). absmax < 2^-100: q = 0, scale = 0.
// A given absmax counts by its magnitude. A row that holds NaN or inf (or whose given absmax is NaN or inf) gets q = 0, scale =
// NaN. Writes exactly K bytes a row.
// With input_scale no absmax is sought: scale = |input_scale| and inv = 1 / scale for every row, values beyond 127 steps saturate.
struct QuantizeArgs {
  Rows x;
  int64_t M, K;
  const float* absmax;  // [M] or null: taken in place of the row's own
  int8_t* q;            // [M][ldq]
  int64_t ldq;
  float* scale;      // [M]
  int32_t* row_sum;  // [M] sum of q over the row
  const float* input_scale = nullptr;
};

// Rows [0, M) of s = x + residual, rounded to the dtype of x, are normalised and become s8 rows as QuantizeArgs makes them:
//   layer  y = (s * inverse - mean * inverse) * weight + bias    inverse = 1 / sqrt(variance + eps)
//   rms    y = (s * inverse) * weight                            inverse = 1 / sqrt(mean of s^2 + eps)
// in f32 with fma, rounded to the dtype of x. Sums in 64 lanes by k mod 64, the lanes in a tree (binarize_x.inl).
struct NormArgs {
  Rows x;
  Rows residual;  // x: null: s = x
  int64_t M, K;
  const float* weight;  // [K]
  const float* bias;    // [K]; not read for rms
  float eps;
  bool rms;
  int8_t* q;         // [M][K]
  float* scale;      // [M]
  int32_t* row_sum;  // [M]
  void* sum;         // s, [M][K] in the dtype of x, or null
  void* y;           // y, the same
  float* scratch;    // scratch_floats(), 64-byte aligned

  static constexpr int64_t scratch_floats(int64_t K, bool residual) { return (residual ? 6 : 2) * round_up(K, 64); }
};

// Rows [0, M) of x against a threshold for each k become bits, 1 where x >= threshold, 0 past K, in the order of a 1-bit tile:
// words of 32 k, little endian. scale = sum_k |x - threshold| * f32(1/K), summed in 64 lanes by k mod 64, the lanes in a tree
// (binarize_x.inl). A row that holds NaN or inf gets bits 0, scale = NaN.
struct BinarizeArgs {
  Rows x;
  int64_t M, K;
  const float* threshold;  // [K]
  uint8_t* bits;           // [M][ld_bits]; 4 * ceil(K/32) bytes of each row are written
  int64_t ld_bits;
  float* scale;  // [M]
};

// acc[m][n] = sum_k q[m][k] * w[n][k], computed from the codes with row_sum modulo 2^32, then
// y = act(((f32(acc) * scale[m]) * weight_scale[n]) + bias[n]) + residual[m][n] rounded to y_dtype; Dtype::s32 stores acc itself.
// Groups: f32(acc) is sum_g f32(acc_g) * group_scale[n][g] with the exact sum of each group, class F; no Dtype::s32.
// xnor: q holds rows of bits (BinarizeArgs), acc[m][n] = K - 2 * (bits that differ).
struct GemmArgs {
  int64_t N, K;
  const int8_t* q;         // s8 rows, each readable up to round_up(K, tile_k(bits)), and 0 past K
  int64_t ldq;             // bytes
  const float* scale;      // [M]; not read for Dtype::s32
  const int32_t* row_sum;  // [M]; with groups [M][K / group_size], the sums of q over each
  const uint8_t* weight_packed;
  const float* weight_scale;  // [N]; not read for Dtype::s32
  const float* bias;          // [N] or null
  Activation activation;
  void* y;  // [M][ldy], y_dtype
  Dtype y_dtype;
  int64_t ldy;            // elements
  bool stream_y = false;  // f32 stores go past the caches; y and its rows are aligned to 64 bytes
  const uint8_t* group_scale = nullptr;
  int64_t group_size = 0;                 // a multiple of kGroupUnit that divides K
  const void* residual = nullptr;         // [M][ldr], y_dtype; null: nothing is added
  int64_t ldr = 0;                        // elements
  const SparseWeights* sparse = nullptr;  // of spmm_s8, in place of weight_packed
};

// y[m][16 i + j] = act(both[m][32 i + j]) * both[m][32 i + 16 + j], j < 16: gate and up in runs of a tile, as a GEMM over tiles in
// turn leaves them. F is a multiple of 16.
struct GluArgs {
  int64_t M, F;
  const float* both;  // [M][ld]
  int64_t ld;
  Activation activation;
  void* y;  // [M][ldy], y_dtype
  Dtype y_dtype;
  int64_t ldy;
};

// y = act(((sum_k x[m][k] * f32(w[n][k])) * weight_scale[n]) + bias[n]), f32 accumulation in an order of the variant's own (class
// F).
struct FloatGemmArgs {
  int64_t N, K;
  const float* x;  // f32 rows
  int64_t ldx;     // elements
  const uint8_t* weight_packed;
  const float* weight_scale;
  const float* bias;
  Activation activation;
  void* y;
  Dtype y_dtype;
  int64_t ldy;
  const SparseFloatWeights* sparse = nullptr;  // of spmm_f32, in place of weight_packed and weight_scale
};

// The part of C a call computes: rows [m0, m1) x n tiles [t0, t1), with scratch of its own.
struct GemmRange {
  int64_t m0, m1, t0, t1;
  void* scratch;  // 64-byte aligned
};

struct IntGemm {
  void (*run)(const GemmArgs&, const GemmRange&);
  int64_t x_scratch_bytes;  // of scratch for each element of a row, K rounded up to 4; 0: none is needed (always below 8 bits)
  int64_t row_pad = 64;     // bytes past a row. Rows a multiple of 4096 apart would collide in L1.
  int64_t panel_bytes = 0;  // of scratch for each element of K, once
  int64_t panel_k = kMaxK;  // longer rows do without
  int64_t row_scratch(int64_t K) const { return x_scratch_bytes ? round_up(K, kTileK8) * x_scratch_bytes + row_pad : 0; }
  int64_t panel_scratch(int64_t K) const { return K <= panel_k ? panel_bytes * round_up(K, kTileK8) : 0; }
};

struct FloatGemm {
  void (*run)(const FloatGemmArgs&, const GemmRange&);
  int64_t scratch_bytes;  // fixed part
  int64_t row_bytes;      // and per row of the range
  int64_t k_bytes = 0;    // and for each k of a row, of x transposed: up to so many where K is small, a fourth of it at least
  int64_t scratch(int64_t K) const {
    const int64_t least = k_bytes / 4 * K, most = k_bytes * K, some = least > kTransposedBytes ? least : kTransposedBytes;
    return scratch_bytes + (most < some ? most : some);
  }
};

struct QuantizeX {
  void (*run)(const QuantizeArgs&);
};

struct NormQuantizeX {
  void (*run)(const NormArgs&);
};

struct Glu {
  void (*run)(const GluArgs&);
};

struct BinarizeX {
  void (*run)(const BinarizeArgs&);
};

struct WidenX {
  void (*run)(const void* x, Dtype dtype, int64_t n, float* out);  // exact conversion to f32
};

// Loops that show what the machine can do at most, see csrc/cpu/limits.inl. Returns the work done: multiply-adds (of bits for
// popcount), or bytes read of data[0, bytes).
enum class Limit : int32_t { int8, f32, popcount, read };
struct Limits {
  int64_t (*run)(Limit what, int64_t iterations, const void* data, int64_t bytes);
};

// One list of what a variant can fill; dispatch resolves each entry by itself, info() and the tests walk the same list.
#define TERSOR_KERNEL_ENTRIES(X)    \
  X(QuantizeX, quantize_x)          \
  X(WidenX, widen_x)                \
  X(BinarizeX, binarize_x)          \
  X(IntGemm, gemm_w8)               \
  X(IntGemm, gemm_w4)               \
  X(IntGemm, gemm_w2)               \
  X(IntGemm, gemm_w1)               \
  X(IntGemm, gemm_w4_grouped)       \
  X(IntGemm, gemm_xnor)             \
  X(IntGemm, spmm_s8)               \
  X(FloatGemm, gemm_f32_w8)         \
  X(FloatGemm, spmm_f32)            \
  X(NormQuantizeX, norm_quantize_x) \
  X(Glu, glu)                       \
  X(Limits, limits)

struct KernelTable {
  const char* isa;
  int64_t stream_bytes;  // f32 outputs of at least this size go past the caches; set by resolve_kernels, 0: never
#define TERSOR_KERNEL_FIELD(type, name) type name;
  TERSOR_KERNEL_ENTRIES(TERSOR_KERNEL_FIELD)
#undef TERSOR_KERNEL_FIELD
};

struct Variant {
  const char* name;
  const KernelTable* table;
  bool runnable;        // this CPU and OS have every feature the row asks for
  const char* missing;  // first feature that lacks, or ""
};

// All compiled variants, best first.
const Variant* variants(int* count);

struct Kernels {
  KernelTable table;  // each entry from the best runnable variant, not above TERSOR_ISA, that fills it
#define TERSOR_KERNEL_FIELD(type, name) const char* name##_isa;
  TERSOR_KERNEL_ENTRIES(TERSOR_KERNEL_FIELD)
#undef TERSOR_KERNEL_FIELD
};

// Resolves the table, capped at variant `isa` (null or "": uncapped). Returns null on success; else a message that lists the
// variants this CPU can run, valid until the next call on this thread.
const char* resolve_kernels(const char* isa, Kernels* out);

// The table of this process: resolve_kernels(getenv("TERSOR_ISA")), once. Null if that failed; kernels_error() says why.
const Kernels* kernels();
const char* kernels_error();

}  // namespace tersor
