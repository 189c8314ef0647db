// What this instruction set can do at most on this machine: loops that hold everything in registers, and plain reads. The caller
// times them; benches quote kernels in percent of them.

namespace tersor::TERSOR_ISA {
namespace {

// As many sums as the largest register block of the integer GEMM: enough in flight to cover any latency.
constexpr int kLimitSums = Isa::kMaxRows * Isa::max_tiles(Isa::kMaxRows) * kTileVecs;

// Zeros that the compiler takes for different values: equal sums would be computed once.
template <typename V, int kCount>
void start(V (&sums)[kCount]) {
  TERSOR_UNROLL(32)
  for (int i = 0; i < kCount; ++i) {
    sums[i] = V{};
    Isa::opaque(sums[i]);
  }
}

// Uses the result of a loop, so that the loop is not dead. The sums stay in registers until here.
template <int kCount>
void consume(const Vi (&sums)[kCount]) {
  Vi all = sums[0];
  TERSOR_UNROLL(32)
  for (int i = 1; i < kCount; ++i) all = Isa::xor_i(all, sums[i]);
  Isa::opaque(all);
}

template <typename I>
int64_t limit_int8(int64_t iterations) {
  if constexpr (I::kMatrixUnit) return I::Matrix::limit(iterations);
  using D = typename I::template Dot<8>;
  alignas(64) uint8_t codes[sizeof(Vi)] = {};
  char row[Codes<8>::kXWordBytes] = {};
  Vi sums[kLimitSums];
  start(sums);
  typename D::W w = D::codes(codes, 0);
  typename D::X x = D::load_x(row);
  Isa::opaque(w);  // or it would be known to be zero
  for (int64_t i = 0; i < iterations; ++i) {
    TERSOR_UNROLL(32)
    for (int s = 0; s < kLimitSums; ++s) {
      Isa::opaque(x);  // each sum has a product of its own, which cannot leave the loop
      if constexpr (D::kPairs) {
        sums[s] = D::matmul(sums[s], w, x);
      } else {
        sums[s] = D::dot4(sums[s], w, x);
      }
    }
  }
  consume(sums);
  return iterations * kLimitSums * Isa::kLanes * kTileK8 * (D::kPairs ? 2 : 1);
}

int64_t limit_f32(int64_t iterations) {
  constexpr int kSums = Isa::kFloatMaxRows * Isa::kFloatTiles * kTileVecs;
  Vf sums[kSums];
  start(sums);
  Vf w = Isa::set1(0.5f), x = Isa::set1(1e-3f);
  for (int64_t i = 0; i < iterations; ++i) {
    Isa::opaque(w);
    Isa::opaque(x);
    TERSOR_UNROLL(32)
    for (int s = 0; s < kSums; ++s) sums[s] = Isa::muladd(w, x, sums[s]);
  }
  Vi bits[kSums];
  TERSOR_UNROLL(32)
  for (int s = 0; s < kSums; ++s) bits[s] = Isa::bits(sums[s]);
  consume(bits);
  return iterations * kSums * Isa::kLanes;
}

// xor, popcount, add: what one step of a binary x binary product needs.
int64_t limit_popcount(int64_t iterations) {
  Vi sums[kLimitSums];
  start(sums);
  Vi w = Isa::set1_i(0x5a5a5a5a), x = Isa::zero_i();
  for (int64_t i = 0; i < iterations; ++i) {
    TERSOR_UNROLL(32)
    for (int s = 0; s < kLimitSums; ++s) {
      Isa::opaque(x);
      sums[s] = Isa::Popcount::add(sums[s], Isa::xor_i(w, x));
    }
  }
  consume(sums);
  return iterations * kLimitSums * Isa::kLanes * 32;
}

// Reads `bytes` once per iteration in four streams, as four tiles of a panel are read.
int64_t limit_read(int64_t iterations, const void* data, int64_t bytes) {
  constexpr int kStreams = 4;
  const int64_t stream = bytes / kStreams / kTileBytes * kTileBytes;
  Vi sums[kStreams * kTileVecs];
  start(sums);
  for (int64_t i = 0; i < iterations; ++i) {
    const char* p = static_cast<const char*>(data);
    TERSOR_OPAQUE("r", p);
    TERSOR_MEMORY_BARRIER();
    for (int64_t at = 0; at < stream; at += kTileBytes) {
      TERSOR_UNROLL(4)
      for (int s = 0; s < kStreams; ++s) {
        TERSOR_UNROLL(4)
        for (int v = 0; v < kTileVecs; ++v) {
          Vi& sum = sums[s * kTileVecs + v];
          sum = Isa::xor_i(sum, Isa::load_i(p + s * stream + at + v * Isa::kLanes * 4));
        }
      }
    }
  }
  consume(sums);
  return iterations * stream * kStreams;
}

int64_t run_limit(Limit what, int64_t iterations, const void* data, int64_t bytes) {
  switch (what) {
    case Limit::int8:
      return limit_int8<Isa>(iterations);
    case Limit::f32:
      return limit_f32(iterations);
    case Limit::popcount:
      return limit_popcount(iterations);
    case Limit::read:
      return limit_read(iterations, data, bytes);
  }
  return 0;
}

}  // namespace
}  // namespace tersor::TERSOR_ISA
