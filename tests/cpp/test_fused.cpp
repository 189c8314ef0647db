// Norm to int8 rows, residuals and gated layers: on every variant, in exact buffers.
#include "fused.h"
#include "problem.h"

namespace tersor::test {
namespace {

long long ll(int64_t v) { return v; }

constexpr int64_t kThreads[] = {1, 3};

// ---- norm -----------------------------------------------------------------------------------------------------------------------

struct NormProblem {
  FloatRows x, residual;
  Exact<float> weight, bias;
  bool with_residual, rms;

  NormProblem(int64_t M, int64_t K, Dtype dtype, bool add, bool root, float mean, Random& random)
      : x(M, K, dtype, K + 3, 1, [&](int64_t, int64_t) { return 2 * random.normal() + mean; }),
        residual(M, K, dtype, K + 5, 1, [&](int64_t, int64_t) { return random.normal(); }),
        weight(K),
        bias(K),
        with_residual(add),
        rms(root) {
    for (int64_t k = 0; k < K; ++k) {
      weight[k] = random.normal();
      bias[k] = random.normal();
    }
  }
  // s of row m, rounded to the dtype.
  std::vector<double> sum(int64_t m) const {
    std::vector<double> s(static_cast<size_t>(x.K));
    for (int64_t k = 0; k < x.K; ++k) {
      float v = x.row(m)[k];
      if (with_residual) v = v + residual.row(m)[k];
      float rounded;
      char narrow[4];
      store_float(narrow, x.dtype, 0, v);
      rounded = load_float(narrow, x.dtype, 0);
      s[static_cast<size_t>(k)] = static_cast<double>(rounded);
    }
    return s;
  }
};

// y and how far the kernel's may lie from it, before it is rounded to the dtype: the derivation is beside exact_norm in
// tests/test_fused_ops.py.
std::vector<Bounded> exact_norm(const NormProblem& p, const std::vector<double>& s, double eps) {
  const auto K = static_cast<double>(p.x.K);
  const double g = (K / 64 + 7) * kU;
  double mean = 0, magnitude = 0, squares = 0;
  for (double v : s) {
    mean += v / K;
    magnitude += std::fabs(v) / K;
  }
  if (p.rms) mean = 0;
  for (double v : s) squares += (v - mean) * (v - mean);
  const double inverse = 1 / std::sqrt(squares / K + eps);
  std::vector<Bounded> y;
  for (size_t k = 0; k < s.size(); ++k) {
    const double z = (s[k] - mean) * inverse, w = static_cast<double>(p.weight[static_cast<int64_t>(k)]);
    const double value = z * w + (p.rms ? 0 : static_cast<double>(p.bias[static_cast<int64_t>(k)]));
    double bound = std::fabs(value) * ((g + 2 * kU) / 2 + 4 * kU);
    if (!p.rms) {
      const double of_mean = g * magnitude + 3 * kU * std::fabs(mean);
      bound = (std::fabs(z) * (8 * (3 * g + 5 * kU) / 2 + 3 * kU) + inverse * of_mean) * std::fabs(w) + kU * std::fabs(value);
    }
    y.push_back({value, 1.01 * bound});
  }
  return y;
}

void check_norm(const NormProblem& p, int64_t threads) {
  constexpr float kEps = 1e-5f;
  const int64_t M = p.x.M, K = p.x.K, bytes = K * dtype_bytes(p.x.dtype);
  std::vector<char> first;  // what the first variant gave
  for (const Kernels& k : runnable()) {
    set_case("%s %s M=%lld K=%lld %s%s, %lld threads", k.table.isa, p.rms ? "rms" : "layer", ll(M), ll(K), dtype_name(p.x.dtype),
             p.with_residual ? " + residual" : "", ll(threads));
    const Threads pool(threads);
    Canvas q(M, K, K), scale(1, M * 4, M * 4, 4), row_sum(1, M * 4, M * 4, 4), sum(M, bytes, bytes, 4), y(M, bytes, bytes, 4);
    const Norm norm{K, p.weight.data(), Dtype::f32, p.rms ? nullptr : p.bias.data(), Dtype::f32, kEps, p.rms};
    const Rows residual{p.with_residual ? p.residual.origin : nullptr, p.x.dtype, p.residual.stride_m};
    const char* error = on_fresh_thread([&] {
      return norm_quantize(k.table, M, {p.x.origin, p.x.dtype, p.x.stride_m}, residual, norm,
                           {q.at<int8_t>(), scale.at<float>(), row_sum.at<int32_t>()}, sum.at(), y.at());
    });
    CHECK(error == nullptr, "%s", error);
    CHECK(q.intact() && scale.intact() && row_sum.intact() && sum.intact() && y.intact(), "writes outside its results");
    for (int64_t m = 0; m < M; ++m) {
      const std::vector<double> s = p.sum(m);
      const std::vector<Bounded> want = exact_norm(p, s, static_cast<double>(kEps));
      std::vector<float> values;
      for (int64_t i = 0; i < K; ++i) {
        const auto at = static_cast<size_t>(i);
        values.push_back(load_float(y.at(m), p.x.dtype, i));
        CHECK(static_cast<double>(load_float(sum.at(m), p.x.dtype, i)) == s[at], "sum[%lld][%lld]", ll(m), ll(i));
        CHECK(within(y.at(m), p.x.dtype, i, want[at]), "y[%lld][%lld] is %.9g, expected %.9g within %.3g", ll(m), ll(i),
              static_cast<double>(values.back()), want[at].value, want[at].bound);
      }
      const QuantizedRow row = quantize_row(values.data(), K, nullptr);
      CHECK_SAME("q", q.at<int8_t>(m), row.q.data(), K);
      CHECK_SAME("scale", scale.at<float>() + m, &row.scale, 1);
      CHECK_SAME("row_sum", row_sum.at<int32_t>() + m, &row.row_sum, 1);
    }
    if (first.empty()) first.assign(y.at<char>(), y.at<char>() + M * bytes);
    CHECK_SAME("bits against the first variant's", y.at<char>(), first.data(), M * bytes);
  }
}

TERSOR_TEST(norm_every_size) {
  Random random(options.seed);
  for (int64_t K : {1, 2, 7, 8, 15, 16, 17, 33, 63, 64, 65, 129, 384, 769}) {
    for (Dtype dtype : kFloatDtypes) {
      for (int64_t i = 0; i < 4; ++i) check_norm(NormProblem(1 + (K + i) % 3, K, dtype, i % 2, i / 2, 0.5f, random), 1);
    }
  }
}

TERSOR_TEST(norm_far_from_zero) {  // the second pass
  Random random(options.seed + 1);
  for (float mean : {5.0f, -300.0f, 1e5f}) {
    for (int64_t i = 0; i < 2; ++i) check_norm(NormProblem(3, 200, Dtype::f32, i % 2, false, mean, random), 1);
  }
}

TERSOR_TEST(norm_split_over_threads) {
  Random random(options.seed + 2);
  for (int64_t threads : kThreads) check_norm(NormProblem(130, 769, Dtype::f32, true, false, 0.0f, random), threads);
}

// ---- residual -------------------------------------------------------------------------------------------------------------------

TERSOR_TEST(residual_in_the_epilogue) {
  Random random(options.seed + 3);
  for (int64_t N : {1, 15, 16, 17, 48, 53, 64}) {
    for (int64_t M : {1, 2, 5, 9, 40}) {
      for (Dtype dtype : kFloatDtypes) {
        const int bits = kWidths[(N + M) % 4];
        const Activation activation = kActivations[static_cast<size_t>(N + M) % std::size(kActivations)];
        const Weights w(N, 70, random, 1, bits);
        const S8Operand x(M, 70, 75, 70, random);
        const FloatRows residual(M, N, dtype, N + 3, 1, [&](int64_t, int64_t) { return 5 * random.normal(); });
        for (const Kernels& k : runnable()) {
          set_case("%s residual M=%lld N=%lld %s %d bits %s", k.table.isa, ll(M), ll(N), dtype_name(dtype), bits,
                   activation_name(activation));
          std::vector<float> before(static_cast<size_t>(M * N));
          const int64_t bytes = M * N * dtype_bytes(dtype);
          Canvas y(1, bytes, bytes, dtype_bytes(dtype));
          CHECK(linear_s8(k.table, M, x.args(), w.args(activation, true), {before.data(), Dtype::f32}) == nullptr, "memory");
          const Output out{y.at(), dtype, residual.origin, residual.stride_m};
          CHECK(linear_s8(k.table, M, x.args(), w.args(activation, true), out) == nullptr, "memory");
          CHECK(y.intact(), "writes outside y");
          std::vector<char> want(static_cast<size_t>(bytes));
          for (int64_t i = 0; i < M * N; ++i) {
            store_float(want.data(), dtype, i, before[static_cast<size_t>(i)] + residual.values[static_cast<size_t>(i)]);
          }
          CHECK_SAME("y", y.at<char>(), want.data(), bytes);
        }
      }
    }
  }
}

// ---- gated layers ---------------------------------------------------------------------------------------------------------------

void check_glu(int64_t M, int64_t F, int64_t K, Dtype dtype, int bits, Activation activation, int64_t threads, Random& random) {
  const Weights both(2 * F, K, random, 0, bits);
  const FloatRows x(M, K, dtype, K + 1, 1,
                    [&](int64_t, int64_t k) { return std::ldexp(random.normal(), static_cast<int>(k % 3)); });
  for (const Kernels& k : runnable()) {
    set_case("%s glu M=%lld F=%lld K=%lld %s %d bits %s, %lld threads", k.table.isa, ll(M), ll(F), ll(K), dtype_name(dtype), bits,
             activation_name(activation), ll(threads));
    const Threads pool(threads);
    // gate and up by themselves: every channel with the activation, and without
    Exact<int8_t> q(M * K);
    Exact<float> scale(M), act(M * 2 * F), plain(M * 2 * F);
    Exact<int32_t> row_sum(M);
    CHECK(!quantize_rows(k.table, M, K, x.args(), nullptr, nullptr, q.data(), scale.data(), row_sum.data()), "memory");
    const S8Rows rows{q.data(), K, scale.data(), row_sum.data()};
    CHECK(!linear_s8(k.table, M, rows, both.args(activation, true), {act.data(), Dtype::f32}), "memory");
    CHECK(!linear_s8(k.table, M, rows, both.args(Activation::none, true), {plain.data(), Dtype::f32}), "memory");
    const int64_t bytes = M * F * dtype_bytes(dtype);
    std::vector<char> want(static_cast<size_t>(bytes));
    for (int64_t i = 0; i < M * F; ++i) {
      const int64_t gate = i / F * 2 * F + i % F / 16 * 32 + i % 16;
      store_float(want.data(), dtype, i, act[gate] * plain[gate + 16]);
    }

    LinearWeights w = both.args(activation, true);
    w.glu = true;
    Canvas y(1, bytes, bytes, dtype_bytes(dtype)), out_q(1, M * F, M * F, 1), out_scale(1, M * 4, M * 4, 4),
        sums(1, M * 4, M * 4, 4);
    const S8Output out{out_q.at<int8_t>(), out_scale.at<float>(), sums.at<int32_t>()};
    CHECK(!on_fresh_thread([&] { return linear_dynamic(k.table, M, x.args(), w, {y.at(), dtype}); }), "memory");
    CHECK_SAME("y of float rows", y.at<char>(), want.data(), bytes);
    CHECK(!on_fresh_thread([&] { return linear_s8(k.table, M, rows, w, {y.at(), dtype}); }), "memory");
    CHECK_SAME("y of int8 rows", y.at<char>(), want.data(), bytes);
    CHECK(y.intact(), "writes outside y");
    for (int form = 0; form < 2; ++form) {
      const char* error = on_fresh_thread([&] {
        return form ? linear_quantize(k.table, M, rows, w, dtype, out) : linear_quantize(k.table, M, x.args(), w, dtype, out);
      });
      CHECK(!error && out_q.intact() && out_scale.intact() && sums.intact(), "writes outside its rows");
      for (int64_t m = 0; m < M; ++m) {
        std::vector<float> values;
        for (int64_t i = 0; i < F; ++i) values.push_back(load_float(want.data(), dtype, m * F + i));
        const QuantizedRow row = quantize_row(values.data(), F, nullptr);
        CHECK_SAME("q", out.q + m * F, row.q.data(), F);
        CHECK_SAME("scale", out.scale + m, &row.scale, 1);
        CHECK_SAME("row_sum", out.row_sum + m, &row.row_sum, 1);
      }
    }
  }
}

TERSOR_TEST(glu_every_shape) {
  Random random(options.seed + 4);
  int64_t i = 0;
  for (int64_t M : {1, 2, 3, 5, 8, 9, 30, 70}) {
    for (int64_t F : {16, 48, 208}) {
      for (Dtype dtype : kFloatDtypes) {
        check_glu(M, F, 37, dtype, kWidths[i % 4], kActivations[static_cast<size_t>(i) % std::size(kActivations)], 1, random);
        ++i;
      }
    }
  }
  check_glu(1, 6416, 9, Dtype::f32, 8, Activation::silu, 1, random);  // more tiles than one row takes at once
}

TERSOR_TEST(glu_split_over_threads) {
  Random random(options.seed + 5);
  for (int64_t threads : kThreads) {
    for (int64_t M : {1, 20, 150}) check_glu(M, 400, 600, Dtype::f32, 8, Activation::silu, threads, random);
  }
}

}  // namespace
}  // namespace tersor::test
