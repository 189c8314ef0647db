// Group scales and signs x signs: the drivers against oracles in double, on every variant and thread count.
#include "problem.h"

namespace tersor::test {
namespace {

long long ll(int64_t v) { return v; }

constexpr int64_t kThreads[] = {1, 3, 4};

float normal_value(Random& random, int64_t k) { return std::ldexp(random.normal(), static_cast<int>(k % 3)); }

FloatRows float_rows(int64_t M, int64_t K, Dtype dtype, const Layout& layout, Random& random) {
  return FloatRows(M, K, dtype, layout.stride_m, layout.stride_k, [&](int64_t, int64_t k) { return normal_value(random, k); });
}

template <typename Call>
void on_every_variant(const char* what, int64_t M, int64_t N, int64_t K, Dtype dtype, Call call) {
  for (const Kernels& k : runnable()) {
    for (int64_t threads : kThreads) {
      set_case("%s %s M=%lld N=%lld K=%lld %s, %lld threads", k.table.isa, what, ll(M), ll(N), ll(K), dtype_name(dtype),
               ll(threads));
      const Threads pool(threads);
      const int64_t bytes = M * N * dtype_bytes(dtype);
      Canvas y(1, bytes, bytes, dtype_bytes(dtype));
      const char* error = on_fresh_thread([&] { return call(k.table, Output{y.at(), dtype}); });
      CHECK(error == nullptr, "%s: %s", what, error);
      CHECK(y.intact(), "writes outside y");
    }
  }
}

// ---- groups, class F ------------------------------------------------------------------------------------------------------------

// The sums of a group are exact and below 2^24 here; each product with its scale and each addition rounds once (or together, with
// fma), then scale, weight_scale and bias: (groups + 4) kU of the sum of magnitudes.
void check_grouped(int64_t M, int64_t N, int64_t groups, int64_t group_size, Dtype dtype, const Layout& layout, Random& random) {
  const int64_t K = groups * group_size, tiles = ceil_div(N, kTileN);
  const Weights w(N, K, random, groups % 2, 4);
  Exact<uint8_t> scales(tiles * groups * kGroupScaleBytes);
  std::vector<float> group_scale(static_cast<size_t>(tiles * kTileN * groups));
  for (int64_t i = 0; i < tiles * groups * kTileN; ++i) {
    const uint16_t half = encode(static_cast<float>(0.05 + 0.95 * random.unit()), kF16);
    std::memcpy(scales.data() + 2 * i, &half, 2);
    const int64_t n = i / (groups * kTileN) * kTileN + i % kTileN, g = i / kTileN % groups;
    group_scale[static_cast<size_t>(n * groups + g)] = decode(half, kF16);
  }
  const FloatRows x = float_rows(M, K, dtype, layout, random);
  LinearWeights args = w.args(Activation::relu, true);
  args.group_scale = scales.data();
  args.group_size = group_size;

  std::vector<Bounded> want;
  for (int64_t m = 0; m < M; ++m) {
    const QuantizedRow row = quantize_row(x.row(m), K, nullptr);
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0, magnitude = 0;
      for (int64_t g = 0; g < groups; ++g) {
        int32_t acc = 0;
        for (int64_t k = g * group_size; k < (g + 1) * group_size; ++k) {
          acc += row.q[static_cast<size_t>(k)] * w.w[static_cast<size_t>(n * K + k)];
        }
        const double part = static_cast<double>(acc) * group_scale[static_cast<size_t>(n * groups + g)];
        sum += part;
        magnitude += std::fabs(part);
      }
      const double unit = static_cast<double>(row.scale) * w.scale[n];
      const double z = sum * unit + w.bias[n];
      want.push_back({z > 0 ? z : 0, 1.01 * kU * (static_cast<double>(groups + 4) * magnitude * unit + std::fabs(z))});
    }
  }
  on_every_variant("grouped", M, N, K, dtype, [&](const KernelTable& table, const Output& out) {
    const char* error = linear_dynamic(table, M, x.args(), args, out);
    for (size_t i = 0; i < want.size(); ++i) {
      CHECK(within(out.y, dtype, static_cast<int64_t>(i), want[i]), "y[%zu] is %.9g, expected %.9g within %.3g", i,
            static_cast<double>(load_float(out.y, dtype, static_cast<int64_t>(i))), want[i].value, want[i].bound);
    }
    return error;
  });
}

// ---- signs x signs --------------------------------------------------------------------------------------------------------------

struct SignRow {
  std::vector<int8_t> sign;
  float scale;
};

// The formula of BinarizeArgs, with its order of sums.
SignRow binarize(const float* x, const float* threshold, int64_t K) {
  SignRow row{std::vector<int8_t>(static_cast<size_t>(K)), 0};
  float lanes[64] = {};
  bool finite = true;
  const float share = 1.0f / static_cast<float>(K);
  for (int64_t k = 0; k < K; ++k) {
    finite &= std::isfinite(x[k]);
    row.sign[static_cast<size_t>(k)] = x[k] >= threshold[k] ? 1 : -1;
    lanes[k % 64] += std::fabs(x[k] - threshold[k]) * share;
  }
  for (int i = 0; i < 16; ++i) lanes[i] = (lanes[i] + lanes[i + 16]) + (lanes[i + 32] + lanes[i + 48]);
  for (int half : {8, 4, 2, 1}) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  row.scale = finite ? lanes[0] : std::nanf("");
  return row;
}

// Bits of a row in the order of a 1-bit tile: those of one channel, packed.
std::vector<uint8_t> packed_row(const SignRow& row, int64_t K) {
  const std::vector<uint8_t> tile = pack(row.sign, 1, K, 1);
  std::vector<uint8_t> out;
  for (int64_t word = 0; word < ceil_div(K, 32); ++word) {
    for (int64_t b = 0; b < 4; ++b) {
      out.push_back(std::isnan(row.scale) ? uint8_t{0} : tile[static_cast<size_t>(word * kTileBytes + b)]);
    }
  }
  return out;
}

void check_xnor(const FloatRows& x, const Weights& w, const Exact<float>& threshold) {
  const int64_t M = x.M, N = w.N, K = x.K;
  std::vector<uint8_t> bits;
  std::vector<float> scale, want;
  for (int64_t m = 0; m < M; ++m) {
    const SignRow row = binarize(x.row(m), threshold.data(), K);
    const std::vector<uint8_t> packed = packed_row(row, K);
    bits.insert(bits.end(), packed.begin(), packed.end());
    scale.push_back(row.scale);
    for (int64_t n = 0; n < N; ++n) {
      int32_t acc = 0;
      for (int64_t k = 0; k < K; ++k) acc += row.sign[static_cast<size_t>(k)] * w.w[static_cast<size_t>(n * K + k)];
      want.push_back(before_activation(acc, row.scale, w.scale[n], &w.bias[n]));
    }
  }
  LinearWeights args = w.args(Activation::none, true);
  args.threshold = threshold.data();
  on_every_variant("xnor", M, N, K, x.dtype, [&](const KernelTable& table, const Output& out) {
    const char* error = linear_xnor(table, M, x.args(), args, out);
    for (size_t i = 0; i < want.size(); ++i) {
      CHECK(within(out.y, x.dtype, static_cast<int64_t>(i), {static_cast<double>(want[i]), 0}), "y[%zu] is %.9g, expected %.9g", i,
            static_cast<double>(load_float(out.y, x.dtype, static_cast<int64_t>(i))), static_cast<double>(want[i]));
    }
    return error;
  });
  for (const Kernels& k : runnable()) {
    set_case("%s binarize_rows M=%lld K=%lld %s", k.table.isa, ll(M), ll(K), dtype_name(x.dtype));
    Canvas got(1, static_cast<int64_t>(bits.size()), static_cast<int64_t>(bits.size()));
    Exact<float> got_scale(M);
    const char* error = on_fresh_thread(
        [&] { return binarize_rows(k.table, M, K, x.args(), threshold.data(), got.at<uint8_t>(), got_scale.data()); });
    CHECK(error == nullptr, "binarize_rows: %s", error);
    CHECK_SAME("bits", got.at<uint8_t>(), bits.data(), static_cast<int64_t>(bits.size()));
    for (int64_t m = 0; m < M; ++m) {
      const float s = scale[static_cast<size_t>(m)];
      CHECK(got_scale[m] == s || (std::isnan(got_scale[m]) && std::isnan(s)), "scale[%lld] is %.9g, expected %.9g", ll(m),
            static_cast<double>(got_scale[m]), static_cast<double>(s));
    }
    CHECK(got.intact(), "writes outside bits");
  }
}

Exact<float> thresholds(int64_t K, Random& random) {
  Exact<float> threshold(K);
  for (int64_t k = 0; k < K; ++k) threshold[k] = k % 4 == 0 ? 0.0f : 0.3f * random.normal();
  return threshold;
}

}  // namespace

