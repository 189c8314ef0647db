// Compiled once per instruction set with its flags: TERSOR_ISA is the namespace, TERSOR_ISA_HEADER its vocabulary. The object
// exports its table and nothing else; no std template may be instantiated here, or the linker could hand its wide code to the
// baseline.
#include TERSOR_ISA_HEADER

#include "epilogue.h"
// clang-format off: each builds on the one above
#include "quantize_x.inl"
#include "binarize_x.inl"
#include "gemm_int.inl"
#include "gemm_matrix.inl"
#include "gemm_sparse.inl"
#include "gemm_float.inl"
#include "gemm_sparse_float.inl"
#include "glu.inl"
#include "limits.inl"
#include "norm_quantize.inl"
// clang-format on

namespace tersor::TERSOR_ISA {

// A kernel, or null in a variant that leaves it to the next one.
template <typename Run>
constexpr Run maybe(Run run) {
  return Isa::kAllKernels ? run : nullptr;
}
template <typename Run>
constexpr Run maybe_matrix(Run run) {
  return Isa::kMatrixUnit ? run : maybe(run);
}

// Scratch for a panel of codes of few bits, expanded, for each k.
constexpr int64_t kExpandedBytes = Isa::kMatrixUnit ? 2 * kTileN : 0;

constexpr bool kSplits = Isa::Dot<8>::kXBytesPerK > 1;

extern const KernelTable table;
const KernelTable table = {
    TERSOR_ISA_NAME,
    0,
    {maybe(quantize_x)},
    {maybe(widen_x)},
    {maybe(binarize_x)},
    {maybe_matrix(gemm_w8), kSplits ? Isa::Dot<8>::kXBytesPerK : 0, 64, kSplits ? SplitCodes::kWordBytes / kTileK8 : 0, kSplitMaxK},
    {maybe_matrix(gemm_w4), 0, 0, kExpandedBytes},
    {maybe_matrix(gemm_w2), 0, 0, kExpandedBytes},
    {maybe_matrix(gemm_w1), 0, 0, kExpandedBytes},
    {maybe(gemm_w4_grouped), 0},
    {gemm_xnor, 0},
    {spmm_s8, Isa::SignedDot::kXBytesPerK, kSparseRowPad, kTileN},
    {maybe(gemm_f32_w8), kFloatBlockK * Isa::kFloatTiles * kTileN * 4, Isa::kFloatTiles * kTileN * 4},
    {maybe(spmm_f32), 2 * kTileN * kMostFloatRows * 4, 4, kMostFloatRows * 4},
    {maybe(norm_quantize_x)},
    {maybe(glu)},
    {run_limit},
};

}  // namespace tersor::TERSOR_ISA
