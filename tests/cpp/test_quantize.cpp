// quantize_x and widen_x against the formula, class I: every bit.
#include <cfloat>
#include <functional>

#include "problem.h"

namespace tersor::test {
namespace {

constexpr int64_t kSizes[] = {1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 257, 1023};

// Kinds of rows. The name says what value(k) is about; rows of 16-bit dtypes hold what survives the rounding.
struct Kind {
  const char* name;
  std::function<float(Random&, int64_t k, int64_t K)> value;
};

const std::vector<Kind>& kinds() {
  static const float below = std::nextafter(0x1p-100f, 0.0f), above = std::nextafter(0x1p-100f, 1.0f);
  static const auto any_finite = [](Random& r) {
    float f;
    do {
      const auto bits = static_cast<uint32_t>(r.bits());
      std::memcpy(&f, &bits, 4);
    } while (!std::isfinite(f));
    return f;
  };
  static const std::vector<Kind> list = {
      {"random", [](Random& r, int64_t, int64_t) { return r.normal(); }},
      {"small", [](Random& r, int64_t, int64_t) { return r.normal() * 1e-3f; }},
      // absmax 127: inv is 1, every half is a tie
      {"ties", [](Random& r, int64_t k, int64_t) { return k == 0 ? 127.0f : static_cast<float>(r.between(-253, 253)) / 2; }},
      // absmax 254: inv is 1/2, odd integers are ties
      {"odd integers",
       [](Random& r, int64_t k, int64_t K) { return k == K - 1 ? -254.0f : static_cast<float>(r.between(-127, 126) * 2 + 1); }},
      // next to a tie on either side
      {"near ties",
       [](Random& r, int64_t k, int64_t) {
         const float half = static_cast<float>(r.between(-126, 125)) + 0.5f;
         return k == 0 ? 127.0f : std::nextafter(half, r.coin() ? 1e9f : -1e9f);
       }},
      {"zero", [](Random& r, int64_t, int64_t) { return r.coin() ? 0.0f : -0.0f; }},
      {"denormal", [](Random& r, int64_t, int64_t) { return static_cast<float>(r.between(-8000000, 8000000)) * 0x1p-149f; }},
      {"denormal beside 1",
       [](Random& r, int64_t k, int64_t) { return k == 0 ? 1.0f : static_cast<float>(r.between(-9, 9)) * 0x1p-149f; }},
      {"absmax below 2^-100", [](Random& r, int64_t k, int64_t) { return k == 0 ? below : below * r.normal() * 0.1f; }},
      {"absmax 2^-100", [](Random& r, int64_t k, int64_t K) { return k == K - 1 ? -0x1p-100f : 0x1p-102f * r.normal(); }},
      {"absmax above 2^-100", [](Random& r, int64_t k, int64_t) { return k == 0 ? -above : 0x1p-102f * r.normal(); }},
      {"near FLT_MAX",
       [](Random& r, int64_t, int64_t) { return (r.coin() ? 1 : -1) * FLT_MAX * static_cast<float>(1 - 0.01 * r.unit()); }},
      {"half overflow",
       [](Random& r, int64_t, int64_t) { return (r.coin() ? 1 : -1) * 65504.0f * static_cast<float>(1 - 0.01 * r.unit()); }},
      {"extremes", [](Random& r, int64_t, int64_t) { return r.coin() ? 2.5f : -2.5f; }},
      {"one hot", [](Random&, int64_t k, int64_t K) { return k == K / 3 ? -3.0f : 0.0f; }},
      {"any bits", [](Random& r, int64_t, int64_t) { return any_finite(r); }},
      {"one NaN", [](Random& r, int64_t k, int64_t K) { return k == K / 2 ? std::nanf("") : r.normal(); }},
      {"one inf", [](Random& r, int64_t k, int64_t K) { return k == K - 1 ? HUGE_VALF : r.normal(); }},
      {"one -inf", [](Random& r, int64_t k, int64_t) { return k == 0 ? -HUGE_VALF : r.normal(); }},
  };
  return list;
}

// Runs the entry on x [M][ldx] and compares every row with the oracle.
void check_rows(const Kernels& kernels, const FloatRows& x, const float* absmax, int64_t ldq, const float* input_scale = nullptr) {
  Canvas q(x.M, x.K, ldq, 1), scale(1, x.M * 4, x.M * 4, 4), row_sum(1, x.M * 4, x.M * 4, 4);
  kernels.table.quantize_x.run({{x.origin, x.dtype, x.stride_m},
                                x.M,
                                x.K,
                                absmax,
                                q.at<int8_t>(),
                                ldq,
                                scale.at<float>(),
                                row_sum.at<int32_t>(),
                                input_scale});
  for (int64_t m = 0; m < x.M; ++m) {
    const QuantizedRow want = quantize_row(x.row(m), x.K, absmax ? absmax + m : nullptr, input_scale);
    CHECK_SAME("q", q.at<int8_t>(m), want.q.data(), x.K);
    CHECK_SAME("row_sum", row_sum.at<int32_t>() + m, &want.row_sum, 1);
    CHECK_SAME("scale", scale.at<float>() + m, &want.scale, 1);
  }
  CHECK(q.intact() && scale.intact() && row_sum.intact(), "writes outside q, scale or row_sum");
}

}  // namespace

TERSOR_TEST(quantize_rows_of_every_kind) {
  const auto count = static_cast<int64_t>(kinds().size());
  for (int64_t K : kSizes) {
    for (Dtype dtype : kFloatDtypes) {
      // One call holds a row of every kind: the poisoned ones must not touch their neighbours.
      Random random(options.seed + static_cast<uint64_t>(K));
      auto value = [&](int64_t m, int64_t k) { return kinds()[static_cast<size_t>(m)].value(random, k, K); };
      const FloatRows packed(count, K, dtype, K, 1, value), padded(count, K, dtype, K + 3, 1, value);
      const FloatRows expanded(4, K, dtype, 0, 1, [&](int64_t, int64_t) { return random.normal(); });
      for (const Kernels& k : runnable()) {
        set_case("%s K=%lld %s", k.table.isa, static_cast<long long>(K), dtype_name(dtype));
        check_rows(k, packed, nullptr, K);
        check_rows(k, padded, nullptr, K + 13);
        check_rows(k, expanded, nullptr, K + 1);
      }
    }
  }
}

TERSOR_TEST(quantize_with_a_given_absmax) {
  // Saturating, exact, larger than the row, tiny, zero, NaN, inf.
  const std::vector<float> given = {0.5f, 1.0f,          100.0f,    0x1p-100f, std::nextafter(0x1p-100f, 0.0f),
                                    0.0f, std::nanf(""), HUGE_VALF, FLT_MAX,   0.01f};
  const auto M = static_cast<int64_t>(given.size());
  const Exact<float> absmax(given);
  for (int64_t K : kSizes) {
    for (Dtype dtype : kFloatDtypes) {
      Random random(options.seed + static_cast<uint64_t>(K));
      const FloatRows plain(M, K, dtype, K, 1, [&](int64_t, int64_t) { return 4 * random.normal(); });
      // Products with inv beyond the float range; a NaN or inf that the given absmax does not know of (in the last row).
      const FloatRows wild(M, K, dtype, K + 1, 1, [&](int64_t m, int64_t k) {
        if (m == M - 1 && k == K - 1) return random.coin() ? HUGE_VALF : std::nanf("");
        return (random.coin() ? 1 : -1) * (dtype == Dtype::f16 ? 65504.0f : dtype == Dtype::bf16 ? 3e38f : FLT_MAX);
      });
      for (const Kernels& k : runnable()) {
        set_case("%s K=%lld %s", k.table.isa, static_cast<long long>(K), dtype_name(dtype));
        check_rows(k, plain, absmax.data(), K);
        check_rows(k, wild, absmax.data(), K + 5);
      }
    }
  }
}

TERSOR_TEST(quantize_with_one_scale) {
  const auto count = static_cast<int64_t>(kinds().size());
  // Saturating, usual, coarse, tiny, zero, NaN, inf; a sign does not count.
  for (float scale :
       {0.001f, 0.02f, -0.02f, 1.0f, 1e30f, 0x1p-100f, std::nextafter(0x1p-100f, 0.0f), 0.0f, std::nanf(""), HUGE_VALF}) {
    const Exact<float> input_scale(std::vector<float>{scale});
    for (int64_t K : {1, 4, 17, 65, 1023}) {
      for (Dtype dtype : kFloatDtypes) {
        Random random(options.seed + static_cast<uint64_t>(K));
        auto value = [&](int64_t m, int64_t k) { return kinds()[static_cast<size_t>(m)].value(random, k, K); };
        const FloatRows packed(count, K, dtype, K, 1, value);
        for (const Kernels& k : runnable()) {
          set_case("%s K=%lld %s scale %g", k.table.isa, static_cast<long long>(K), dtype_name(dtype), static_cast<double>(scale));
          check_rows(k, packed, nullptr, K + 3, input_scale.data());
        }
      }
    }
  }
}

// A NaN is found wherever it stands: in each unrolled part, the vector part and the tail.
TERSOR_TEST(quantize_finds_nan_at_every_k) {
  for (int64_t K : {1, 5, 16, 65, 131}) {
    for (Dtype dtype : kFloatDtypes) {
      Random random(options.seed);
      for (float poison : {std::nanf(""), -std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
        // Row 2 k is clean, row 2 k + 1 poisoned at k.
        const FloatRows x(2 * K, K, dtype, K, 1, [&](int64_t m, int64_t k) { return m == 2 * k + 1 ? poison : random.normal(); });
        for (const Kernels& k : runnable()) {
          set_case("%s K=%lld %s %g", k.table.isa, static_cast<long long>(K), dtype_name(dtype), static_cast<double>(poison));
          check_rows(k, x, nullptr, K);
          const float input_scale = 0.03f;
          check_rows(k, x, nullptr, K, &input_scale);
        }
      }
    }
  }
}

TERSOR_TEST(quantize_nothing) {
  for (const Kernels& k : runnable()) {
    set_case("%s M=0", k.table.isa);
    const float x = 1;
    Canvas q(1, 0, 0), scale(1, 0, 0), row_sum(1, 0, 0);
    k.table.quantize_x.run({{&x, Dtype::f32, 1}, 0, 1, nullptr, q.at<int8_t>(), 1, scale.at<float>(), row_sum.at<int32_t>()});
    CHECK(q.intact() && scale.intact() && row_sum.intact(), "writes something");
  }
}

TERSOR_TEST(widen_every_16_bit_float) {
  std::vector<uint16_t> codes(1 << 16);
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint16_t>(i);
  for (Dtype dtype : {Dtype::bf16, Dtype::f16}) {
    std::vector<float> first;
    for (const Kernels& k : runnable()) {
      set_case("%s %s", k.table.isa, dtype_name(dtype));
      std::vector<float> got(codes.size());
      k.table.widen_x.run(codes.data(), dtype, static_cast<int64_t>(codes.size()), got.data());
      for (size_t i = 0; i < codes.size(); ++i) {
        const float want = decode(codes[i], half_format(dtype));
        CHECK(std::isnan(want) ? std::isnan(got[i]) : std::memcmp(&got[i], &want, 4) == 0, "code 0x%04x is %g, expected %g",
              codes[i], static_cast<double>(got[i]), static_cast<double>(want));
      }
      if (first.empty()) first = got;
      CHECK_SAME("against the best variant", got.data(), first.data(), static_cast<int64_t>(got.size()));
    }
  }
}

TERSOR_TEST(widen_tails) {
  for (Dtype dtype : kFloatDtypes) {
    for (int64_t n = 0; n <= 67; ++n) {
      Random random(options.seed);
      const FloatRows x(1, n ? n : 1, dtype, 0, 1, [&](int64_t, int64_t) { return random.normal(); });
      for (const Kernels& k : runnable()) {
        set_case("%s %s n=%lld", k.table.isa, dtype_name(dtype), static_cast<long long>(n));
        Canvas out(1, n * 4, n * 4, 4);
        k.table.widen_x.run(x.origin, dtype, n, out.at<float>());
        CHECK_SAME("out", out.at<float>(), x.row(0), n);
        CHECK(out.intact(), "writes outside out");
      }
    }
  }
}

}  // namespace tersor::test
