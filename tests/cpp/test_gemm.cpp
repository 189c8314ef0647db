// The table entries gemm_w8, w4, w2 and w1: int32 accumulators bit for bit against int64 sums, and the fused epilogue.
#include <cfloat>

#include "problem.h"

namespace tersor::test {
namespace {

long long ll(int64_t v) { return v; }

// Accumulators of the whole problem on every variant.
void check_accumulators(const S8Operand& x, const Weights& w, const std::vector<int32_t>& want, int64_t ldy) {
  for (const Kernels& k : runnable()) {
    set_case("%s w%d M=%lld N=%lld K=%lld ldq=%lld ldy=%lld", k.table.isa, w.bits, ll(x.M), ll(w.N), ll(w.K), ll(x.ldq), ll(ldy));
    Canvas y(x.M, w.N * 4, ldy * 4, 4);
    run_gemm(k, x, w, Activation::none, nullptr, y.at(), Dtype::s32, ldy);
    for (int64_t m = 0; m < x.M; ++m) CHECK_SAME("acc", y.at<int32_t>(m), want.data() + m * w.N, w.N);
    CHECK(y.intact(), "writes outside y");
  }
}

}  // namespace

TERSOR_TEST(gemm_s32_shapes) {
  Random random(options.seed);
  for (int64_t N : {1, 15, 16, 17, 31, 33, 47, 48, 49, 63, 64, 65, 80, 97, 131}) {
    for (int64_t K : {1, 2, 3, 4, 5, 7, 12, 13, 15, 16, 17, 20, 31, 33, 63, 64, 65, 127, 257}) {
      const Weights w(N, K, random);
      for (int64_t M = 1; M <= 20; ++M) {
        const S8Operand x = S8Operand::for_entry(M, K, M % 3 * 5, random);
        check_accumulators(x, w, matmul(x.q.data(), x.ldq, w.w.data(), M, N, K), N + M % 4);
      }
    }
  }
}

// Every height and width of a register block, and K around the ends of words, of a turn of the loop and of narrow sums.
TERSOR_TEST(gemm_s32_shapes_of_few_bits) {
  Random random(options.seed);
  for (int bits : {4, 2, 1}) {
    for (int64_t N : {1, 16, 31, 48, 65, 97}) {
      for (int64_t K : {1, 4, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 255, 257, 300}) {
        const Weights w(N, K, random, 0, bits);
        for (int64_t M : {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17}) {
          const S8Operand x = S8Operand::for_entry(M, K, M % 3 * 5, random, bits);
          check_accumulators(x, w, matmul(x.q.data(), x.ldq, w.w.data(), M, N, K), N + M % 4);
        }
      }
    }
  }
}

TERSOR_TEST(gemm_s32_many_rows) {
  Random random(options.seed);
  for (int64_t M : {23, 24, 25, 31, 32, 33, 63, 64, 65, 131}) {
    for (int64_t N : {16, 53, 113}) {
      const Weights w(N, 37, random);
      const S8Operand x = S8Operand::for_entry(M, w.K, 3, random);
      check_accumulators(x, w, matmul(x.q.data(), x.ldq, w.w.data(), M, N, w.K), N);
    }
  }
}

// Several blocks of rows of one height, the last of which may begin within the one before, and K around multiples of 64: what a
// matrix unit multiplies and what it leaves.
TERSOR_TEST(gemm_s32_blocks_of_rows) {
  Random random(options.seed);
  for (int bits : kWidths) {
    for (int64_t K : {63, 64, 67, 127, 128, 220}) {
      for (int64_t N : {16, 32, 53}) {
        const Weights w(N, K, random, K % 2, bits);
        for (int64_t M : {9, 16, 17, 31, 32, 33, 65}) {
          const S8Operand x = S8Operand::for_entry(M, K, M % 3 * 5, random, bits);
          check_accumulators(x, w, matmul(x.q.data(), x.ldq, w.w.data(), M, N, K), N + M % 4);
        }
      }
    }
  }
}

// Codes 255 and 0 against x = +127 and -127 over the longest K there is. At K = 66312 sum(q * code) leaves int32 for the first
// time, at 132104 it passes 2^32; the repaired result fits all the way. Rows and channels: all of one sign, alternating, drawn.
TERSOR_TEST(gemm_s32_extremes) {
  Random random(options.seed);
  auto extreme = [&](int64_t kind, int64_t k, int high, int low) {
    const bool up = kind == 0 ? true : kind == 1 ? false : kind == 2 ? k % 2 == 0 : kind == 3 ? k / 2 % 2 == 0 : random.coin();
    return static_cast<int8_t>(up ? high : low);
  };
  for (const auto& [bits, K] : std::initializer_list<std::pair<int, int64_t>>{
           {8, 4}, {8, 63}, {8, 1024}, {8, 66312}, {8, 132101}, {8, 132104}, {4, 1024}, {4, 132104}, {2, 1029}, {1, 132104}}) {
    Weights w(K > 2000 ? 69 : 133, K, random, 0, bits);
    for (int64_t n = 0; n < w.N; ++n) {
      for (int64_t k = 0; k < K; ++k) w.w[static_cast<size_t>(n * K + k)] = extreme(n % 5, k, highest(bits), lowest(bits));
    }
    w.packed = Exact<uint8_t>(pack(w.w, w.N, K, bits));
    S8Operand x = S8Operand::for_entry(10, K, 0, random, bits);
    for (int64_t m = 0; m < x.M; ++m) {
      for (int64_t k = 0; k < K; ++k) x.q[m * x.ldq + k] = extreme(m % 5, k, 127, -127);
    }
    x.sum_rows();
    const std::vector<int32_t> want = matmul(x.q.data(), x.ldq, w.w.data(), x.M, w.N, K);
    // Narrow for the long ones: a multiply-add of the scalar variant under sanitizers costs nanoseconds.
    const int64_t tiles = K > 2000 ? 2 : ceil_div(w.N, kTileN);
    for (const Kernels& k : runnable()) {
      for (int64_t M : {int64_t{1}, int64_t{3}, x.M}) {
        for (int64_t t0 : {int64_t{0}, ceil_div(w.N, kTileN) - tiles}) {
          set_case("%s w%d M=%lld N=%lld K=%lld t0=%lld", k.table.isa, w.bits, ll(M), ll(w.N), ll(w.K), ll(t0));
          const int64_t n0 = t0 * kTileN, n1 = (t0 + tiles) * kTileN < w.N ? (t0 + tiles) * kTileN : w.N;
          Canvas y(x.M, w.N * 4, w.N * 4);
          run_gemm(k, x, w, Activation::none, nullptr, y.at(), Dtype::s32, w.N, 0, M, t0, t0 + tiles);
          for (int64_t m = 0; m < M; ++m) CHECK_SAME("acc", y.at<int32_t>(m) + n0, want.data() + m * w.N + n0, n1 - n0);
          CHECK(y.intact(), "writes outside y");
        }
      }
    }
  }
}

// A call computes its rectangle and nothing else.
TERSOR_TEST(gemm_s32_rectangles) {
  Random random(options.seed);
  const int64_t N = 151, tiles = ceil_div(N, kTileN);
  const Weights w(N, 37, random);
  const S8Operand x = S8Operand::for_entry(23, w.K, 0, random);
  const std::vector<int32_t> want = matmul(x.q.data(), x.ldq, w.w.data(), x.M, N, w.K);
  for (const Kernels& k : runnable()) {
    for (int i = 0; i < 300; ++i) {
      const int64_t m0 = random.between(0, x.M - 1), m1 = random.between(m0 + 1, x.M);
      const int64_t t0 = random.between(0, tiles - 1), t1 = random.between(t0 + 1, tiles);
      set_case("%s rows %lld..%lld tiles %lld..%lld", k.table.isa, ll(m0), ll(m1), ll(t0), ll(t1));
      const int64_t n0 = t0 * kTileN, n1 = t1 * kTileN < N ? t1 * kTileN : N;
      // The rectangle alone is the result; all else of y is the gap between its rows, or beside them.
      Canvas y(m1 - m0, (n1 - n0) * 4, N * 4, 4);
      run_gemm(k, x, w, Activation::none, nullptr, y.at<int32_t>() - m0 * N - n0, Dtype::s32, N, m0, m1, t0, t1);
      for (int64_t m = m0; m < m1; ++m) CHECK_SAME("acc", y.at<int32_t>(m - m0), want.data() + m * N + n0, n1 - n0);
      CHECK(y.intact(), "writes outside its rectangle");
    }
  }
}

// Codes are read unaligned: safetensors promises 8 bytes at most.
TERSOR_TEST(gemm_s32_weights_at_any_offset) {
  for (int bits : kWidths) {
    for (int64_t offset : {0, 1, 16, 32}) {
      for (int64_t M : {1, 2, 5, 8}) {
        Random random(options.seed);
        const Weights w(70, 93, random, offset, bits);
        const S8Operand x = S8Operand::for_entry(M, w.K, 1, random, bits);
        check_accumulators(x, w, matmul(x.q.data(), x.ldq, w.w.data(), M, w.N, w.K), w.N);
      }
    }
  }
}

// ---- epilogue, class E --------------------------------------------------------------------------------------------------------

namespace {

// y in the three dtypes on every variant: f32 within the bound of the double oracle, the 16-bit ones the rounded f32 exactly, and
// each the same bits as on the best variant.
void check_epilogue(const S8Operand& x, const Weights& w, Activation activation, bool with_bias, int64_t ldy) {
  const std::vector<int32_t> acc = matmul(x.q.data(), x.ldq, w.w.data(), x.M, w.N, w.K);
  const float* bias = with_bias ? w.bias.data() : nullptr;
  std::vector<float> first_f32;
  std::vector<uint16_t> first_half[2];
  for (const Kernels& k : runnable()) {
    set_case("%s %s bias=%d M=%lld N=%lld", k.table.isa, activation_name(activation), with_bias, ll(x.M), ll(w.N));
    std::vector<float> f32;
    {
      Canvas y(x.M, w.N * 4, ldy * 4, 4);
      run_gemm(k, x, w, activation, bias, y.at(), Dtype::f32, ldy);
      for (int64_t m = 0; m < x.M; ++m) {
        for (int64_t n = 0; n < w.N; ++n) {
          const float z =
              before_activation(acc[static_cast<size_t>(m * w.N + n)], x.scale[m], w.scale[n], bias ? bias + n : nullptr);
          const Bounded want = activate(activation, static_cast<double>(z));
          CHECK(within(y.at(m), Dtype::f32, n, want), "y[%lld][%lld] is %.9g for %.9g, expected %.9g within %.3g", ll(m), ll(n),
                static_cast<double>(y.at<float>(m)[n]), static_cast<double>(z), want.value, want.bound);
        }
        f32.insert(f32.end(), y.at<float>(m), y.at<float>(m) + w.N);
      }
      CHECK(y.intact(), "writes outside f32 y");
    }
    if (first_f32.empty()) first_f32 = f32;
    CHECK_SAME("f32 against the best variant", f32.data(), first_f32.data(), static_cast<int64_t>(f32.size()));

    for (Dtype dtype : {Dtype::bf16, Dtype::f16}) {
      Canvas y(x.M, w.N * 2, ldy * 2, 2);
      run_gemm(k, x, w, activation, bias, y.at(), dtype, ldy);
      std::vector<uint16_t> half;
      for (int64_t m = 0; m < x.M; ++m) half.insert(half.end(), y.at<uint16_t>(m), y.at<uint16_t>(m) + w.N);
      CHECK(y.intact(), "writes outside %s y", dtype_name(dtype));
      for (size_t i = 0; i < half.size(); ++i) {
        const uint16_t want = encode(f32[i], half_format(dtype));
        // f16 keeps the sign and payload of a NaN, so that only its being one is compared; bf16 has one NaN.
        const bool nan = dtype == Dtype::f16 && std::isnan(f32[i]);
        CHECK(nan ? std::isnan(decode(half[i], kF16)) : half[i] == want, "%s y %zu is 0x%04x for %.9g, expected 0x%04x",
              dtype_name(dtype), i, half[i], static_cast<double>(f32[i]), want);
      }
      std::vector<uint16_t>& first = first_half[dtype == Dtype::f16];
      if (first.empty()) first = half;
      CHECK_SAME("16 bits against the best variant", half.data(), first.data(), static_cast<int64_t>(half.size()));
    }
  }
}

}  // namespace

TERSOR_TEST(epilogue_tails) {
  for (int64_t N = 1; N <= 68; ++N) {
    for (int64_t M : {1, 2, 5, 9}) {
      Random random(options.seed + static_cast<uint64_t>(N));
      const Weights w(N, 9, random);
      const S8Operand x = S8Operand::for_entry(M, w.K, 0, random);
      for (Activation a : kActivations) {
        for (bool bias : {false, true}) check_epilogue(x, w, a, bias, N + M % 2 * 3);
      }
    }
  }
}

// The activations as functions: accumulators of 0 leave the bias, which sweeps the floats.
TERSOR_TEST(epilogue_sweep) {
  std::vector<float> values = {0.0f,      -0.0f,      HUGE_VALF,     -HUGE_VALF, FLT_MAX,  -FLT_MAX, FLT_MIN,   -FLT_MIN,
                               0x1p-149f, -0x1p-149f, std::nanf(""), 65504.0f,   65519.0f, 65520.0f, -65520.0f, 65536.0f,
                               12.0f,     -12.0f,     -12.00001f,    87.0f,      -87.0f,   88.0f,    -88.0f};
  for (int i = -10000; i <= 10000; ++i) values.push_back(static_cast<float>(i) * 0.011f);
  for (int i = 0; i < 4000; ++i) values.push_back(static_cast<float>(i - 2000) * 0.0005f);
  for (int exponent = -149; exponent <= 127; ++exponent) {
    for (float mantissa : {1.0f, -1.0f, 1.25f, -1.7320508f, 1.9999999f}) values.push_back(std::ldexp(mantissa, exponent));
  }
  // Ties of both 16-bit formats and their neighbours, normal and denormal.
  for (uint16_t code : {0x0000, 0x0001, 0x0002, 0x03fe, 0x03ff, 0x0400, 0x3c00, 0x3c01, 0x7bfe}) {
    for (HalfFormat f : {kF16, kBf16}) {
      const double half = (static_cast<double>(decode(code, f)) + decode(static_cast<uint16_t>(code + 1), f)) / 2;
      const auto tie = static_cast<float>(half);
      for (float v : {tie, std::nextafter(tie, 0.0f), std::nextafter(tie, HUGE_VALF)}) values.insert(values.end(), {v, -v});
    }
  }
  // Quiet NaNs of either sign whose payload a rounding would carry into the exponent.
  for (uint32_t bits : {0x7fffffffu, 0xffffffffu, 0xffc00000u, 0x7fc01234u}) {
    float v;
    std::memcpy(&v, &bits, 4);
    values.push_back(v);
  }
  Random random(options.seed);
  for (int i = 0; i < 4000; ++i) {
    const auto bits = static_cast<uint32_t>(random.bits());
    float v;
    std::memcpy(&v, &bits, 4);
    values.push_back(std::isnan(v) ? 1.0f : v);  // signalling NaN in a bias: nobody promises bits
  }
  Weights w(static_cast<int64_t>(values.size()), 1, random);
  w.bias = Exact<float>(values);
  S8Operand x = S8Operand::for_entry(2, 1, 0, random);
  for (int64_t m = 0; m < x.M; ++m) x.q[m * x.ldq] = 0;
  x.sum_rows();
  for (Activation a : kActivations) check_epilogue(x, w, a, true, w.N);
}

// Real accumulators, from one product to all of K, and scales over many magnitudes; a NaN scale poisons its row and no other.
TERSOR_TEST(epilogue_scales) {
  Random random(options.seed);
  for (int64_t K : {1, 30, 1000}) {
    Weights w(53, K, random);
    S8Operand x = S8Operand::for_entry(7, K, 0, random);
    for (int64_t n = 0; n < w.N; ++n) w.scale[n] = static_cast<float>(std::exp2(40 * random.unit() - 30));
    for (int64_t m = 0; m < x.M; ++m) x.scale[m] = static_cast<float>(std::exp2(60 * random.unit() - 40));
    x.scale[3] = std::nanf("");
    x.scale[5] = 0.0f;
    w.scale[17] = 0.0f;
    for (Activation a : kActivations) {
      for (bool bias : {false, true}) check_epilogue(x, w, a, bias, w.N);
    }
  }
}

// int32 to f32 rounds once, to nearest even: accumulators beyond 2^24.
TERSOR_TEST(epilogue_large_accumulators) {
  Random random(options.seed);
  const int64_t K = 20001;
  Weights w(18, K, random);
  for (size_t i = 0; i < w.w.size(); ++i) w.w[i] = static_cast<int8_t>(random.between(100, 127));
  w.packed = Exact<uint8_t>(pack(w.w, w.N, K, 8));
  S8Operand x = S8Operand::for_entry(3, K, 0, random);
  for (int64_t m = 0; m < x.M; ++m) {
    for (int64_t k = 0; k < K; ++k)
      x.q[m * x.ldq + k] = static_cast<int8_t>(m == 1 ? -random.between(90, 127) : random.between(90, 127));
  }
  x.sum_rows();
  for (bool bias : {false, true}) check_epilogue(x, w, Activation::none, bias, w.N);
}

}  // namespace tersor::test
