// Operands of the tests, in exact buffers, and the calls that run a table entry or a driver on them.
#pragma once

#include <atomic>
#include <thread>

#include "check.h"
#include "linear.h"
#include "oracle.h"
#include "parallel.h"

namespace tersor::test {

inline constexpr Dtype kFloatDtypes[] = {Dtype::f32, Dtype::bf16, Dtype::f16};

// The values that codes of a width stand for.
inline constexpr int kWidths[] = {8, 4, 2, 1};
inline int lowest(int bits) { return bits == 8 ? -128 : bits == 4 ? -8 : -1; }
inline int highest(int bits) { return bits == 8 ? 127 : bits == 4 ? 7 : 1; }

// Random weights with their packed tiles, scales and bias. Every third channel holds the extremes only.
struct Weights {
  int64_t N, K;
  int bits;
  std::vector<int8_t> w;  // [N][K]
  Exact<uint8_t> packed;
  Exact<float> scale, bias;
  Exact<uint16_t> bias_bf16, bias_f16;

  Weights(int64_t n, int64_t k, Random& random, int64_t offset = 0, int width = 8)
      : N(n), K(k), bits(width), w(static_cast<size_t>(n * k)), scale(n), bias(n), bias_bf16(n), bias_f16(n) {
    for (int64_t i = 0; i < N * K; ++i) {
      const bool extreme = bits == 1 || i / K % 3 == 2;
      const int64_t end = random.coin() ? highest(bits) : lowest(bits);
      w[static_cast<size_t>(i)] = static_cast<int8_t>(extreme ? end : random.between(lowest(bits), highest(bits)));
    }
    packed = Exact<uint8_t>(pack(w, N, K, bits), offset);
    for (int64_t i = 0; i < N; ++i) {
      scale[i] = static_cast<float>(0.001 + 0.02 * random.unit());
      bias[i] = 3.0f * random.normal();
      bias_bf16[i] = encode(bias[i], kBf16);
      bias_f16[i] = encode(bias[i], kF16);
    }
  }
  // f32 value of the bias as the kernels see it.
  float bias_value(Dtype t, int64_t n) const {
    return t == Dtype::f32 ? bias[n] : t == Dtype::bf16 ? decode(bias_bf16[n], kBf16) : decode(bias_f16[n], kF16);
  }
  LinearWeights args(Activation activation, bool with_bias, Dtype bias_dtype = Dtype::f32) const {
    const void* b = bias_dtype == Dtype::f32    ? static_cast<const void*>(bias.data())
                    : bias_dtype == Dtype::bf16 ? bias_bf16.data()
                                                : bias_f16.data();
    return {N, K, packed.data(), scale.data(), nullptr, with_bias ? b : nullptr, bias_dtype, activation, bits};
  }
};

// Random s8 rows with scales; each second row holds +-127 only. `readable` bytes of the last row may be read.
struct S8Operand {
  int64_t M, K, ldq;
  Exact<int8_t> q;
  Exact<float> scale;
  Exact<int32_t> row_sum;

  S8Operand(int64_t m, int64_t k, int64_t ld, int64_t readable, Random& random)
      : M(m), K(k), ldq(ld), q((m - 1) * ld + readable), scale(m), row_sum(m) {
    for (int64_t i = 0; i < q.size(); ++i) q[i] = static_cast<int8_t>(random.between(-128, 127));  // also what stands past a row
    for (int64_t i = 0; i < M; ++i) {
      for (int64_t j = 0; j < K; ++j)
        q[i * ldq + j] = static_cast<int8_t>(i % 2 ? (random.coin() ? 127 : -127) : random.between(-127, 127));
      scale[i] = static_cast<float>(0.002 + 0.02 * random.unit());
    }
    sum_rows();
  }
  void sum_rows() {
    for (int64_t i = 0; i < M; ++i) {
      row_sum[i] = 0;
      for (int64_t j = 0; j < K; ++j) row_sum[i] += q[i * ldq + j];
    }
  }
  // Rows for a table entry are readable, and 0, up to the next k step, rows for a driver end at K.
  static S8Operand for_entry(int64_t M, int64_t K, int64_t pad, Random& random, int bits = 8) {
    const int64_t whole = round_up(K, tile_k(bits));
    S8Operand x(M, K, whole + pad, whole, random);
    for (int64_t m = 0; m < M; ++m) std::memset(&x.q[m * x.ldq + K], 0, static_cast<size_t>(whole - K));
    return x;
  }
  S8Rows args() const { return {q.data(), ldq, scale.data(), row_sum.data()}; }
};

inline const IntGemm& gemm_of(const Kernels& k, int bits) {
  return bits == 8 ? k.table.gemm_w8 : bits == 4 ? k.table.gemm_w4 : bits == 2 ? k.table.gemm_w2 : k.table.gemm_w1;
}

// The GEMM of the width over the rectangle [m0, m1) x [t0, t1) with scratch of the size that the table states and not a byte more.
inline void run_gemm(const Kernels& k, const S8Operand& x, const Weights& w, Activation activation, const float* bias, void* y,
                     Dtype dtype, int64_t ldy, int64_t m0, int64_t m1, int64_t t0, int64_t t1) {
  const bool s32 = dtype == Dtype::s32;
  const int64_t bytes = (m1 - m0) * gemm_of(k, w.bits).row_scratch(w.K) + gemm_of(k, w.bits).panel_scratch(w.K);
  Canvas scratch(1, bytes, bytes);
  const GemmArgs args{w.N,
                      w.K,
                      x.q.data(),
                      x.ldq,
                      s32 ? nullptr : x.scale.data(),
                      x.row_sum.data(),
                      w.packed.data(),
                      s32 ? nullptr : w.scale.data(),
                      bias,
                      activation,
                      y,
                      dtype,
                      ldy};
  gemm_of(k, w.bits).run(args, {m0, m1, t0, t1, scratch.at()});
  CHECK(scratch.intact(), "the kernel leaves its scratch");
}

inline void run_gemm(const Kernels& k, const S8Operand& x, const Weights& w, Activation activation, const float* bias, void* y,
                     Dtype dtype, int64_t ldy) {
  run_gemm(k, x, w, activation, bias, y, dtype, ldy, 0, x.M, 0, ceil_div(w.N, kTileN));
}

// Float rows of any strides: element (m, k) at data + m * stride_m + k * stride_k, of which exactly the elements between the lowest
// and the highest address exist. What lies between the rows is NaN.
struct FloatRows {
  int64_t M, K;
  Dtype dtype;
  int64_t stride_m, stride_k;
  Exact<char> memory;
  char* origin;
  std::vector<float> values;  // [M][K], as the kernels see them

