// The CUDA kernels, run by the emulator, against the oracle and the CPU kernels.
#include "emulated.h"
#include "linear.h"

namespace tersor::test {
namespace {

using cuda::Kernel;
using cuda::Width;
using cuda::emulator::kSchedules;
using cuda::emulator::machine;

int64_t ll_index = 0;  // cases so far: walks dtypes, activations and schedules through the shapes

// What a layer of this width must give, float or s32, by the CPU kernels, which meet the same oracle in tests/cpp.
void check_codes(Emulated& e, const cuda::Plan& plan, Dtype dtype, Activation activation, bool with_bias, bool with_residual) {
  const int64_t M = e.x.M, N = e.w.N, K = e.x.K, bytes = dtype_bytes(dtype);
  const int64_t ldy = N + ll_index % 3;
  set_case("w%d %s splits=%lld M=%lld N=%lld K=%lld %s %s schedule %s", e.w.bits, kernel_name(plan.kernel),
           static_cast<long long>(plan.splits), static_cast<long long>(M), static_cast<long long>(N), static_cast<long long>(K),
           dtype_name(dtype), activation_name(activation), machine.schedule.name);
  Canvas y(M, N * bytes, ldy * bytes);
  const std::string error = e.linear(plan, y.at(), ldy, dtype, activation, with_bias, with_residual);
  if (!CHECK(error.empty(), "%s", error.c_str())) return;
  CHECK(y.intact(), "writes outside y");
  if (dtype == Dtype::s32) {
    const std::vector<int32_t> want = matmul(e.x.q.data(), e.x.ldq, e.w.w.data(), M, N, K);
    for (int64_t m = 0; m < M; ++m) CHECK_SAME("acc", y.at<int32_t>(m), want.data() + m * N, N);
    return;
  }
  Canvas want(M, N * bytes, N * bytes);
  const char* failed = linear_s8(runnable().front().table, M, e.x.args(), e.w.args(activation, with_bias), {want.at(), dtype});
  CHECK(failed == nullptr, "%s", failed);
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      float right = load_float(want.at(), dtype, m * N + n);
      if (with_residual) {
        // Exact only where the store rounds once: f32.
        right = right + load_float(e.residual.data(), dtype, m * N + n);
      }
      const float got = load_float(y.at(), dtype, m * ldy + n);
      CHECK(got == right || (std::isnan(got) && std::isnan(right)), "y[%lld][%lld] is %.9g, expected %.9g",
            static_cast<long long>(m), static_cast<long long>(n), static_cast<double>(got), static_cast<double>(right));
    }
  }
}

const Dtype kOutputs[] = {Dtype::s32, Dtype::f32, Dtype::bf16, Dtype::f16};

// Every kernel that can compute the shape.
std::vector<cuda::Plan> plans_for(int64_t M, int64_t N, int64_t k_blocks, int bits) {
  std::vector<cuda::Plan> list;
  if (M <= 3) list.push_back({M == 1 ? Kernel::gemv1 : M == 2 ? Kernel::gemv2 : Kernel::gemv4, 1, 0});
  if (M <= 16 && bits >= 4) list.push_back({Kernel::gemv8, 1, 0});
  if (M <= 17) list.push_back({Kernel::small, 1, 0});
  if (M > 1 && M <= 64) list.push_back({Kernel::medium, 1, 0});
  if (M > 16) list.push_back({Kernel::large, 1, 0});
  if (k_blocks >= 3) list.push_back({M <= 16 ? Kernel::small : Kernel::medium, 3, 3 * M * N * 4});
  return list;
}

TERSOR_TEST(cuda_codes_every_shape) {
  Random random(options.seed);
  for (int64_t M : {1, 3, 16, 17, 64, 130}) {
    for (int64_t K : {1, 63, 100, 200, 256}) {
      for (int bits : kWidths) {
        const int64_t N = std::initializer_list<int64_t>{1, 16, 37, 130}.begin()[ll_index % 4];
        Emulated e(M, N, K, bits, random);
        for (const cuda::Plan& plan : plans_for(M, N, ceil_div(K, 64), bits)) {
          const Dtype dtype = kOutputs[ll_index % 4];
          const auto activation = kActivations[ll_index / 4 % 5];
          for (int64_t s : choices(ll_index, 5)) {
            machine.schedule = kSchedules[s];
            check_codes(e, plan, dtype, activation, ll_index % 3 != 0, false);
          }
          ++ll_index;
        }
      }
    }
  }
}

// The same bits under every schedule.
TERSOR_TEST(cuda_codes_every_schedule) {
  Random random(options.seed);
  for (int bits : kWidths) {
    for (const auto& schedule : kSchedules) {
      Emulated e(20, 70, 700, bits, random);
      machine.schedule = schedule;
      check_codes(e, {Kernel::small, 1, 0}, Dtype::s32, Activation::none, false, false);
      check_codes(e, {Kernel::medium, 2, 2 * 20 * 70 * 4}, Dtype::s32, Activation::none, false, false);
      check_codes(e, {Kernel::large, 1, 0}, Dtype::s32, Activation::none, false, false);
    }
  }
}

