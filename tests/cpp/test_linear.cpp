// The drivers of core/linear.h: strides, dtypes, threads, and that nothing but y is written.
#include "problem.h"

namespace tersor::test {
namespace {

long long ll(int64_t v) { return v; }

constexpr int64_t kThreads[] = {1, 2, 3, 4};  // 4 splits rows and tiles at once

// Small problems stay on one thread; large ones run with each count, and `split` ones must use more than one.
enum class Threading { one, each, split };

struct How {
  Activation activation = Activation::none;
  bool bias = true;
  Dtype bias_dtype = Dtype::f32, y_dtype = Dtype::f32;
};

Activation activation_of(int64_t i) { return kActivations[static_cast<size_t>(i) % std::size(kActivations)]; }

// The value before the activation from accumulators and row scales: the same f32 operations as the kernels'.
std::vector<float> expected_z(const std::vector<int32_t>& acc, const float* scale, const Weights& w, const How& how) {
  std::vector<float> z(acc.size());
  for (size_t i = 0; i < z.size(); ++i) {
    const int64_t m = static_cast<int64_t>(i) / w.N, n = static_cast<int64_t>(i) % w.N;
    const float bias = how.bias ? w.bias_value(how.bias_dtype, n) : 0;
    z[i] = before_activation(acc[i], scale[m], w.scale[n], how.bias ? &bias : nullptr);
  }
  return z;
}

// Compares y with the oracle, and with the bits that the first call on this problem left in `bits`.
void check_result(const Canvas& canvas, const void* y, const std::vector<float>& z, const How& how, std::vector<char>* bits) {
  int64_t bad = 0, at = 0;
  for (size_t i = 0; i < z.size(); ++i) {
    if (!within(y, how.y_dtype, static_cast<int64_t>(i), activate(how.activation, static_cast<double>(z[i]))) && bad++ == 0)
      at = static_cast<int64_t>(i);
  }
  CHECK(bad == 0, "%lld of %zu values are wrong; y[%lld] is %.9g for %.9g", ll(bad), z.size(), ll(at),
        static_cast<double>(load_float(y, how.y_dtype, at)), z.empty() ? 0.0 : static_cast<double>(z[static_cast<size_t>(at)]));
  const auto bytes = static_cast<int64_t>(z.size()) * dtype_bytes(how.y_dtype);
  if (bits->empty()) bits->assign(static_cast<const char*>(y), static_cast<const char*>(y) + bytes);
  CHECK_SAME("bits against the first call's", static_cast<const char*>(y), bits->data(), bytes);
  CHECK(canvas.intact(), "writes outside y");
}

void check_dynamic(const FloatRows& x, const Weights& w, const How& how, const char* layout, Threading threading = Threading::one) {
  std::vector<int8_t> q;
  std::vector<float> scale;
  for (int64_t m = 0; m < x.M; ++m) {
    const QuantizedRow row = quantize_row(x.row(m), x.K, nullptr);
    q.insert(q.end(), row.q.begin(), row.q.end());
    scale.push_back(row.scale);
  }
  const std::vector<float> z = expected_z(matmul(q.data(), x.K, w.w.data(), x.M, w.N, x.K), scale.data(), w, how);
  std::vector<char> bits;
  for (const Kernels& k : runnable()) {
    for (int64_t threads : kThreads) {
      if (threads > 1 && threading == Threading::one) break;
      set_case("%s M=%lld N=%lld K=%lld x %s %s, %s, y %s, bias %s, %lld threads", k.table.isa, ll(x.M), ll(w.N), ll(w.K),
               dtype_name(x.dtype), layout, activation_name(how.activation), dtype_name(how.y_dtype),
               how.bias ? dtype_name(how.bias_dtype) : "none", ll(threads));
      const Threads pool(threads);
      Threads::take_pieces();
      const int64_t bytes = x.M * w.N * dtype_bytes(how.y_dtype);
      Canvas y(1, bytes, bytes, dtype_bytes(how.y_dtype));
      const char* error = on_fresh_thread([&] {
        return linear_dynamic(k.table, x.M, x.args(), w.args(how.activation, how.bias, how.bias_dtype), {y.at(), how.y_dtype});
      });
      CHECK(error == nullptr, "linear_dynamic: %s", error);
      if (threads > 1 && threading == Threading::split) CHECK(Threads::take_pieces() > 1, "does not use the threads");
      check_result(y, y.at(), z, how, &bits);
    }
  }
}

// Sum over k in f32, in any order and with or without fma, is off by at most K kU S, S = sum |x w| (Higham 4.2: K - 1 additions and
// the rounding of a product); the product with weight_scale rounds once, the sum with the bias once. 1 % for second-order terms.
// The activations have slopes within 1.13 (gelu's largest).
void check_weight_only(const FloatRows& x, const Weights& w, const How& how, const char* layout) {
  std::vector<Bounded> want;
  for (int64_t m = 0; m < x.M; ++m) {
    for (int64_t n = 0; n < w.N; ++n) {
      double sum = 0, S = 0;
      for (int64_t k = 0; k < x.K; ++k) {
        const double p = static_cast<double>(x.row(m)[k]) * w.w[static_cast<size_t>(n * x.K + k)];
        sum += p;
        S += std::fabs(p);
      }
      const double scaled = sum * w.scale[n], z = scaled + (how.bias ? w.bias_value(how.bias_dtype, n) : 0.0f);
      const double error = 1.01 * kU * (static_cast<double>(x.K + 1) * S * w.scale[n] + std::fabs(z)) + 0x1p-140;
      Bounded y = activate(how.activation, z);
      y.bound += 1.13 * error;
      // Not finite in, not finite out: which of inf and NaN depends on the order of the sum.
      if (!std::isfinite(S)) y.value = std::nan("");
      want.push_back(y);
    }
  }
  for (const Kernels& k : runnable()) {
    for (int64_t threads : kThreads) {
      set_case("%s M=%lld N=%lld K=%lld x %s %s, %s, y %s, bias %s, %lld threads", k.table.isa, ll(x.M), ll(w.N), ll(w.K),
               dtype_name(x.dtype), layout, activation_name(how.activation), dtype_name(how.y_dtype),
               how.bias ? dtype_name(how.bias_dtype) : "none", ll(threads));
      const Threads pool(threads);
      const int64_t bytes = x.M * w.N * dtype_bytes(how.y_dtype);
      Canvas y(1, bytes, bytes, dtype_bytes(how.y_dtype));
      const char* error = on_fresh_thread([&] {
        return linear_weight_only(k.table, x.M, x.args(), w.args(how.activation, how.bias, how.bias_dtype), {y.at(), how.y_dtype});
      });
      CHECK(error == nullptr, "linear_weight_only: %s", error);
      for (size_t i = 0; i < want.size(); ++i) {
        const float got = load_float(y.at(), how.y_dtype, static_cast<int64_t>(i));
        const bool ok =
            std::isnan(want[i].value) ? !std::isfinite(got) : within(y.at(), how.y_dtype, static_cast<int64_t>(i), want[i]);
        CHECK(ok, "y[%zu] is %.9g, expected %.9g within %.3g", i, static_cast<double>(got), want[i].value, want[i].bound);
      }
      CHECK(y.intact(), "writes outside y");
    }
  }
}

void check_s8(const S8Operand& x, const Weights& w, const How& how, Threading threading = Threading::one) {
  const std::vector<int32_t> acc = matmul(x.q.data(), x.ldq, w.w.data(), x.M, w.N, w.K);
  const std::vector<float> z = expected_z(acc, x.scale.data(), w, how);
  std::vector<char> bits;
  for (const Kernels& k : runnable()) {
    for (int64_t threads : kThreads) {
      if (threads > 1 && threading == Threading::one) break;
      set_case("%s M=%lld N=%lld K=%lld ldq=%lld, %s, y %s, bias %d, %lld threads", k.table.isa, ll(x.M), ll(w.N), ll(w.K),
               ll(x.ldq), activation_name(how.activation), dtype_name(how.y_dtype), how.bias, ll(threads));
      const Threads pool(threads);
      Threads::take_pieces();
      const int64_t bytes = x.M * w.N * dtype_bytes(how.y_dtype);
      Canvas y(1, bytes, bytes, dtype_bytes(how.y_dtype));
      const char* error = on_fresh_thread([&] {
        return linear_s8(k.table, x.M, x.args(), w.args(how.activation, how.bias, how.bias_dtype), {y.at(), how.y_dtype});
      });
      CHECK(error == nullptr, "linear_s8: %s", error);
      if (threads > 1 && threading == Threading::split) CHECK(Threads::take_pieces() > 1, "does not use the threads");
      check_result(y, y.at(), z, how, &bits);

      // Accumulators need neither scales nor bias.
      LinearWeights bare = w.args(Activation::none, false);
      bare.weight_scale = nullptr;
      Canvas sums(1, x.M * w.N * 4, x.M * w.N * 4, 4);
      error = on_fresh_thread(
          [&] { return linear_s8(k.table, x.M, {x.q.data(), x.ldq, nullptr, x.row_sum.data()}, bare, {sums.at(), Dtype::s32}); });
      CHECK(error == nullptr, "linear_s8: %s", error);
      CHECK_SAME("acc", sums.at<int32_t>(), acc.data(), static_cast<int64_t>(acc.size()));
      CHECK(sums.intact(), "writes outside acc");
    }
  }
}

FloatRows random_rows(int64_t M, int64_t K, Dtype dtype, int64_t stride_m, int64_t stride_k, Random& random) {
  return FloatRows(M, K, dtype, stride_m, stride_k,
                   [&](int64_t m, int64_t) { return std::ldexp(random.normal(), static_cast<int>(m % 7) - 3); });
}

}  // namespace

TERSOR_TEST(linear_dynamic_layouts) {
  Random random(options.seed);
  int64_t i = 0;
  for (int64_t M : {1, 4, 13}) {
    for (int64_t K : {1, 15, 16, 41, 130}) {
      const Weights w(37, K, random);
      for (const Layout& layout : layouts(M, K)) {
        for (Dtype dtype : kFloatDtypes) {
          const FloatRows x = random_rows(M, K, dtype, layout.stride_m, layout.stride_k, random);
          const How how{activation_of(i), i % 3 != 0, kFloatDtypes[i % 4 % 3], kFloatDtypes[i % 7 % 3]};
          ++i;
          check_dynamic(x, w, how, layout.name);
          check_weight_only(x, w, how, layout.name);
        }
      }
    }
  }
}

// Large enough to be split: by rows, by tiles, by both, into uneven pieces; more rows than a block takes.
TERSOR_TEST(linear_dynamic_threads) {
  Random random(options.seed);
  struct Size {
    int64_t M, N, K, stride_k;
  };
  int64_t i = 0;
  for (const Size& s :
       {Size{1, 2100, 4099, 1}, {3, 1111, 2600, 2}, {20, 515, 827, 1}, {40, 300, 701, 1}, {67, 333, 401, 3}, {150, 257, 223, 1}}) {
    const Weights w(s.N, s.K, random, 0, kWidths[i % 4]);
    const FloatRows x = random_rows(s.M, s.K, kFloatDtypes[i % 3], s.K * s.stride_k, s.stride_k, random);
    const How how{activation_of(i), true, kFloatDtypes[(i + 1) % 3], kFloatDtypes[(i + 2) % 3]};
    ++i;
    check_dynamic(x, w, how, "large", Threading::split);
  }
}

// A row of the largest K is so long that a block of rows is cut short by the bound on scratch.
TERSOR_TEST(linear_longest_rows) {
  Random random(options.seed);
  const Weights w(3, kMaxK, random);
  for (int64_t stride_k : {1, 2}) {
    check_dynamic(random_rows(37, kMaxK, Dtype::bf16, stride_k * kMaxK, stride_k, random), w, {}, "longest", Threading::split);
  }
  const Weights odd(3, kMaxK - 1, random);
  check_s8(S8Operand(37, odd.K, odd.K, odd.K, random), odd, {}, Threading::split);
}

TERSOR_TEST(linear_dynamic_poison) {
  Random random(options.seed);
  const int64_t M = 11, K = 50;
  const Weights w(37, K, random);
  for (Dtype dtype : kFloatDtypes) {
    for (Activation a : kActivations) {
      for (float poison : {std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
        const FloatRows x(M, K, dtype, K, 1,
                          [&](int64_t m, int64_t k) { return m % 4 == 2 && k == 3 * m ? poison : random.normal(); });
        check_dynamic(x, w, {a, true, Dtype::f32, dtype}, "poisoned");
        check_weight_only(x, w, {a == Activation::none ? a : Activation::none, true, Dtype::f32, dtype}, "poisoned");
      }
    }
  }
}

// Rows of exactly K bytes, also where K is no multiple of the k step; padded rows; one row seen M times.
TERSOR_TEST(linear_s8_layouts) {
  Random random(options.seed);
  int64_t i = 0;
  for (int64_t K : {1, 2, 3, 4, 5, 16, 17, 63, 64, 66, 131}) {
    for (int64_t M : {1, 2, 3, 8, 9, 17}) {
      const Weights w(K % 2 ? 37 : 48, K, random, i % 2, kWidths[i % 5 % 4]);
      for (int64_t ldq : {K, K + 1, K + 7, int64_t{0}}) {
        const How how{activation_of(i), i % 3 != 0, kFloatDtypes[i % 4 % 3], kFloatDtypes[i % 7 % 3]};
        ++i;
        check_s8(S8Operand(M, K, ldq, K, random), w, how);
      }
    }
  }
}

TERSOR_TEST(linear_s8_threads) {
  Random random(options.seed);
  struct Size {
    int64_t M, N, K;
  };
  int64_t i = 0;
  for (const Size& s : {Size{1, 2100, 4099}, {5, 1111, 1600}, {40, 300, 701}, {67, 333, 404}, {150, 257, 223}}) {
    const Weights w(s.N, s.K, random, 0, kWidths[i % 4]);
    const How how{activation_of(i), true, kFloatDtypes[(i + 1) % 3], kFloatDtypes[(i + 2) % 3]};
    ++i;
    check_s8(S8Operand(s.M, s.K, s.K + 3, s.K, random), w, how, Threading::split);
  }
}

TERSOR_TEST(linear_weight_only_shapes) {
  Random random(options.seed);
  int64_t i = 0;
  for (int64_t M : {1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 19, 25, 33}) {
    for (int64_t N : {1, 15, 16, 17, 32, 33, 48, 67}) {
      for (int64_t K : {1, 3, 4, 127, 128, 129, 255, 259}) {
        if ((M + N + K) % 3 != 0 && M > 13) continue;  // one in three of the large ones is enough
        const Weights w(N, K, random);
        const FloatRows x = random_rows(M, K, kFloatDtypes[i % 3], K + i % 2, 1, random);
        const How how{activation_of(i), i % 2 == 0, kFloatDtypes[i % 4 % 3], kFloatDtypes[i % 7 % 3]};
        ++i;
        check_weight_only(x, w, how, "shapes");
      }
    }
  }
  const Weights wide(515, 827, random);
  check_weight_only(random_rows(3, 827, Dtype::f16, 827 * 2, 2, random), wide, {Activation::gelu, true, Dtype::bf16, Dtype::bf16},
                    "large");
  check_weight_only(random_rows(70, 827, Dtype::f32, 829, 1, random), wide, {Activation::silu, true, Dtype::f32, Dtype::f32},
                    "large");
}

TERSOR_TEST(quantize_rows_layouts_and_threads) {
  Random random(options.seed);
  struct Size {
    int64_t M, K;
  };
  for (const Size& s : {Size{1, 7}, {5, 33}, {9, 64}, {100, 1337}, {3, 50001}}) {
    for (const Layout& layout : layouts(s.M, s.K)) {
      for (Dtype dtype : kFloatDtypes) {
        const bool large = s.M * s.K > 65536;
        if (large && dtype == Dtype::bf16) continue;
        const FloatRows x = random_rows(s.M, s.K, dtype, layout.stride_m, layout.stride_k, random);
        Exact<float> absmax(s.M);
        for (int64_t m = 0; m < s.M; ++m) absmax[m] = m % 5 == 4 ? std::nanf("") : std::fabs(random.normal());
        for (const float* given : {static_cast<const float*>(nullptr), static_cast<const float*>(absmax.data())}) {
          std::vector<QuantizedRow> want;
          for (int64_t m = 0; m < s.M; ++m) want.push_back(quantize_row(x.row(m), s.K, given ? given + m : nullptr));
          for (const Kernels& k : runnable()) {
            for (int64_t threads : kThreads) {
              set_case("%s M=%lld K=%lld %s %s%s, %lld threads", k.table.isa, ll(s.M), ll(s.K), dtype_name(dtype), layout.name,
                       given ? " given absmax" : "", ll(threads));
              const Threads pool(threads);
              Threads::take_pieces();
              Canvas q(1, s.M * s.K, s.M * s.K, 1), scale(1, s.M * 4, s.M * 4, 4), row_sum(1, s.M * 4, s.M * 4, 4);
              const char* error = on_fresh_thread([&] {
                return quantize_rows(k.table, s.M, s.K, x.args(), given, nullptr, q.at<int8_t>(), scale.at<float>(),
                                     row_sum.at<int32_t>());
              });
              CHECK(error == nullptr, "quantize_rows: %s", error);
              if (large && threads > 1)
                CHECK(Threads::take_pieces() >= (s.M < threads ? s.M : threads), "does not use the threads");
              for (int64_t m = 0; m < s.M; ++m) {
                const QuantizedRow& row = want[static_cast<size_t>(m)];
                CHECK_SAME("q", q.at<int8_t>() + m * s.K, row.q.data(), s.K);
                CHECK_SAME("scale", scale.at<float>() + m, &row.scale, 1);
                CHECK_SAME("row_sum", row_sum.at<int32_t>() + m, &row.row_sum, 1);
              }
              CHECK(q.intact() && scale.intact() && row_sum.intact(), "writes outside its results");
            }
          }
        }
      }
    }
  }
}

// Stores past the caches write the same bits, and are taken only where every vector of y is aligned.
TERSOR_TEST(linear_streams_the_same_bits) {
  for (int64_t N : {16, 48, 80, 100, 192}) {
    for (int64_t M : {1, 9, 70}) {
      Random random(options.seed + static_cast<uint64_t>(N * M));
      const Weights w(N, 37, random);
      const FloatRows x = random_rows(M, 37, Dtype::f32, 37, 1, random);
      const S8Operand s8(M, 37, 37, 37, random);
      for (const Kernels& k : runnable()) {
        KernelTable stored = k.table, streamed = k.table;
        stored.stream_bytes = 0;
        streamed.stream_bytes = 1;
        for (Activation activation : {Activation::none, Activation::relu, Activation::gelu}) {
          for (int64_t threads : kThreads) {
            for (int64_t offset : {0, 4, 32}) {
              set_case("%s M=%lld N=%lld %s, %lld threads, y at %lld", k.table.isa, ll(M), ll(N), activation_name(activation),
                       ll(threads), ll(offset));
              const Threads pool(threads);
              const LinearWeights args = w.args(activation, true);
              const size_t bytes = static_cast<size_t>(M * N * 4);
              std::vector<char> a(bytes + 256, 1), b(bytes + 256, 1);
              auto at = [&](std::vector<char>& v) {
                const auto p = reinterpret_cast<uintptr_t>(v.data());
                return v.data() + ((p + 63) / 64 * 64 - p) + 64 + offset;
              };
              for (bool dynamic : {true, false}) {
                const Output ya{at(a), Dtype::f32}, yb{at(b), Dtype::f32};
                if (dynamic) {
                  CHECK(!linear_dynamic(stored, M, x.args(), args, ya) && !linear_dynamic(streamed, M, x.args(), args, yb),
                        "error");
                } else {
                  CHECK(!linear_s8(stored, M, s8.args(), args, ya) && !linear_s8(streamed, M, s8.args(), args, yb), "error");
                }
                CHECK(std::memcmp(at(a), at(b), bytes) == 0, "other bits");
                CHECK(at(b)[-1] == 1, "writes before y");
                CHECK(at(b)[bytes] == 1, "writes past y");
              }
            }
          }
        }
      }
    }
  }
}

TERSOR_TEST(linear_of_nothing) {
  Random random(options.seed);
  const Weights w(5, 9, random);
  const FloatRows x = random_rows(1, 9, Dtype::f32, 9, 1, random);
  const S8Operand s8(1, 9, 9, 9, random);
  LinearWeights none = w.args(Activation::none, true);
  none.N = 0;
  for (const Kernels& k : runnable()) {
    set_case("%s", k.table.isa);
    Canvas y(1, 0, 0);
    CHECK(!linear_dynamic(k.table, 0, x.args(), w.args(Activation::none, true), {y.at(), Dtype::f32}), "M=0");
    CHECK(!linear_dynamic(k.table, 1, x.args(), none, {y.at(), Dtype::f32}), "N=0");
    CHECK(!linear_s8(k.table, 0, s8.args(), w.args(Activation::none, true), {y.at(), Dtype::f32}), "M=0");
    CHECK(!linear_s8(k.table, 1, s8.args(), none, {y.at(), Dtype::f32}), "N=0");
    CHECK(!linear_weight_only(k.table, 0, x.args(), w.args(Activation::none, true), {y.at(), Dtype::f32}), "M=0");
    CHECK(!linear_weight_only(k.table, 1, x.args(), none, {y.at(), Dtype::f32}), "N=0");
    CHECK(!quantize_rows(k.table, 0, 9, x.args(), nullptr, nullptr, y.at<int8_t>(), y.at<float>(), y.at<int32_t>()), "M=0");
    CHECK(y.intact(), "writes something");
  }
}

// ---- differential fuzz --------------------------------------------------------------------------------------------------------

// Case i is drawn from seed + i alone: `--only fuzz --fuzz 1 --seed <printed seed>` runs a failed one again.
TERSOR_TEST(fuzz_all_variants) {
  for (int64_t i = 0; i < options.fuzz; ++i) {
    const uint64_t seed = options.seed + static_cast<uint64_t>(i);
    set_seed(seed);
    Random random(seed);
    const int64_t M = random.between(1, random.coin() ? 9 : 70), N = random.between(1, 130), K = random.between(1, 300);
    const Weights w(N, K, random, random.pick({0, 1, 16, 32}), kWidths[random.between(0, 3)]);
    const std::vector<Layout> all = layouts(M, K);
    const Layout layout = all[static_cast<size_t>(random.between(0, static_cast<int64_t>(all.size()) - 1))];
    const Dtype dtype = kFloatDtypes[random.between(0, 2)];
    const int spread = static_cast<int>(random.between(0, 30));
    const FloatRows x(M, K, dtype, layout.stride_m, layout.stride_k,
                      [&](int64_t, int64_t) { return std::ldexp(random.normal(), static_cast<int>(random.between(-spread, 4))); });
    const How how{activation_of(random.between(0, 99)), random.coin(), kFloatDtypes[random.between(0, 2)],
                  kFloatDtypes[random.between(0, 2)]};
    check_dynamic(x, w, how, layout.name);
    check_s8(S8Operand(M, K, random.pick({K, K + random.between(1, 70)}), K, random), w, how);
    if (w.bits == 8) check_weight_only(x, w, how, layout.name);
  }
}

}  // namespace tersor::test
