// AVX2 with the 256-bit VNNI of client CPUs: vpdpbusd adds four products of u8 and s8 to each lane, without saturation.
#pragma once

#define TERSOR_ISA_EXTENDED
#include "isa_avx2.h"

// A test build runs the EVEX form of the instruction, on CPUs that have AVX-512 but not this one.
#ifdef TERSOR_EVEX_VNNI
#define TERSOR_DPBUSD _mm256_dpbusd_epi32
#else
#define TERSOR_DPBUSD _mm256_dpbusd_avx_epi32
#endif

namespace tersor::TERSOR_ISA {
namespace {

struct Isa : Avx2 {
  static Vi dpbusd(Vi acc, Vi u8, Vi s8) {
    acc = TERSOR_DPBUSD(acc, u8, s8);
    opaque(acc);  // the order of the source keeps every accumulator in a register
    return acc;
  }
  static Vi broadcast(const char* p) {
    int32_t word;
    __builtin_memcpy(&word, p, 4);
    return _mm256_set1_epi32(word);
  }
  static Vi add_s8(Vi acc, Vi packed) { return TERSOR_DPBUSD(acc, _mm256_set1_epi8(1), packed); }

  template <int kBits>
  struct Dot {
    using W = __m256i;
    using X = __m256i;
    static constexpr int kXBytesPerK = 1;
    static constexpr int kPartialSteps = 0;
    static constexpr bool kSigned = false, kPairs = false;
    static W codes(const uint8_t* p, int j) {
      if constexpr (kBits == 8) return load_i(p);
      return _mm256_and_si256(_mm256_srli_epi32(load_i(p), kBits * j), _mm256_set1_epi8((1 << kBits) - 1));
    }
    static X load_x(const char* p) { return broadcast(p); }
    static Vi dot4(Vi acc, W w, X x) { return dpbusd(acc, w, x); }
    static Vi widen(Vi acc) { return acc; }
  };

  // vpdpbusd takes x + 128 as unsigned: sums are too large by 128 times the sum of w.
  struct SignedDot {
    using W = __m256i;
    using X = __m256i;
    static constexpr int kXBytesPerK = 1;
    static constexpr int kSumShift = 7;
    static void prepare(const int8_t* q, int64_t K, char* out) {
      const __m256i sign = _mm256_set1_epi8(-128);
      int64_t k = 0;
      for (; k + 32 <= K; k += 32) store_i(out + k, _mm256_xor_si256(load_i(q + k), sign));
      for (; k < K; ++k) out[k] = static_cast<char>(q[k] ^ -128);
    }
    static void prepare_bytes(const int8_t* q, int64_t K, char* out) { prepare(q, K, out); }
    static W load_w(const uint8_t* p) { return load_i(p); }
    static X load_x(const char* p) { return broadcast(p); }
    static Vi dot4(Vi acc, W w, X x) { return dpbusd(acc, x, w); }
    static Vi dot_bytes(Vi acc, Vi x, Vi w) { return dpbusd(acc, x, w); }
  };

  // 6 rows x 1 tile: 12 accumulators cover the latency of 5 cycles on two ports; 2 vectors of codes, one of x.
  static constexpr int kMaxRows = 6;
  static constexpr int max_tiles(int rows) { return rows <= 2 ? 2 : 1; }
  static constexpr int acc_sets(int rows, int) { return rows == 1 ? 2 : 1; }
  static constexpr int kSparseMaxRows = 6;
  static constexpr int sparse_sets(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
};

}  // namespace
}  // namespace tersor::TERSOR_ISA
