// Layers on the emulated kernels: operands in exact buffers, declared to the emulator.
#pragma once

#include <algorithm>
#include <string>

#include "../../csrc/cuda/run.cuh"
#include "emulator.h"
#include "problem.h"

namespace tersor::test {

inline const char* kernel_name(cuda::Kernel k) {
  constexpr const char* kNames[] = {"gemv1", "gemv2", "gemv4", "gemv8", "small", "medium", "large"};
  return kNames[static_cast<int>(k)];
}

// Hands run.cuh's launches to the emulator.
inline constexpr auto emulated_launch = [](auto kernel, cuda::Grid grid, int threads, int shared_bytes, const auto& params) {
  return cuda::emulator::machine.launch(kernel, grid.x, grid.y, grid.z, threads, shared_bytes, params);
};

// A layer of codes on s8 rows. The rows end where the contract says: at the next multiple of 16.
struct Emulated {
  S8Operand x;
  Weights w;
  Exact<float> residual;
  int64_t sparse_bytes = 0;  // of the weights that a call names in place of the tiles

  Emulated(int64_t M, int64_t N, int64_t K, int bits, Random& random)
      : x(M, K, round_up(K, 16) + 16, round_up(K, 16), random), w(N, K, random, 0, bits), residual(M * N) {
    for (int64_t i = 0; i < M * N; ++i) residual[i] = random.normal();
  }

  // Everything but where the parts of a split go.
  cuda::LinearCall call(void* y, int64_t ldy, Dtype dtype, Activation activation, bool with_bias, bool with_residual) {
    using namespace cuda;
    LinearCall c{};
    c.M = x.M, c.N = w.N, c.K = w.K;
    c.width = static_cast<Width>(w.bits);
    c.rows = x.q.data();
    c.ld_rows = x.ldq;
    c.row_sum = x.row_sum.data();
    c.weight_packed = w.packed.data();
    if (dtype != Dtype::s32) {
      c.scale = x.scale.data();
      c.weight_scale = w.scale.data();
      c.bias = with_bias ? w.bias.data() : nullptr;
      c.residual = with_residual ? residual.data() : nullptr;
    }
    c.ld_residual = w.N;
    c.y = y;
    c.ldy = ldy;
    c.bias_dtype = Dtype::f32;
    c.y_dtype = dtype;
    c.activation = activation;
    return c;
  }

  // Returns what the emulator found, "" if nothing.
  std::string linear(const cuda::Plan& plan, void* y, int64_t ldy, Dtype dtype, Activation activation, bool with_bias,
                     bool with_residual) {
    return run(call(y, ldy, dtype, activation, with_bias, with_residual), plan);
  }

  std::string run(cuda::LinearCall c, const cuda::Plan& plan) {
    Exact<char> workspace(plan.workspace_bytes);
    c.workspace = workspace.data();
    auto& machine = cuda::emulator::machine;
    machine.error.clear();
    machine.forget_ranges();
    machine.allow(x.q.data(), x.q.size());
    machine.allow(w.packed.data(), w.packed.size());
    if (c.weight_packed != w.packed.data()) machine.allow(c.weight_packed, sparse_bytes);
    machine.plant_row(x.q.data(), x.q.data() + round_up(x.q.size(), 16));
    const int status = run_linear(c, plan, emulated_launch);
    return status && machine.error.empty() ? "no kernel" : machine.error;
  }
};

}  // namespace tersor::test