TERSOR_TEST(grouped_shapes) {
  Random random(options.seed);
  int64_t i = 0;
  for (int64_t group_size : {32, 64, 96, 128}) {
    for (int64_t groups : {1, 2, 5}) {
      for (int64_t N : {1, 17, 37, 66}) {
        for (int64_t M : {1, 2, 3, 4, 5, 6, 7, 13}) {
          const int64_t K = groups * group_size;
          const std::vector<Layout> all = layouts(M, K);
          check_grouped(M, N, groups, group_size, kFloatDtypes[i % 3], all[static_cast<size_t>(i) % all.size()], random);
          ++i;
        }
      }
    }
  }
}

TERSOR_TEST(grouped_split_over_threads) {
  Random random(options.seed);
  check_grouped(3, 700, 20, 64, Dtype::f32, {"contiguous", 1280, 1}, random);
  check_grouped(70, 150, 16, 32, Dtype::bf16, {"contiguous", 512, 1}, random);
}

TERSOR_TEST(xnor_shapes) {
  Random random(options.seed);
  int64_t i = 0;
  for (int64_t K : {1, 2, 31, 32, 33, 63, 64, 65, 100, 128, 333, 1024, 1030}) {  // 31 words fill narrow sums, 33 overflow them
    for (int64_t N : {1, 16, 33, 66}) {
      const Weights w(N, K, random, K % 2, 1);
      const Exact<float> threshold = thresholds(K, random);
      for (int64_t M : {1, 2, 3, 5, 8, 9, 20}) {
        const std::vector<Layout> all = layouts(M, K);
        check_xnor(float_rows(M, K, kFloatDtypes[i % 3], all[static_cast<size_t>(i) % all.size()], random), w, threshold);
        ++i;
      }
    }
  }
}

