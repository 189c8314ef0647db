// Every width, dtype and epilogue, gated units, 2:4 weights and norms on the emulator, bit for bit against the CPU kernels.
#include "emulated.h"
#include "fused.h"
#include "linear.h"

namespace tersor::test {
namespace {

using cuda::Kernel;
using cuda::Width;
using cuda::emulator::kSchedules;
using cuda::emulator::machine;

constexpr int64_t kRowCounts[] = {1, 3, 16, 17, 64, 130};

long long ll(int64_t v) { return v; }

bool same_float(const void* a, const void* b, Dtype dtype, int64_t i) {
  const float x = load_float(a, dtype, i), y = load_float(b, dtype, i);
  return x == y || (std::isnan(x) && std::isnan(y));
}

// y of the call against what the CPU kernels give for the same layer, on the same residual.
void check_layer(Emulated& e, cuda::LinearCall c, const cuda::Plan& plan, LinearWeights w) {
  const int64_t columns = c.glu ? c.N / 2 : c.N, bytes = dtype_bytes(c.y_dtype);
  Canvas y(c.M, columns * bytes, c.ldy * bytes), want(c.M, columns * bytes, columns * bytes);
  c.y = y.at();
  const std::string error = e.run(c, plan);
  if (!CHECK(error.empty(), "%s", error.c_str())) return;
  CHECK(y.intact(), "writes outside y");
  w.glu = c.glu;
  const Output out{want.at(), c.y_dtype, c.residual, c.ld_residual};
  const char* failed = linear_s8(runnable().front().table, c.M, e.x.args(), w, out);
  CHECK(failed == nullptr, "%s", failed);
  for (int64_t m = 0; m < c.M; ++m) {
    if (c.y_dtype == Dtype::s32) {
      CHECK_SAME("acc", y.at<int32_t>(m), want.at<int32_t>(m), columns);
      continue;
    }
    for (int64_t n = 0; n < columns; ++n) {
      CHECK(same_float(y.at(m), want.at(m), c.y_dtype, n), "y[%lld][%lld] is %.9g, expected %.9g", ll(m), ll(n),
            static_cast<double>(load_float(y.at(m), c.y_dtype, n)), static_cast<double>(load_float(want.at(m), c.y_dtype, n)));
    }
  }
}

TERSOR_TEST(cuda_every_epilogue) {
  Random random(options.seed);
  const int64_t sizes[][2] = {{33, 97}, {48, 128}, {35, 66}, {18, 131}};  // N, K: odd and even
  int64_t i = 0;
  for (int64_t M : kRowCounts) {
    for (int bits : kWidths) {
      for (int64_t size : choices(i, 4)) {
        Emulated e(M, sizes[size][0], sizes[size][1], bits, random);
        const cuda::Plan plan = cuda::plan({90, 2}, M, e.w.N, e.w.K, static_cast<Width>(bits), false, false);
        for (Dtype dtype : {Dtype::s32, Dtype::f32, Dtype::bf16, Dtype::f16}) {
          for (Activation a : kActivations) {
            if (dtype == Dtype::s32 && a != Activation::none) continue;
            for (int64_t s : choices(i++, 5)) {
              machine.schedule = kSchedules[s];
              set_case("w%d %s M=%lld N=%lld K=%lld %s %s schedule %s", bits, kernel_name(plan.kernel), ll(M), ll(e.w.N), ll(e.w.K),
                       dtype_name(dtype), activation_name(a), machine.schedule.name);
              for (int64_t without : choices(i, 3)) {
                const bool bias = dtype != Dtype::s32 && without != 0;
                check_layer(e, e.call(nullptr, e.w.N + without, dtype, a, bias, false), plan, e.w.args(a, bias));
              }
            }
          }
        }
      }
    }
  }
}

TERSOR_TEST(cuda_residual) {
  Random random(options.seed);
  int64_t i = 0;
  for (int64_t M : kRowCounts) {
    for (Dtype dtype : kFloatDtypes) {
      const int64_t N = i % 2 ? 33 : 48;
      const FloatRows residual(M, N, dtype, N + i % 3, 1, [&](int64_t, int64_t) { return 5 * random.normal(); });
      for (int64_t width : choices(i, 4)) {
        Emulated e(M, N, 97, kWidths[width], random);
        for (int64_t s : choices(i, 5)) {
          machine.schedule = kSchedules[s];
          for (int64_t epilogue : choices(i + 1, 5)) {
            const Activation a = kActivations[epilogue];
            set_case("residual w%d M=%lld N=%lld %s %s schedule %s", e.w.bits, ll(M), ll(N), dtype_name(dtype), activation_name(a),
                     machine.schedule.name);
            cuda::LinearCall c = e.call(nullptr, N, dtype, a, true, false);
            c.residual = residual.origin;
            c.ld_residual = residual.stride_m;
            check_layer(e, c, cuda::plan({80, 2}, M, N, 97, c.width, false, false), e.w.args(a, true));
          }
        }
      }
      ++i;
    }
  }
}

TERSOR_TEST(cuda_glu) {
  Random random(options.seed);
  int64_t i = 0;
  for (int64_t M : kRowCounts) {
    for (int64_t N : {32, 96, 160}) {
      const int bits = kWidths[i % 4];
      Emulated e(M, N, 200, bits, random);
      std::vector<cuda::Plan> plans;
      if (M <= 3) plans.push_back({bits >= 4 ? Kernel::gemv8 : Kernel::gemv4, 1, M * N * 4});
      plans.push_back({M <= 16 ? Kernel::small : Kernel::medium, 1, 0});
      plans.push_back({Kernel::large, 1, 0});
      plans.push_back({Kernel::medium, 3, 3 * M * N * 4});
      for (const cuda::Plan& plan : plans) {
        const Dtype dtype = kFloatDtypes[i % 3];
        const Activation a = kActivations[i % 5];
        for (int64_t s : choices(i++, 5)) {
          machine.schedule = kSchedules[s];
          set_case("glu w%d %s splits=%lld M=%lld N=%lld %s %s schedule %s", bits, kernel_name(plan.kernel), ll(plan.splits), ll(M),
                   ll(N), dtype_name(dtype), activation_name(a), machine.schedule.name);
          cuda::LinearCall c = e.call(nullptr, N / 2 + i % 2 * 3, dtype, a, i % 2 == 0, false);
          c.glu = true;
          check_layer(e, c, plan, e.w.args(a, i % 2 == 0));
        }
      }
    }
  }
}

TERSOR_TEST(cuda_glu_every_epilogue) {
  Random random(options.seed);
  int64_t i = 0;
  for (int64_t M : kRowCounts) {
    for (Dtype dtype : kFloatDtypes) {
      for (Activation a : kActivations) {
        for (int64_t width : choices(i, 4)) {
          const int bits = kWidths[width];
          Emulated e(M, 32 + 64 * (i % 2), 99 + i / 2 % 2, bits, random);
          const cuda::Plan plan = cuda::plan({90, 2}, M, e.w.N, e.w.K, static_cast<Width>(bits), false, true);
          machine.schedule = kSchedules[i % 5];
          set_case("glu w%d %s M=%lld N=%lld K=%lld %s %s schedule %s", bits, kernel_name(plan.kernel), ll(M), ll(e.w.N), ll(e.w.K),
                   dtype_name(dtype), activation_name(a), machine.schedule.name);
          cuda::LinearCall c = e.call(nullptr, e.w.N / 2, dtype, a, true, false);
          c.glu = true;
          check_layer(e, c, plan, e.w.args(a, true));
        }
        ++i;
      }
    }
  }
}

// ---- 2:4 ------------------------------------------------------------------------------------------------------------------------

// Keeps at most two values in every four k of w; some groups keep one or none.
void make_24(Weights* w, Random& random) {
  for (int64_t n = 0; n < w->N; ++n) {
    for (int64_t k = 0; k < w->K; k += 4) {
      const int64_t keep = random.between(0, 9) < 8 ? 2 : random.between(0, 1);
      int64_t kept = 0, left = std::min<int64_t>(4, w->K - k);
      for (int64_t i = k; i < std::min(k + 4, w->K); ++i, --left) {
        const bool takes = kept < keep && random.between(1, left) <= keep - kept;
        kept += takes;
        if (!takes) w->w[static_cast<size_t>(n * w->K + i)] = 0;
      }
    }
  }
  w->packed = Exact<uint8_t>(pack(w->w, w->N, w->K, 8), 0);
}

// The blocks of spmm_24.cuh, from element to lane.
Exact<uint8_t> pack_24(const Weights& w) {
  const int64_t blocks = ceil_div(w.K, 64);
  Exact<uint8_t> packed(ceil_div(w.N, kTileN) * blocks * cuda::kBytes24);
  for (int64_t i = 0; i < packed.size(); ++i) packed[i] = 0;
  for (int64_t n = 0; n < round_up(w.N, kTileN); ++n) {
    for (int64_t k = 0; k < blocks * 64; k += 4) {
      uint8_t* block = packed.data() + (n / kTileN * blocks + k / 64) * cuda::kBytes24;
      int64_t places[2] = {0, 1}, found = 0;
      auto value = [&](int64_t i) { return n < w.N && i < w.K ? w.w[static_cast<size_t>(n * w.K + i)] : 0; };
      for (int64_t i = 0; i < 4; ++i) {
        if (value(k + i) == 0) continue;
        if (found == 0 && i == 3) places[0] = 2, ++found;  // a pair must ascend: the first of it is a zero
        places[found++] = i;
        if (found == 1) places[1] = i + 1;
      }
      const int64_t row = n % kTileN, group = k % 64 / 4, half = group / 8;
      const int64_t lane = row % 8 * 4 + group % 8 / 2;
      for (int64_t j = 0; j < 2; ++j) {
        block[lane * 16 + (half * 2 + row / 8) * 4 + group % 2 * 2 + j] = static_cast<uint8_t>(value(k + places[j]));
      }
      const int64_t holder = row % 8 * 4 + row / 8 + 2 * half;
      block[512 + holder * 4 + group % 8 / 2] |= static_cast<uint8_t>((places[0] | places[1] << 2) << group % 2 * 4);
    }
  }
  return packed;
}

void check_24(int64_t M, int64_t N, int64_t K, const cuda::Plan& plan, Dtype dtype, Activation a, Random& random) {
  set_case("2:4 %s splits=%lld M=%lld N=%lld K=%lld %s %s schedule %s", kernel_name(plan.kernel), ll(plan.splits), ll(M), ll(N),
           ll(K), dtype_name(dtype), activation_name(a), machine.schedule.name);
  Emulated e(M, N, K, 8, random);
  make_24(&e.w, random);
  const Exact<uint8_t> packed = pack_24(e.w);
  e.sparse_bytes = packed.size();
  cuda::LinearCall c = e.call(nullptr, N + M % 3, dtype, a, dtype != Dtype::s32, false);
  c.width = Width::sparse24;
  c.weight_packed = packed.data();
  machine.bank_conflicts = machine.warp_loads = 0;
  check_layer(e, c, plan, e.w.args(a, dtype != Dtype::s32));
  CHECK(machine.warp_loads > 0 && machine.bank_conflicts == 0, "%lld further passes in %lld loads", ll(machine.bank_conflicts),
        ll(machine.warp_loads));
}

TERSOR_TEST(cuda_sparse_24) {
  Random random(options.seed);
  const Dtype outputs[] = {Dtype::s32, Dtype::f32, Dtype::bf16, Dtype::f16};
  int64_t i = 0;
  for (int64_t M : kRowCounts) {
    for (int64_t K : {1, 63, 64, 130, 321}) {
      const int64_t N = std::initializer_list<int64_t>{1, 16, 37, 130}.begin()[i % 4];
      for (Kernel kernel : {Kernel::small, Kernel::medium}) {
        const Dtype dtype = outputs[i % 4];
        const Activation a = dtype == Dtype::s32 ? Activation::none : kActivations[i % 5];
        for (int64_t s : choices(i++, 5)) {
          machine.schedule = kSchedules[s];
          check_24(M, N, K, {kernel, 1, 0}, dtype, a, random);
          if (K > 300) check_24(M, N, K, {kernel, 3, 3 * M * N * 4}, dtype, a, random);
        }
      }
    }
  }
  for (const auto& schedule : kSchedules) {
    machine.schedule = schedule;
    check_24(70, 140, 700, {Kernel::medium, 1, 0}, Dtype::s32, Activation::none, random);
  }
}

TERSOR_TEST(cuda_sparse_24_every_epilogue) {
  Random random(options.seed);
  int64_t i = 0;
  for (int64_t M : kRowCounts) {
    for (Dtype dtype : kFloatDtypes) {
      for (Activation a : kActivations) {
        machine.schedule = kSchedules[i % 5];
        const int64_t N = 37 + i / 3 % 2, K = 131 + i / 5 % 2;
        check_24(M, N, K, cuda::plan({90, 2}, M, N, K, Width::sparse24, false, false), dtype, a, random);
        ++i;
      }
    }
  }
}

// ---- norms ----------------------------------------------------------------------------------------------------------------------

void check_norm(int64_t M, int64_t K, Dtype dtype, bool rms, bool add, float mean, Random& random) {
  set_case("%s M=%lld K=%lld %s%s mean %g schedule %s", rms ? "rms" : "layer", ll(M), ll(K), dtype_name(dtype),
           add ? " + residual" : "", static_cast<double>(mean), machine.schedule.name);
  const FloatRows x(M, K, dtype, K + 3, 1, [&](int64_t m, int64_t) {
    return m == 2 ? 0.0f : m == 4 && random.coin() ? HUGE_VALF : 2 * random.normal() + mean;
  });
  const FloatRows residual(M, K, dtype, K + 5, 1, [&](int64_t, int64_t) { return random.normal(); });
  Exact<float> weight(K), bias(K);
  for (int64_t k = 0; k < K; ++k) weight[k] = random.normal(), bias[k] = random.normal();
  const int64_t bytes = K * dtype_bytes(dtype);
  struct Results {
    Canvas q, scale, row_sum, sum, y;
    Results(int64_t M, int64_t K, int64_t bytes)
        : q(M, K, K), scale(1, M * 4, M * 4, 4), row_sum(1, M * 4, M * 4, 4), sum(M, bytes, bytes, 4), y(M, bytes, bytes, 4) {}
  };
  Results got(M, K, bytes), want(M, K, bytes);
  const bool affine = K % 3 != 0;
  const Norm norm{K, affine ? weight.data() : nullptr, Dtype::f32, affine && !rms ? bias.data() : nullptr, Dtype::f32, 1e-5f, rms};
  const char* failed = norm_quantize(
      runnable().front().table, M, {x.origin, dtype, x.stride_m}, {add ? residual.origin : nullptr, dtype, residual.stride_m}, norm,
      {want.q.at<int8_t>(), want.scale.at<float>(), want.row_sum.at<int32_t>()}, want.sum.at(), want.y.at());
  CHECK(failed == nullptr, "%s", failed);
  cuda::NormParams p{};
  p.x = x.origin, p.dtype = dtype, p.stride_m = x.stride_m, p.stride_k = 1;
  p.residual = add ? residual.origin : nullptr, p.ld_residual = residual.stride_m;
  p.M = M, p.K = K;
  p.weight = norm.weight, p.bias = norm.bias;
  p.weight_dtype = p.bias_dtype = Dtype::f32;
  p.eps = norm.eps, p.rms = rms;
  p.q = got.q.at<int8_t>(), p.scale = got.scale.at<float>(), p.row_sum = got.row_sum.at<int32_t>();
  p.sum = got.sum.at(), p.y = got.y.at();
  machine.error.clear();
  if (!CHECK(run_norm(p, emulated_launch) == 0, "%s", machine.error.c_str())) return;
  CHECK(got.q.intact() && got.scale.intact() && got.row_sum.intact() && got.sum.intact() && got.y.intact(), "writes outside");
  CHECK_SAME("q", got.q.at<int8_t>(), want.q.at<int8_t>(), M * K);
  CHECK_SAME("row_sum", got.row_sum.at<int32_t>(), want.row_sum.at<int32_t>(), M);
  for (int64_t m = 0; m < M; ++m) CHECK(same_float(got.scale.at(), want.scale.at(), Dtype::f32, m), "scale[%lld]", ll(m));
  for (int64_t i = 0; i < M * K; ++i) {
    CHECK(same_float(got.sum.at(), want.sum.at(), dtype, i), "sum[%lld]", ll(i));
    CHECK(same_float(got.y.at(), want.y.at(), dtype, i), "y[%lld] is %.9g, expected %.9g", ll(i),
          static_cast<double>(load_float(got.y.at(), dtype, i)), static_cast<double>(load_float(want.y.at(), dtype, i)));
  }
}

TERSOR_TEST(cuda_norm_quantize) {
  Random random(options.seed);
  int64_t i = 0;
  for (int64_t K : {1, 2, 33, 64, 65, 200, 769}) {
    for (Dtype dtype : kFloatDtypes) {
      for (int64_t kind = 0; kind < 4; ++kind) {
        for (int64_t s : choices(i++, 5)) {
          machine.schedule = kSchedules[s];
          check_norm(5, K, dtype, kind % 2, kind / 2, 0.5f, random);
        }
      }
    }
  }
  for (int64_t M : kRowCounts) check_norm(M, 130, kFloatDtypes[M % 3], M % 2 != 0, M % 5 == 0, 0.5f, random);
  for (float mean : {5.0f, -300.0f, 1e5f}) {  // the second pass
    check_norm(3, 200, Dtype::f32, false, false, mean, random);
    check_norm(3, 200, Dtype::bf16, false, true, mean, random);
  }
}

}  // namespace
}  // namespace tersor::test
