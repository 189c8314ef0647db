// Quantising and binarising rows, signs x signs and group scales on the emulator, against the oracle and the CPU kernels.
#include "emulated.h"
#include "linear.h"

namespace tersor::test {
namespace {

using cuda::Kernel;
using cuda::Width;
using cuda::emulator::kSchedules;
using cuda::emulator::machine;

long long ll(int64_t v) { return v; }

FloatRows random_rows(int64_t M, int64_t K, Dtype dtype, const Layout& layout, Random& random) {
  return FloatRows(M, K, dtype, layout.stride_m, layout.stride_k, [&](int64_t m, int64_t k) {
    if (m == 1 && k == K / 2) return random.coin() ? std::nanf("") : HUGE_VALF;
    return m == 2 ? 0.0f : random.normal() * (m == 3 ? 1e-30f : 1.0f);
  });
}

bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// given: absmax of each row; input_scale: of all rows. width > K leaves zeros behind the row.
void check_quantize(const FloatRows& x, const float* given, const float* input_scale, int64_t width, bool parts) {
  const int64_t M = x.M, K = x.K, parts_k = ceil_div(K, 32);
  set_case("quantize M=%lld K=%lld %s strides %lld %lld width=%lld schedule %s", ll(M), ll(K), dtype_name(x.dtype), ll(x.stride_m),
           ll(x.stride_k), ll(width), machine.schedule.name);
  Canvas q(M, width, width + 3), scale(1, M * 4, M * 4), sum(1, M * 4, M * 4), sums(1, M * parts_k * 4, M * parts_k * 4);
  cuda::QuantizeParams p{x.origin,
                         x.dtype,
                         x.stride_m,
                         x.stride_k,
                         M,
                         K,
                         given,
                         input_scale,
                         q.at<int8_t>(),
                         width + 3,
                         width,
                         scale.at<float>(),
                         sum.at<int32_t>(),
                         parts ? sums.at<int32_t>() : nullptr};
  machine.error.clear();
  CHECK(run_quantize(p, emulated_launch) == 0, "%s", machine.error.c_str());
  CHECK(q.intact() && scale.intact() && sum.intact() && sums.intact(), "writes outside its results");
  for (int64_t m = 0; m < M; ++m) {
    const float magnitude = given ? std::fabs(given[m]) : 0.0f;
    QuantizedRow want = quantize_row(x.row(m), K, given ? &magnitude : nullptr, input_scale);
    CHECK(same(scale.at<float>()[m], want.scale), "scale[%lld] is %.9g, expected %.9g", ll(m),
          static_cast<double>(scale.at<float>()[m]), static_cast<double>(want.scale));
    CHECK_SAME("row_sum", sum.at<int32_t>() + m, &want.row_sum, 1);
    want.q.resize(static_cast<size_t>(width), 0);
    CHECK_SAME("q", q.at<int8_t>(m), want.q.data(), width);
    for (int64_t part = 0; parts && part < parts_k; ++part) {
      int32_t expected = 0;
      for (int64_t k = part * 32; k < std::min(K, part * 32 + 32); ++k) expected += want.q[static_cast<size_t>(k)];
      CHECK_SAME("row_sum_32", sums.at<int32_t>() + m * parts_k + part, &expected, 1);
    }
  }
}

TERSOR_TEST(cuda_quantize_rows) {
  Random random(options.seed);
  int64_t i = 0;
  for (int64_t K : {1, 3, 4, 31, 33, 128, 130, 1000, 1300}) {
    for (int64_t M : {1, 5}) {
      for (const Layout& layout : layouts(M, K)) {
        const FloatRows x = random_rows(M, K, kFloatDtypes[i % 3], layout, random);
        for (int64_t s : choices(i, 5)) {
          machine.schedule = kSchedules[s];
          check_quantize(x, nullptr, nullptr, i % 2 ? K : round_up(K, 16), i % 4 < 2);
        }
        ++i;
      }
    }
  }
  const FloatRows x = random_rows(5, 70, Dtype::f32, {"contiguous", 70, 1}, random);
  const float given[5] = {0.5f, 2.0f, std::nanf(""), 3.0f, -1.0f};
  check_quantize(x, given, nullptr, 70, false);
  for (float s : {0.02f, -0.02f, 0.0f, 1e-31f, std::nanf(""), HUGE_VALF}) check_quantize(x, nullptr, &s, 80, true);
}

Exact<float> thresholds(int64_t K, Random& random) {
  Exact<float> threshold(K);
  for (int64_t k = 0; k < K; ++k) threshold[k] = k % 4 == 0 ? 0.0f : 0.3f * random.normal();
  return threshold;
}

// The layer `c` once more as sm_100 computes it, on s8 rows by 1-bit codes: the bits of y must be the same.
void check_signs_as_int8(const FloatRows& x, const Exact<float>& threshold, const cuda::Plan& plan, cuda::LinearCall* c,
                         Canvas* y) {
  const int64_t M = x.M, K = x.K, ld = round_up(K, 32);
  Exact<int8_t> signs(M * ld);
  Exact<float> scale(M);
  Exact<int32_t> sum(M);
  const cuda::BinarizeParams b{x.origin, x.dtype, x.stride_m,   x.stride_k,   M,         K, threshold.data(),
                               nullptr,  ld / 32, signs.data(), scale.data(), sum.data()};
  if (!CHECK(run_binarize(b, emulated_launch) == 0, "%s", machine.error.c_str())) return;
  for (int64_t m = 0; m < M; ++m) {
    int32_t all = 0;
    for (int64_t k = 0; k < K; ++k) all += signs[m * ld + k];
    CHECK(sum[m] == all, "sum of row %lld is %d, expected %d", ll(m), sum[m], all);
  }
  machine.allow(signs.data(), signs.size());
  cuda::LinearCall as_int8 = *c;
  const int64_t row_bytes = c->N * dtype_bytes(c->y_dtype);
  Canvas again(M, row_bytes, row_bytes);
  as_int8.width = cuda::Width::bits1;
  as_int8.rows = signs.data();
  as_int8.ld_rows = ld;
  as_int8.row_sum = sum.data();
  as_int8.scale = scale.data();
  as_int8.y = again.at();
  if (!CHECK(run_linear(as_int8, plan, emulated_launch) == 0, "%s", machine.error.c_str())) return;
  for (int64_t i = 0; i < M * c->N; ++i) {
    CHECK(same(load_float(again.at(), c->y_dtype, i), load_float(y->at(), c->y_dtype, i)), "y[%lld] as int8", ll(i));
  }
}

// Rows of bits as linear_xnor wants them, and the layer on them.
void check_signs(int64_t M, int64_t N, int64_t K, Dtype dtype, Dtype y_dtype, Activation activation, const Layout& layout,
                 const cuda::Plan& plan, Random& random) {
  set_case("signs %s splits=%lld M=%lld N=%lld K=%lld %s %s to %s %s schedule %s", kernel_name(plan.kernel), ll(plan.splits), ll(M),
           ll(N), ll(K), dtype_name(dtype), layout.name, dtype_name(y_dtype), activation_name(activation), machine.schedule.name);
  const FloatRows x = random_rows(M, K, dtype, layout, random);
  const Weights w(N, K, random, 0, 1);
  const Exact<float> threshold = thresholds(K, random);
  const int64_t words = ceil_div(K, 32), ld = round_up(words, 4);
  Exact<uint32_t> bits(M * ld);
  Exact<float> scale(M);
  Exact<int32_t> popcount(M);
  machine.error.clear();
  machine.forget_ranges();
  const cuda::BinarizeParams b{x.origin, dtype,   x.stride_m,   x.stride_k,     M, K, threshold.data(), bits.data(),
                               ld,       nullptr, scale.data(), popcount.data()};
  if (!CHECK(run_binarize(b, emulated_launch) == 0, "%s", machine.error.c_str())) return;
  const KernelTable& table = runnable().front().table;
  std::vector<uint32_t> want_bits(static_cast<size_t>(M * words));
  std::vector<float> want_scale(static_cast<size_t>(M));
  binarize_rows(table, M, K, x.args(), threshold.data(), reinterpret_cast<uint8_t*>(want_bits.data()), want_scale.data());
  for (int64_t m = 0; m < M; ++m) {
    CHECK_SAME("bits", bits.data() + m * ld, want_bits.data() + m * words, words);
    CHECK(same(scale[m], want_scale[static_cast<size_t>(m)]), "scale[%lld] is %.9g, expected %.9g", ll(m),
          static_cast<double>(scale[m]), static_cast<double>(want_scale[static_cast<size_t>(m)]));
    for (int64_t i = words; i < ld; ++i) CHECK(bits[m * ld + i] == 0, "pads are 0");
  }

  const int64_t row_bytes = N * dtype_bytes(y_dtype);
  Canvas y(M, row_bytes, row_bytes), want(M, row_bytes, row_bytes);
  Exact<char> workspace(plan.workspace_bytes);
  cuda::LinearCall c{};
  c.M = M, c.N = N, c.K = K;
  c.width = cuda::Width::signs;
  c.rows = bits.data();
  c.ld_rows = ld * 4;
  c.row_sum = popcount.data();
  c.scale = scale.data();
  c.weight_packed = w.packed.data();
  c.weight_scale = w.scale.data();
  c.bias = w.bias.data();
  c.workspace = workspace.data();
  c.y = y.at();
  c.ldy = N;
  c.bias_dtype = Dtype::f32;
  c.y_dtype = y_dtype;
  c.activation = activation;
  machine.allow(bits.data(), bits.size() * 4);
  machine.allow(w.packed.data(), w.packed.size());
  if (!CHECK(run_linear(c, plan, emulated_launch) == 0, "%s", machine.error.c_str())) return;
  CHECK(y.intact(), "writes outside y");
  check_signs_as_int8(x, threshold, plan, &c, &y);
  // The CPU op gives x's dtype: rows in f32 of the same values.
  const FloatRows wide(M, K, Dtype::f32, K, 1, [&](int64_t m, int64_t k) { return x.row(m)[k]; });
  LinearWeights args = w.args(activation, true);
  args.threshold = threshold.data();
  linear_xnor(table, M, wide.args(), args, {want.at(), y_dtype});
  for (int64_t i = 0; i < M * N; ++i) {
    const float got = load_float(y.at(), y_dtype, i), right = load_float(want.at(), y_dtype, i);
    CHECK(same(got, right), "y[%lld] is %.9g, expected %.9g", ll(i), static_cast<double>(got), static_cast<double>(right));
  }
}

TERSOR_TEST(cuda_signs) {
  Random random(options.seed);
  int64_t i = 0;
  for (int64_t M : {1, 3, 16, 17, 64, 130}) {
    for (int64_t K : {1, 33, 130, 1100, 1800}) {
      const int64_t N = std::initializer_list<int64_t>{1, 37, 140}.begin()[i % 3];
      const Kernel kernel = M <= 3 ? (i % 2 ? Kernel::gemv1 : Kernel::gemv4)
                                   : std::initializer_list<Kernel>{Kernel::small, Kernel::medium, Kernel::large}.begin()[i % 3];
      const std::vector<Layout> all = layouts(M, K);
      const Layout& layout = all[static_cast<size_t>(i) % all.size()];
      const Dtype x_dtype = kFloatDtypes[i % 3], y_dtype = kFloatDtypes[i / 2 % 3];
      const Activation a = kActivations[i % 5];
      for (int64_t s : choices(i, 5)) {
        machine.schedule = kSchedules[s];
        check_signs(M, N, K, x_dtype, y_dtype, a, layout, {kernel, 1, 0}, random);
        if (K > 1024) check_signs(M, N, K, x_dtype, y_dtype, a, layout, {Kernel::small, 2, 2 * M * N * 4}, random);
      }
      ++i;
    }
  }
}

TERSOR_TEST(cuda_signs_every_epilogue) {
  Random random(options.seed);
  int64_t i = 0;
  for (int64_t M : {1, 3, 16, 17, 64, 130}) {
    const cuda::Plan plan = cuda::plan({90, 2}, M, 38, 131, Width::signs, false, false);
    for (Dtype y_dtype : kFloatDtypes) {
      for (Activation a : kActivations) {
        for (int64_t s : choices(i++, 5)) {
          machine.schedule = kSchedules[s];
          check_signs(M, 37 + i % 2, 130 + i / 2 % 2, kFloatDtypes[i % 3], y_dtype, a, layouts(M, 131)[0], plan, random);
        }
      }
    }
  }
}

// Exact sums of each group, so the bound of numerics.md (class F) on top of the epilogue's roundings. `turn` picks the dtype and
// activation of a second run, which finishes the same float32 values: to the bit.
void check_groups(int64_t turn, int64_t M, int64_t N, int64_t groups, int64_t size, const cuda::Plan& plan, Random& random) {
  const int64_t K = groups * size;
  set_case("groups %s splits=%lld M=%lld N=%lld K=%lld size=%lld schedule %s", kernel_name(plan.kernel), ll(plan.splits), ll(M),
           ll(N), ll(K), ll(size), machine.schedule.name);
  Emulated e(M, N, K, 4, random);
  Exact<uint16_t> scales(ceil_div(N, 16) * groups * 16);
  Exact<int32_t> sums(M * (K / 32));
  for (int64_t i = 0; i < scales.size(); ++i) scales[i] = encode(static_cast<float>(0.3 + 0.7 * random.unit()), kF16);
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t k = 0; k < K; ++k) sums[m * (K / 32) + k / 32] += e.x.q[m * e.x.ldq + k];
  }
  Canvas y(M, N * 4, N * 4);
  Exact<char> workspace(plan.workspace_bytes);
  cuda::LinearCall c{};
  c.M = M, c.N = N, c.K = K;
  c.width = cuda::Width::bits4;
  c.rows = e.x.q.data();
  c.ld_rows = e.x.ldq;
  c.row_sum = e.x.row_sum.data();
  c.scale = e.x.scale.data();
  c.weight_packed = e.w.packed.data();
  c.weight_scale = e.w.scale.data();
  c.bias = e.w.bias.data();
  c.group_scale = reinterpret_cast<const uint8_t*>(scales.data());
  c.group_size = size;
  c.row_sum_32 = sums.data();
  c.workspace = workspace.data();
  c.y = y.at();
  c.ldy = N;
  c.bias_dtype = c.y_dtype = Dtype::f32;
  machine.error.clear();
  machine.forget_ranges();
  machine.allow(e.x.q.data(), e.x.q.size());
  machine.allow(e.w.packed.data(), e.w.packed.size());
  machine.allow(scales.data(), scales.size() * 2);
  if (!CHECK(run_linear(c, plan, emulated_launch) == 0, "%s", machine.error.c_str())) return;
  CHECK(y.intact(), "writes outside y");
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0, magnitude = 0;
      for (int64_t g = 0; g < groups; ++g) {
        int64_t acc = 0;
        for (int64_t k = g * size; k < (g + 1) * size; ++k) {
          acc += int64_t{e.x.q[m * e.x.ldq + k]} * e.w.w[static_cast<size_t>(n * K + k)];
        }
        const double part =
            static_cast<double>(acc) * static_cast<double>(decode(scales[(n / 16 * groups + g) * 16 + n % 16], kF16));
        sum += part;
        magnitude += std::fabs(part);
      }
      const double unit = static_cast<double>(e.x.scale[m]) * static_cast<double>(e.w.scale[n]);
      const double z = sum * unit + static_cast<double>(e.w.bias[n]);
      // As check_grouped of tests/cpp: product and sum of each group, two scales, the bias.
      const Bounded want{z, 1.01 * kU * (static_cast<double>(2 * groups + 4) * magnitude * unit + std::fabs(z))};
      CHECK(within(y.at(), Dtype::f32, m * N + n, want), "y[%lld][%lld] is %.9g, expected %.9g within %.3g", ll(m), ll(n),
            static_cast<double>(y.at<float>()[m * N + n]), want.value, want.bound);
    }
  }
  c.y_dtype = kFloatDtypes[turn % 3];
  c.activation = kActivations[turn / 3 % 5];
  const int64_t bytes = dtype_bytes(c.y_dtype);
  Canvas finished(M, N * bytes, N * bytes), right(M, N * bytes, N * bytes);
  c.y = finished.at();
  if (!CHECK(run_linear(c, plan, emulated_launch) == 0, "%s", machine.error.c_str())) return;
  for (int64_t j = 0; j < M * N; ++j) {
    store_float(right.at(), c.y_dtype, j, cuda::activate(c.activation, y.at<float>()[j]));
    CHECK(same(load_float(finished.at(), c.y_dtype, j), load_float(right.at(), c.y_dtype, j)), "y[%lld] as %s %s", ll(j),
          dtype_name(c.y_dtype), activation_name(c.activation));
  }
}

