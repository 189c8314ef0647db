// That the emulator finds what it claims to find: mistakes planted into the kernels, and its mma against tables written down apart.
#include "emulated.h"

namespace tersor::test {
namespace {

using cuda::Kernel;
using cuda::emulator::Fault;
using cuda::emulator::kSchedules;
using cuda::emulator::machine;

// 13 k blocks: the last one lies in the first stage whether there are 4 or 6, where the results are staged right behind it.
constexpr int64_t kK = 820;
constexpr int kLastBarrier = 13;

// "" if the run looks right: no report, and the accumulators of the oracle.
std::string run_with(cuda::emulator::Plant plant, Kernel kernel, const cuda::emulator::Schedule& schedule) {
  Random random(options.seed);
  Emulated e(19, 40, kK, 8, random);
  Canvas y(19, 40 * 4, 40 * 4);
  machine.plant = plant;
  machine.schedule = schedule;
  std::string found = e.linear({kernel, 1, 0}, y.at(), 40, Dtype::s32, Activation::none, false, false);
  machine.plant = {};
  if (!found.empty()) return found;
  const std::vector<int32_t> want = matmul(e.x.q.data(), e.x.ldq, e.w.w.data(), 19, 40, kK);
  return std::memcmp(want.data(), y.at(), want.size() * 4) == 0 && y.intact() ? "" : "wrong result";
}

TERSOR_TEST(cuda_planted_faults) {
  struct Row {
    const char* name;
    cuda::emulator::Plant plant;
    const char* says;
  };
  const Row rows[] = {{"no wait for copies", {Fault::no_copy_wait, 0}, "copy"},
                      {"first barrier missing", {Fault::no_barrier, 0}, "shared memory is read"},
                      {"a barrier in the loop missing", {Fault::no_barrier, 5}, "shared memory is"},
                      {"last barrier missing", {Fault::no_barrier, kLastBarrier}, "no barrier behind another thread's"},
                      {"divergent barrier", {Fault::divergent_barrier, 2}, ""},
                      {"copy past the last row", {Fault::copy_past_rows, 0}, "out of bounds"},
                      {"wrong fragment lane", {Fault::wrong_lane, 0}, "wrong result"},
                      {"registers of a fragment swapped", {Fault::swapped_registers, 0}, "wrong result"}};
  for (Kernel kernel : {Kernel::small, Kernel::medium, Kernel::large}) {
    for (const auto& schedule : kSchedules) {
      set_case("%s, %s", kernel_name(kernel), schedule.name);
      const std::string clean = run_with({}, kernel, schedule);
      CHECK(clean.empty(), "nothing planted: %s", clean.c_str());
      for (const Row& row : rows) {
        set_case("%s, %s, %s", row.name, kernel_name(kernel), schedule.name);
        const std::string found = run_with(row.plant, kernel, schedule);
        CHECK(!found.empty() && found.find(row.says) != std::string::npos, "found '%s', expected '%s'", found.c_str(), row.says);
      }
    }
  }
}

struct Registers {
  const uint32_t* a;  // [32][4]
  const uint32_t* b;  // [32][2]
  uint32_t* d;        // [32][4]
};
template <int kBits>
void one_mma(Registers r) {
  const int lane = cuda::ptx::thread_index();
  uint32_t a[4], b[2], d[4];
  std::copy(r.a + lane * 4, r.a + lane * 4 + 4, a);
  std::copy(r.b + lane * 2, r.b + lane * 2 + 2, b);
  std::copy(r.d + lane * 4, r.d + lane * 4 + 4, d);
  if constexpr (kBits == 8) {
    cuda::ptx::mma_s8u8(d, a, b);
  } else {
    cuda::ptx::mma_and_popcount(d, a, b);
  }
  std::copy(d, d + 4, r.d + lane * 4);
}

// PTX ISA, "Matrix Fragments for mma.m16n8k32" and "mma.m16n8k256", read from element to lane: where a matrix goes, while the
// emulator computes where a register's elements come from.
template <int kBits>
void check_mma() {
  constexpr int kPer = 32 / kBits, kDepth = 8 * kPer;
  Random random(options.seed);
  int A[16][kDepth], B[kDepth][8];
  uint32_t a[32][4] = {}, b[32][2] = {}, d[32][4];
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      A[row][k] = static_cast<int>(kBits == 8 ? random.between(-128, 127) : random.coin());
      const uint32_t code = static_cast<uint32_t>(A[row][k]) & (kBits == 8 ? 255 : 1);
      a[row % 8 * 4 + k % (kDepth / 2) / kPer][row / 8 + k / (kDepth / 2) * 2] |= code << k % kPer * kBits;
    }
  }
  for (int k = 0; k < kDepth; ++k) {
    for (int n = 0; n < 8; ++n) {
      B[k][n] = static_cast<int>(random.between(0, kBits == 8 ? 255 : 1));
      b[n * 4 + k % (kDepth / 2) / kPer][k / (kDepth / 2)] |= static_cast<uint32_t>(B[k][n]) << k % kPer * kBits;
    }
  }
  for (auto& lane : d) std::fill(lane, lane + 4, 7u);
  machine.error.clear();
  const Registers r{a[0], b[0], d[0]};
  CHECK(machine.launch(one_mma<kBits>, 1, 1, 1, 32, 0, r) == 0, "%s", machine.error.c_str());
  for (int row = 0; row < 16; ++row) {
    for (int n = 0; n < 8; ++n) {
      int sum = 7;
      for (int k = 0; k < kDepth; ++k) sum += A[row][k] * B[k][n];
      CHECK(static_cast<int>(d[row % 8 * 4 + n / 2][row / 8 * 2 + n % 2]) == sum, "D[%d][%d] with %d bits", row, n, kBits);
    }
  }
}

TERSOR_TEST(cuda_mma_layout) {
  set_case("m16n8k32 s8 u8");
  check_mma<8>();
  set_case("m16n8k256 b1 and.popc");
  check_mma<1>();
}

}  // namespace
}  // namespace tersor::test
