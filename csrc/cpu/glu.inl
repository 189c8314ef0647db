// Gate and up as they leave the GEMM to their product: the formula of GluArgs in kernel_table.h.

namespace tersor::TERSOR_ISA {
namespace {

template <typename F>
void glu_rows(const GluArgs& a) {
  for (int64_t m = 0; m < a.M; ++m) {
    const float* both = a.both + m * a.ld;
    for (int64_t f = 0; f < a.F; f += kTileN, both += 2 * kTileN) {
      for (int64_t i = 0; i < kTileN; i += Isa::kLanes) {
        const Vf gate = F::apply(Isa::load(both + i));
        store_as(a.y, a.y_dtype, m * a.ldy + f + i, Isa::mul(gate, Isa::load(both + kTileN + i)));
      }
    }
  }
}

void glu(const GluArgs& a) {
  switch (a.activation) {
#define TERSOR_EPILOGUE_ROW(name) \
  case Activation::name:          \
    return glu_rows<activation::name>(a);
#include "../core/epilogue.inc"
#undef TERSOR_EPILOGUE_ROW
  }
}

}  // namespace
}  // namespace tersor::TERSOR_ISA