TERSOR_TEST(cuda_group_scales) {
  Random random(options.seed);
  int64_t i = 0;
  for (int64_t size : {32, 64, 96, 128}) {
    for (int64_t groups : {1, 3, 5}) {
      for (int64_t M : {1, 2, 3, 16, 17, 70}) {
        const std::vector<int64_t> schedules = choices(i, 5);
        const int64_t N = std::initializer_list<int64_t>{1, 37, 130}.begin()[i++ % 3];
        const Kernel few = M == 1 ? Kernel::gemv1 : M == 2 ? Kernel::gemv2 : Kernel::gemv4;
        for (int64_t s : schedules) {
          machine.schedule = kSchedules[s];
          if (M == 3 || M == 16) check_groups(i, M, N, groups, size, {Kernel::gemv8, 1, 0}, random);
          check_groups(i, M, N, groups, size, {M <= 3 ? few : i % 2 ? Kernel::small : Kernel::medium, 1, 0}, random);
        }
      }
    }
  }
  // A part of a split K holds whole groups.
  machine.schedule = kSchedules[0];
  for (int64_t size : {32, 64, 96, 128, 320})
    check_groups(i, 20, 37, 1920 / size, size, {Kernel::medium, 3, 3 * 20 * 37 * 4}, random);
}

}  // namespace
}  // namespace tersor::test
