// The vector vocabulary in plain C++: four lanes of 32 bits. It runs everywhere, is what the compiler makes of it, and says once
// what every function of the vocabulary means; the other isa_*.h give the same results bit for bit (muladd excepted, see there).
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/compiler.h"

namespace tersor::TERSOR_ISA {
namespace {

struct Scalar {
  // Whether the variant fills every entry of the table, or only those that gain by what it has beyond the next one.
  static constexpr bool kAllKernels = true;
  static constexpr bool kMatrixUnit = false;  // multiplies tiles of registers, see isa_amx_int8.h
  static constexpr int kLanes = 4;
  struct Vi {
    int32_t v[kLanes];
  };
  struct Vf {
    float v[kLanes];
  };

  template <typename F>
  static Vi each_i(F f) {
    Vi r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = static_cast<int32_t>(f(i));
    return r;
  }
  template <typename F>
  static Vf each_f(F f) {
    Vf r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = f(i);
    return r;
  }
  static uint32_t u(int32_t v) { return static_cast<uint32_t>(v); }

  // Integers wrap modulo 2^32.
  static Vi zero_i() { return set1_i(0); }
  static Vi set1_i(int32_t v) {
    return each_i([=](int) { return v; });
  }
  static Vi load_i(const void* p) {
    Vi r;
    __builtin_memcpy(&r, p, sizeof r);
    return r;
  }
  static void store_i(void* p, Vi v) { __builtin_memcpy(p, &v, sizeof v); }
  static Vi add_i(Vi a, Vi b) {
    return each_i([&](int i) { return u(a.v[i]) + u(b.v[i]); });
  }
  static Vi sub_i(Vi a, Vi b) {
    return each_i([&](int i) { return u(a.v[i]) - u(b.v[i]); });
  }
  static Vi max_i(Vi a, Vi b) {
    return each_i([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static Vi and_i(Vi a, Vi b) {
    return each_i([&](int i) { return a.v[i] & b.v[i]; });
  }
  static Vi xor_i(Vi a, Vi b) {
    return each_i([&](int i) { return a.v[i] ^ b.v[i]; });
  }
  // a > b ? yes : no, lane by lane, signed.
  static Vi select_gt(Vi a, Vi b, Vi yes, Vi no) {
    return each_i([&](int i) { return a.v[i] > b.v[i] ? yes.v[i] : no.v[i]; });
  }
  template <int kBits>
  static Vi shl(Vi a) {
    return each_i([&](int i) { return u(a.v[i]) << kBits; });
  }
  template <int kBits>
  static Vi shr(Vi a) {
    return each_i([&](int i) { return u(a.v[i]) >> kBits; });
  }
  template <int kBits>
  static Vi sar(Vi a) {
    return each_i([&](int i) { return a.v[i] >> kBits; });
  }
  static Vi sar_by(Vi a, int bits) {
    return each_i([&](int i) { return a.v[i] >> bits; });
  }
  static int32_t reduce_add(Vi a) { return static_cast<int32_t>(u(a.v[0]) + u(a.v[1]) + u(a.v[2]) + u(a.v[3])); }
  static int32_t reduce_max(Vi a) {
    int32_t m = a.v[0];
    for (int i = 1; i < kLanes; ++i) m = a.v[i] > m ? a.v[i] : m;
    return m;
  }

  static Vf set1(float v) {
    return each_f([=](int) { return v; });
  }
  static Vf load(const float* p) {
    Vf r;
    __builtin_memcpy(&r, p, sizeof r);
    return r;
  }
  static void store(float* p, Vf v) { __builtin_memcpy(p, &v, sizeof v); }
  // A store past the caches, to an address aligned to the vector; stream_fence() ends a run of them.
  static void stream(float* p, Vf v) { store(p, v); }
  static void stream_fence() {}
  static Vf add(Vf a, Vf b) {
    return each_f([&](int i) { return a.v[i] + b.v[i]; });
  }
  static Vf sub(Vf a, Vf b) {
    return each_f([&](int i) { return a.v[i] - b.v[i]; });
  }
  static Vf mul(Vf a, Vf b) {
    return each_f([&](int i) { return a.v[i] * b.v[i]; });
  }
  static Vf div(Vf a, Vf b) {
    return each_f([&](int i) { return a.v[i] / b.v[i]; });
  }
  // b where either is NaN: put the value whose NaN must survive second.
  static Vf min_(Vf a, Vf b) {
    return each_f([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static Vf max_(Vf a, Vf b) {
    return each_f([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  // a * b + c with one rounding or two, as the ISA likes: for class F only.
  static Vf muladd(Vf a, Vf b, Vf c) { return add(mul(a, b), c); }
  // The lanes in halves: i and i + kLanes / 2 first, at last 0 and 1.
  static float reduce_add(Vf a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
  // a * b + c with one rounding, on every instruction set.
  static Vf fma(Vf a, Vf b, Vf c) {
    return each_f([&](int i) { return round_once(a.v[i], b.v[i], c.v[i]); });
  }
  static Vf to_f32(Vi a) {
    return each_f([&](int i) { return static_cast<float>(a.v[i]); });
  }
  // Bit i: a >= b in lane i; 0 where either is NaN.
  static uint32_t mask_ge(Vf a, Vf b) {
    uint32_t mask = 0;
    for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(a.v[i] >= b.v[i]) << i;
    return mask;
  }
  // Nearest integer, ties to even, for |v| < 2^22; anything for other values. Adding 1.5 * 2^23 leaves the integer in the low bits.
  static Vi round(Vf a) { return sub_i(bits(add(a, set1(12582912.0f))), bits(set1(12582912.0f))); }
  static Vi bits(Vf a) {
    Vi r;
    __builtin_memcpy(&r, &a, sizeof r);
    return r;
  }
  static Vf from_bits(Vi a) {
    Vf r;
    __builtin_memcpy(&r, &a, sizeof r);
    return r;
  }

  // 16-bit values zero-extended; low 16 bits stored.
  static Vi load_u16(const uint16_t* p) {
    return each_i([=](int i) { return p[i]; });
  }
  static void store_u16(uint16_t* p, Vi v) {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint16_t>(v.v[i]);
  }
  // IEEE 754 binary16, exact one way, nearest-even the other; NaN stays NaN.
  static Vf load_f16(const uint16_t* p) {
    return each_f([=](int i) { return half_to_float(p[i]); });
  }
  static void store_f16(uint16_t* p, Vf v) {
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(v.v[i]);
  }
  // The lanes of a, b, c, d, all within [-128, 127], as 4 * kLanes bytes in this order.
  static Vi pack_s8(Vi a, Vi b, Vi c, Vi d) {
    int8_t bytes[4 * kLanes];
    for (int i = 0; i < kLanes; ++i) {
      bytes[i] = static_cast<int8_t>(a.v[i]);
      bytes[kLanes + i] = static_cast<int8_t>(b.v[i]);
      bytes[2 * kLanes + i] = static_cast<int8_t>(c.v[i]);
      bytes[3 * kLanes + i] = static_cast<int8_t>(d.v[i]);
    }
    return load_i(bytes);
  }
  // Adds four of the packed bytes to each lane: which ones is open, the sum of all lanes counts.
  static Vi add_s8(Vi acc, Vi packed) {
    int8_t bytes[4 * kLanes];
    __builtin_memcpy(bytes, &packed, sizeof bytes);
    return each_i(
        [&](int i) { return u(acc.v[i]) + u(bytes[4 * i]) + u(bytes[4 * i + 1]) + u(bytes[4 * i + 2]) + u(bytes[4 * i + 3]); });
  }

  // The dot product: kLanes words of four codes, one word of four s8 broadcast, four products added to each lane.
  //   codes(p, j)   step j of the words at p: (word >> bits * j) & mask, byte by byte
  //   masked(words, j)  the same of words in a register, without the shift (only where kInPlaceRows > 0)
  //   kPartialSteps sums hold so many dot4 before widen() must turn them into 32-bit ones; 0: they are
  //   kSigned       codes() gives w rather than w + 128, and sums are those of w
  //   kPairs        two rows are multiplied at a time, see isa_neon_i8mm.h
  template <int kBits>
  struct Dot {
    using W = Vi;
    struct X {
      int32_t k[4];
    };
    static constexpr int kXBytesPerK = 1;  // bytes a row element takes in the form load_x reads; 1: the s8 row itself
    static constexpr int kPartialSteps = 0;
    static constexpr bool kSigned = false, kPairs = false;
    static W codes(const uint8_t* p, int j) {
      constexpr uint32_t kMask = 0x01010101u * ((1u << kBits) - 1);
      const Vi words = load_i(p);
      return each_i([&](int i) { return u(words.v[i]) >> (kBits * j) & kMask; });
    }
    static X load_x(const char* p) { return {{s8(p[0]), s8(p[1]), s8(p[2]), s8(p[3])}}; }
    static Vi dot4(Vi acc, W w, const X& x) {
      return each_i([&](int i) {
        const uint32_t c = u(w.v[i]);
        const int32_t sum = static_cast<int32_t>(c & 255) * x.k[0] + static_cast<int32_t>(c >> 8 & 255) * x.k[1] +
                            static_cast<int32_t>(c >> 16 & 255) * x.k[2] + static_cast<int32_t>(c >> 24) * x.k[3];
        return u(acc.v[i]) + u(sum);
      });
    }
    static Vi widen(Vi acc) { return acc; }
  };

  // The dot product of sparse weights: s8 words in W, four products added to each lane.
  //
  //   prepare(q, K, out)        an s8 row in the form load_x reads, kXBytesPerK bytes for an element
  //   prepare_bytes(q, K, out)  an s8 row in the form lookup reads
  //   load_w, load_x, dot4      as in Dot
  //   dot_bytes(acc, x, w)      the same of a vector of bytes that lookup gave
  //   kSumShift                 sums are too large by the sum of w << kSumShift; negative: they are right
  struct SignedDot {
    using W = Vi;
    using X = Vi;
    static constexpr int kXBytesPerK = 1;
    static constexpr int kSumShift = -1;
    static void prepare(const int8_t* q, int64_t K, char* out) { __builtin_memcpy(out, q, static_cast<size_t>(K)); }
    static void prepare_bytes(const int8_t* q, int64_t K, char* out) { prepare(q, K, out); }
    static W load_w(const uint8_t* p) { return load_i(p); }
    static X load_x(const char* p) {
      int32_t word;
      __builtin_memcpy(&word, p, 4);
      return set1_i(word);
    }
    static Vi dot4(Vi acc, W w, X x) { return dot_bytes(acc, x, w); }
    static Vi dot_bytes(Vi acc, Vi x, Vi w) {
      return each_i([&](int i) {
        uint32_t sum = u(acc.v[i]);
        for (int b = 0; b < 32; b += 8) {
          sum += u(static_cast<int8_t>(u(x.v[i]) >> b) * static_cast<int8_t>(u(w.v[i]) >> b));
        }
        return sum;
      });
    }
  };
  // Bit i is bit 7 of byte i.
  static uint32_t high_bits16(const uint8_t* p) {
    uint32_t bits = 0;
    for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(p[i] >> 7) << i;
    return bits;
  }
  // Byte i of the result is window[index_i & 127].
  static Vi lookup(const char* window, Vi index) {
    return each_i([&](int i) {
      uint32_t word = 0;
      for (int b = 0; b < 32; b += 8) word |= static_cast<uint32_t>(static_cast<uint8_t>(window[u(index.v[i]) >> b & 127])) << b;
      return word;
    });
  }
  // The tile of 64 bytes whose byte i is the next of `values` where bit i of mask is set, else 0. All 64 values may be read.
  static void expand_tile(uint64_t mask, const uint8_t* values, uint8_t* tile) {
    for (int i = 0; i < 64; ++i, mask >>= 1) tile[i] = mask & 1 ? *values++ : uint8_t{0};
  }

  // out[c][r] = in[r][c], 16 x 16.
  static void transpose16(const float* in, int64_t ld_in, float* out, int64_t ld_out) {
    for (int64_t c = 0; c < 16; ++c) {
      for (int64_t r = 0; r < 16; ++r) out[c * ld_out + r] = in[r * ld_in + c];
    }
  }

  // Adds the set bits of each lane of a. kPartialSteps, widen: as in Dot.
  struct Popcount {
    static constexpr int kPartialSteps = 0;
    static Vi add(Vi acc, Vi a) {
      return each_i([&](int i) { return acc.v[i] + __builtin_popcount(u(a.v[i])); });
    }
    static Vi widen(Vi acc) { return acc; }
  };

  // Hides a value from the optimiser; for loops that measure (limits.inl).
  template <typename T>
  static void opaque(T& value) {
    TERSOR_OPAQUE("m", value);
  }

  // Register blocks: rows x tiles of the integer and of the float GEMM, and how many sets of accumulators share the k steps.
  static constexpr int kMaxRows = 2;
  static constexpr int kXnorMaxRows = 2;  // of signs x signs
  static constexpr int max_tiles(int) { return 1; }
  static constexpr int acc_sets(int /*rows*/, int /*tiles*/) { return 1; }
  static constexpr int kInPlaceRows = 0;  // up to so many rows codes of few bits are not shifted, see products.h
  // Tiles of a panel of few rows that are read as long streams (run_blocks); 0: max_tiles neighbours.
  static constexpr int stream_tiles(int /*bits*/, int /*rows*/, int64_t /*words*/) { return 0; }
  static constexpr int xnor_stream_tiles(int /*rows*/) { return 0; }
  // From so many rows on the next panel is brought into L2 while one is used.
  static constexpr int prefetch_rows(int) { return kMaxRows / 2 + 1; }
  static constexpr int kGroupedMaxRows = 2;
  static constexpr int grouped_tiles(int) { return 1; }
  static constexpr int kSparseMaxRows = 2;
  static constexpr int sparse_sets(int) { return 1; }
  static constexpr int kFloatMaxRows = 2;
  static constexpr int kFloatTiles = 1;

  // Without an instruction for it: the product is exact in double, the sum is rounded to odd there, so that rounding it to float is
  // the only rounding (Boldo and Melquiond, IEEE Trans. Computers 57(4), 2008).
  static float round_once(float a, float b, float c) {
    const double product = static_cast<double>(a) * b, sum = product + c;
    const double from_c = sum - product, error = (product - (sum - from_c)) + (c - from_c);
    if (!(error < 0 || error > 0)) return static_cast<float>(sum);
    uint64_t bits;
    __builtin_memcpy(&bits, &sum, 8);
    if (bits % 2 == 0) bits = (error > 0) == (sum > 0) ? bits + 1 : bits - 1;
    double odd;
    __builtin_memcpy(&odd, &bits, 8);
    return static_cast<float>(odd);
  }

  static float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
    uint32_t exponent = h >> 10 & 31, mantissa = h & 1023;
    uint32_t bits;
    if (exponent == 31) {
      bits = sign | 0x7f800000 | mantissa << 13 | (mantissa ? 0x400000u : 0u);
    } else if (exponent == 0) {
      // mantissa * 2^-24, exact in f32
      const float value = static_cast<float>(static_cast<int32_t>(mantissa)) * 5.9604644775390625e-8f;
      __builtin_memcpy(&bits, &value, 4);
      bits |= sign;
    } else {
      bits = sign | (exponent + 112) << 23 | mantissa << 13;
    }
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
  }
  static uint16_t float_to_half(float f) {
    uint32_t bits;
    __builtin_memcpy(&bits, &f, 4);
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> 13 & 0x1ff));
    if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and up round to inf
    if (magnitude < 0x38800000) {
      // below 2^-14: adding 0.5 leaves round(|f| * 2^24) in the low bits of the sum, rounded by the addition itself
      float value;
      __builtin_memcpy(&value, &magnitude, 4);
      value += 0.5f;
      uint32_t sum;
      __builtin_memcpy(&sum, &value, 4);
      return static_cast<uint16_t>(sign | (sum - 0x3f000000));
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
  }

 private:
  static int32_t s8(char c) { return static_cast<int8_t>(c); }
};

#ifndef TERSOR_ISA_EXTENDED  // by a header that takes from this one what its instruction set lacks
using Isa = Scalar;
#endif

}  // namespace
}  // namespace tersor::TERSOR_ISA
