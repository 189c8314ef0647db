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

// "" if the run looks right: no report, and the accumulators of the oracle. sparse: spmm_24 on blocks that hold the first two of
// every four k.
std::string run_with(cuda::emulator::Plant plant, Kernel kernel, bool sparse, const cuda::emulator::Schedule& schedule) {
  Random random(options.seed);
  Emulated e(19, 40, kK, 8, random);
  Canvas y(19, 40 * 4, 40 * 4);
  cuda::LinearCall c = e.call(y.at(), 40, Dtype::s32, Activation::none, false, false);
  Exact<uint8_t> blocks(ceil_div(40, kTileN) * ceil_div(kK, 64) * cuda::kBytes24);
  if (sparse) {
    for (int64_t i = 0; i < blocks.size(); ++i) blocks[i] = i % cuda::kBytes24 < 512 ? 0 : 0x44;  // places 0 and 1
    for (int64_t i = 0; i < 40 * kK; ++i) {
      const int64_t n = i / kK, k = i % kK, row = n % kTileN, group = k % 64 / 4;
      auto& value = e.w.w[static_cast<size_t>(i)];
      if (k % 4 > 1) {
        value = 0;
      } else {
        const int64_t lane = row % 8 * 4 + group % 8 / 2, at = (group / 8 * 2 + row / 8) * 4 + group % 2 * 2 + k % 4;
        blocks[(n / kTileN * ceil_div(kK, 64) + k / 64) * cuda::kBytes24 + lane * 16 + at] = static_cast<uint8_t>(value);
      }
    }
    c.width = cuda::Width::sparse24;
    c.weight_packed = blocks.data();
    e.sparse_bytes = blocks.size();
  }
  machine.plant = plant;
  machine.schedule = schedule;
  std::string found = e.run(c, {kernel, 1, 0});
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
  struct Case {
    const char* name;
    Kernel kernel;
    bool sparse;
  };
  const Case cases[] = {{"small", Kernel::small, false},
                        {"medium", Kernel::medium, false},
                        {"large", Kernel::large, false},
                        {"2:4 small", Kernel::small, true},
                        {"2:4 medium", Kernel::medium, true}};
  for (const auto& [kernel_is, kernel, sparse] : cases) {
    for (const auto& schedule : kSchedules) {
      set_case("%s, %s", kernel_is, schedule.name);
      const std::string clean = run_with({}, kernel, sparse, schedule);
      CHECK(clean.empty(), "nothing planted: %s", clean.c_str());
      for (const Row& row : rows) {
        set_case("%s, %s, %s", row.name, kernel_is, schedule.name);
        const std::string found = run_with(row.plant, kernel, sparse, schedule);
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

struct SparseRegisters {
  const uint32_t* a;       // [32][4]
  const uint32_t* b;       // [32][4]
  const uint32_t* places;  // [32]
  uint32_t* d;             // [32][4]
};
void one_sparse_mma(SparseRegisters r) {
  const int lane = cuda::ptx::thread_index();
  uint32_t a[4], b[4], d[4];
  std::copy(r.a + lane * 4, r.a + lane * 4 + 4, a);
  std::copy(r.b + lane * 4, r.b + lane * 4 + 4, b);
  std::copy(r.d + lane * 4, r.d + lane * 4 + 4, d);
  cuda::ptx::mma_sparse_s8s8(d, a, b, r.places[lane]);
  std::copy(d, d + 4, r.d + lane * 4);
}

// PTX ISA, "Matrix Fragments for sparse mma.m16n8k64 with .u8 / .s8": the lane whose register holds the places of a row, by the
// figures of the metadata of columns 0-31 and of columns 32-63, read off line by line.
constexpr int kPlacesLane[2][16] = {{0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29},
                                    {2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31}};

// The figures are pictures; what others made of them, or found on a GPU, in their own terms. Each gives every lane its row and
// half.
TERSOR_TEST(cuda_sparse_places) {
  auto check = [](const char* source, int lane, int row, int half) {
    CHECK(kPlacesLane[half][row] == lane, "%s: lane %d has row %d, half %d", source, lane, row, half);
  };
  set_case("places of m16n8k64 sparse s8 s8");
  for (int lane = 0; lane < 32; ++lane) {
    // CuTe, MMA_Traits<SM80_SPARSE_16x8x64_S32S8S8S32_TN>::ELayout: (2, 2, 8) lanes at strides (8, 512, 1) of a 16 x 64 matrix
    // that counts down its columns.
    const int at = lane % 2 * 8 + lane / 2 % 2 * 512 + lane / 4;
    check("CuTe", lane, at % 16, at / 16 / 32);
    // TileLang, metadata_32bit_load_32x1_to_shared_16x2_layout_8bit.
    check("TileLang", lane, lane / 4 + lane % 2 * 8, lane % 4 / 2);
    // A fork of Triton with a sparse dot (noheat61/triton, DOT_SPARSE_INTERNALS.md, section 4), asked of an RTX 4070 SUPER by
    // planted places and one-hot B: words of 16 k, of which a lane has two neighbours.
    check("measured", lane, (lane >> 2) + 8 * (lane & 1), 2 * (lane >> 1 & 1) / 2);
  }
  // CUTLASS, reorder_meta of tools/util/host_reorder.h: rows r and r + 8 side by side, then each 2 x 2 of (row, word) from Z to N;
  // ldmatrix gives lane 4 g + t word t of line g, and a line of 16 bytes is two rows of two words.
  for (int row = 0; row < 16; ++row) {
    for (int half = 0; half < 2; ++half) {
      int to_row = row % 8 * 2 + row / 8, to_half = half;
      if (to_row % 2 != to_half) {
        to_row += to_half - to_row % 2;
        to_half = 1 - to_half;
      }
      check("CUTLASS", to_row / 2 * 4 + to_row % 2 * 2 + to_half, row, half);
    }
  }
}

TERSOR_TEST(cuda_sparse_mma_layout) {
  set_case("m16n8k64 sparse s8 s8");
  Random random(options.seed);
  int A[16][64] = {}, B[64][8];
  uint32_t a[32][4] = {}, b[32][4] = {}, places[32] = {}, d[32][4];
  for (int row = 0; row < 16; ++row) {
    for (int group = 0; group < 16; ++group) {
      const auto first = static_cast<int>(random.between(0, 2)), second = static_cast<int>(random.between(first + 1, 3));
      const int at[2] = {first, second};
      for (int j = 0; j < 2; ++j) {
        const auto v = static_cast<int>(random.between(-128, 127));
        A[row][4 * group + at[j]] = v;
        // Stored values are columns 0..31, two for a group: the layout of a dense m16n8k32.
        const int stored = 2 * group + j;
        a[row % 8 * 4 + stored % 16 / 4][row / 8 + stored / 16 * 2] |= (static_cast<uint32_t>(v) & 255) << stored % 4 * 8;
      }
      places[kPlacesLane[group / 8][row]] |= static_cast<uint32_t>(first | second << 2) << group % 8 * 4;
    }
  }
  for (int k = 0; k < 64; ++k) {
    for (int n = 0; n < 8; ++n) {
      B[k][n] = static_cast<int>(random.between(-128, 127));
      b[n * 4 + k % 16 / 4][k / 16] |= (static_cast<uint32_t>(B[k][n]) & 255) << k % 4 * 8;
    }
  }
  for (auto& lane : d) std::fill(lane, lane + 4, 7u);
  machine.error.clear();
  const SparseRegisters r{a[0], b[0], places, d[0]};
  CHECK(machine.launch(one_sparse_mma, 1, 1, 1, 32, 0, r) == 0, "%s", machine.error.c_str());
  for (int row = 0; row < 16; ++row) {
    for (int n = 0; n < 8; ++n) {
      int sum = 7;
      for (int k = 0; k < 64; ++k) sum += A[row][k] * B[k][n];
      CHECK(static_cast<int>(d[row % 8 * 4 + n / 2][row / 8 * 2 + n % 2]) == sum, "D[%d][%d]", row, n);
    }
  }
}

// Matrix j, row g of it: 16 bytes that hold their own place.
void one_load_matrices(uint32_t* out) {
  unsigned char* shared = cuda::ptx::shared_memory();
  const int lane = cuda::ptx::thread_index();
  const auto base = static_cast<uint32_t>(lane << 8);
  cuda::ptx::store_shared16(shared + lane * 16, {base, base + 1, base + 2, base + 3});
  cuda::ptx::barrier();
  uint32_t r[4];
  cuda::ptx::load_matrices(r, shared + lane * 16);
  std::copy(r, r + 4, out + lane * 4);
}

TERSOR_TEST(cuda_load_matrices_layout) {
  set_case("ldmatrix x4");
  machine.error.clear();
  uint32_t out[32][4];
  uint32_t* to = out[0];
  CHECK(machine.launch(one_load_matrices, 1, 1, 1, 32, 512, to) == 0, "%s", machine.error.c_str());
  for (uint32_t matrix = 0; matrix < 4; ++matrix) {
    for (uint32_t row = 0; row < 8; ++row) {
      for (uint32_t word = 0; word < 4; ++word) {
        CHECK(out[row * 4 + word][matrix] == ((matrix * 8 + row) << 8) + word, "matrix %u row %u", matrix, row);
      }
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