  template <typename Value>
  FloatRows(int64_t m, int64_t k, Dtype t, int64_t sm, int64_t sk, Value value) : M(m), K(k), dtype(t), stride_m(sm), stride_k(sk) {
    const int64_t reach_m = (M - 1) * stride_m, reach_k = (K - 1) * stride_k;
    const int64_t low = (reach_m < 0 ? reach_m : 0) + (reach_k < 0 ? reach_k : 0);
    const int64_t high = (reach_m > 0 ? reach_m : 0) + (reach_k > 0 ? reach_k : 0);
    memory = Exact<char>((high - low + 1) * dtype_bytes(dtype));
    for (int64_t i = 0; i <= high - low; ++i) store_float(memory.data(), dtype, i, std::nanf(""));
    origin = memory.data() - low * dtype_bytes(dtype);
    values.resize(static_cast<size_t>(M * K));
    for (int64_t i = 0; i < M; ++i) {
      for (int64_t j = 0; j < K; ++j) store_float(origin, dtype, i * stride_m + j * stride_k, value(i, j));
    }
    for (int64_t i = 0; i < M; ++i) {
      for (int64_t j = 0; j < K; ++j)
        values[static_cast<size_t>(i * K + j)] = load_float(origin, dtype, i * stride_m + j * stride_k);
    }
  }
  const float* row(int64_t m) const { return values.data() + m * K; }
  StridedRows args() const { return {origin, dtype, stride_m, stride_k}; }
};

struct Layout {
  const char* name;
  int64_t stride_m, stride_k;
};
inline std::vector<Layout> layouts(int64_t M, int64_t K) {
  return {{"contiguous", K, 1},       {"padded", K + 5, 1},       {"expanded", 0, 1},   {"transposed", 1, M},
          {"every second", 2 * K, 2}, {"expanded, spread", 0, 3}, {"reversed", -K, -1}, {"rows reversed", -(K + 1), 1}};
}

// A driver call on a thread of its own: the scratch of the drivers grows and stays, so that on a used thread a call that asks for
// too little of it would find what an earlier one left, and ASan would see nothing.
template <typename F>
const char* on_fresh_thread(F f) {
  const char* error = nullptr;
  std::thread([&] { error = f(); }).join();
  return error;
}

// Replaces the thread pool: pieces are handed out one by one to `count` threads, as a real pool would.
class Threads {
 public:
  explicit Threads(int64_t count) : saved_(thread_pool) {
    count_ = count;
    thread_pool = {[] { return count_; }, run};
  }
  Threads(const Threads&) = delete;
  ~Threads() { thread_pool = saved_; }
  // Pieces of the parallel regions since the last call, so that a test knows that it did split.
  static int64_t take_pieces() { return std::exchange(pieces_, 0); }

 private:
  static void run(int64_t n, void (*body)(void*, int64_t), void* context) {
    pieces_ += n;
    std::atomic<int64_t> next{0};
    auto work = [&] {
      for (int64_t i = next++; i < n; i = next++) body(context, i);
    };
    std::vector<std::thread> threads;
    for (int64_t i = 1; i < count_; ++i) threads.emplace_back(work);
    work();
    for (auto& t : threads) t.join();
  }
  static inline int64_t count_ = 1, pieces_ = 0;
  ThreadPool saved_;
};

}  // namespace tersor::test