TERSOR_TEST(xnor_split_over_threads) {
  Random random(options.seed);
  for (int64_t M : {2, 70}) {
    const int64_t K = 2050, N = 2100 / M * 2 + 300;
    const Weights w(N, K, random, 0, 1);
    check_xnor(float_rows(M, K, Dtype::f32, {"contiguous", K, 1}, random), w, thresholds(K, random));
  }
}

// Signs of zero, values at the threshold, NaN and inf anywhere, values that would overflow a plain sum.
TERSOR_TEST(xnor_edges) {
  Random random(options.seed);
  const int64_t K = 130;
  const Weights w(19, K, random, 0, 1);
  const Exact<float> threshold = thresholds(K, random);
  for (Dtype dtype : kFloatDtypes) {
    check_xnor(FloatRows(2, K, dtype, K, 1, [](int64_t m, int64_t) { return m ? 0.0f : -0.0f; }), w,
               Exact<float>(std::vector<float>(K, 0.0f)));
    const float huge = dtype == Dtype::f16 ? 65504.0f : 3e38f;
    check_xnor(FloatRows(2, K, dtype, K, 1, [&](int64_t m, int64_t k) { return m ? huge : k % 2 ? -huge : huge; }), w, threshold);
    for (int64_t at : {int64_t{0}, int64_t{63}, int64_t{64}, K - 1}) {
      for (float odd : {std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
        check_xnor(
            FloatRows(3, K, dtype, K, 1, [&](int64_t m, int64_t k) { return m == 1 && k == at ? odd : normal_value(random, k); }),
            w, threshold);
      }
    }
  }
  check_xnor(FloatRows(1, K, Dtype::f32, K, 1, [&](int64_t, int64_t k) { return threshold[k]; }), w, threshold);
}

}  // namespace tersor::test