TERSOR_TEST(cuda_epilogue_every_row) {
  Random random(options.seed);
  machine.schedule = kSchedules[0];
  Emulated e(18, 40, 65, 8, random);
  for (Activation a : kActivations) {
    for (Dtype dtype : kFloatDtypes) check_codes(e, {Kernel::medium, 1, 0}, dtype, a, true, false);
    check_codes(e, {Kernel::medium, 1, 0}, Dtype::f32, a, true, true);
    for (Kernel kernel : {Kernel::gemv4, Kernel::gemv8}) check_codes(e, {kernel, 1, 0}, Dtype::f32, a, false, true);
  }
  // A row of NaN, as quantising one with NaN gives it.
  e.x.scale[3] = std::nanf("");
  for (Activation a : kActivations) check_codes(e, {Kernel::medium, 1, 0}, Dtype::f32, a, true, false);
}

// plan() gives every shape a kernel that computes it; large K splits.
TERSOR_TEST(cuda_plan) {
  Random random(options.seed);
  for (int64_t M : {1, 2, 4, 5, 16, 17, 33}) {
    for (int64_t K : {40, 1100}) {
      Emulated e(M, 24, K, 4, random);
      machine.schedule = kSchedules[3];
      const cuda::Plan plan = cuda::plan({90, 132}, M, 24, K, Width::bits4, false, false);
      CHECK(plan.workspace_bytes == (plan.splits > 1 ? plan.splits * M * 24 * 4 : 0), "workspace");
      CHECK((plan.splits > 1) == (K > 1024 && M > 8), "M=%lld K=%lld: %lld splits", static_cast<long long>(M),
            static_cast<long long>(K), static_cast<long long>(plan.splits));
      check_codes(e, plan, Dtype::s32, Activation::none, false, false);
    }
  }
  set_case("plan");
  auto kernel = [](int sm, int64_t M, Width width, bool grouped) {
    return cuda::plan({sm, 132}, M, 4096, 4096, width, grouped, false).kernel;
  };
  for (int sm : {80, 87, 90, 100, 103, 110}) CHECK(kernel(sm, 4096, Width::bits8, false) == Kernel::large, "sm_%d", sm);
  for (int sm : {86, 89, 120, 121}) CHECK(kernel(sm, 4096, Width::bits8, false) == Kernel::medium, "sm_%d: shared memory", sm);
  CHECK(kernel(90, 128, Width::bits8, false) == Kernel::medium, "too few blocks of the large kernel");
  CHECK(kernel(90, 4096, Width::bits4, true) == Kernel::medium, "group scales have no large kernel");
  for (bool grouped : {false, true}) CHECK(kernel(90, 8, Width::bits4, grouped) == Kernel::gemv8, "few rows");
  CHECK(kernel(90, 4, Width::bits2, false) == Kernel::gemv4, "few rows");
  for (Width width : {Width::bits2, Width::bits1, Width::signs})
    CHECK(kernel(90, 5, width, false) == Kernel::small, "more arithmetic than dp4a or popcount have");
  CHECK(kernel(90, 9, Width::bits8, false) == Kernel::small, "more rows than a matrix x vector kernel has");
  CHECK(kernel(90, 1, Width::sparse24, false) == Kernel::small, "2:4 has no matrix x vector kernel");
  CHECK(kernel(90, 4096, Width::sparse24, false) == Kernel::medium, "2:4 has no large kernel");
  CHECK(cuda::plan({90, 132}, 2, 64, 64, Width::bits8, false, true).workspace_bytes == 2 * 64 * 4, "gate and up meet in it");
}

// What docs/cuda.md says of shared memory, in bytes. A multiprocessor of sm_80 has 164 KiB, of which a block takes 1 for itself.
void check_shared(const char* name, int bytes, int expected, int blocks, int kib) {
  set_case("shared memory of %s", name);
  CHECK(bytes == expected, "%d bytes, expected %d", bytes, expected);
  CHECK((bytes + 1024) * blocks <= kib * 1024, "%d blocks do not fit %d KiB", blocks, kib);
}
TERSOR_TEST(cuda_shared_memory) {
  check_shared("large", cuda::Layout<cuda::Codes<8, false>, cuda::Large>::kSharedBytes, 69632, 2, 164);
  check_shared("medium", cuda::Layout<cuda::Codes<8, false>, cuda::Medium>::kSharedBytes, 49152, 3, 164);
  check_shared("medium on sm_89", cuda::Layout<cuda::Codes<8, false>, cuda::Medium>::kSharedBytes, 49152, 2, 100);
  check_shared("medium, groups", cuda::Layout<cuda::Codes<4, true>, cuda::Medium>::kSharedBytes, 34816, 2, 100);
  check_shared("small", cuda::Layout<cuda::Codes<8, false>, cuda::Small>::kSharedBytes, 55296, 2, 164);
  check_shared("2:4 medium", cuda::SparseLayout<64>::kSharedBytes, 36864, 2, 100);
  check_shared("2:4 small", cuda::SparseLayout<16>::kSharedBytes, 24576, 3, 100);
}

// 16-byte loads of shared memory meet every bank once, as the layouts in gemm_int.cuh promise.
TERSOR_TEST(cuda_bank_conflicts) {
  Random random(options.seed);
  machine.schedule = kSchedules[0];
  for (int bits : kWidths) {
    for (Kernel kernel : {Kernel::small, Kernel::medium, Kernel::large}) {
      Emulated e(130, 256, 200, bits, random);
      machine.bank_conflicts = machine.warp_loads = 0;
      check_codes(e, {kernel, 1, 0}, Dtype::s32, Activation::none, false, false);
      CHECK(machine.warp_loads > 0 && machine.bank_conflicts == 0, "%lld further passes in %lld loads",
            static_cast<long long>(machine.bank_conflicts), static_cast<long long>(machine.warp_loads));
    }
  }
}

}  // namespace
}  // namespace tersor::test
