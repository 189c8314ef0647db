// The functions of csrc/cuda/ptx.cuh on the emulated machine.
#pragma once

#include "emulator.h"

namespace tersor::cuda::emulator {

// ---- mma, element by element, from the tables of the PTX manual ---------------------------------------------------------------
// kBits of an element: 8 (m16n8k32) or 1 (m16n8k256). Element i of a lane's A lies in register i / per, B likewise.
template <int kBits>
struct MmaLayout {
  static constexpr int kPer = 32 / kBits, kK = 8 * kPer;
  struct At {
    int row, col;
  };
  static At a(int lane, int i) {
    const int group = lane >> 2, in_group = lane % 4;
    const bool upper = i < kPer || (2 * kPer <= i && i < 3 * kPer);
    return {upper ? group : group + 8, in_group * kPer + (i & (kPer - 1)) + (i < 2 * kPer ? 0 : 4 * kPer)};
  }
  static At b(int lane, int i) { return {lane % 4 * kPer + (i & (kPer - 1)) + (i < kPer ? 0 : 4 * kPer), lane >> 2}; }
  static At c(int lane, int i) { return {i < 2 ? lane >> 2 : (lane >> 2) + 8, lane % 4 * 2 + (i & 1)}; }
};

template <int kBits>
void mma(Meeting& m) {
  using L = MmaLayout<kBits>;
  static int32_t A[16][L::kK], B[L::kK][8];
  const uint32_t mask = kBits == 8 ? 255 : 1;
  for (int lane = 0; lane < 32; ++lane) {
    const int from = machine.plant.fault == Fault::wrong_lane ? lane ^ 1 : lane;
    for (int i = 0; i < 4 * L::kPer; ++i) {
      const auto at = L::a(lane, i);
      const uint32_t code = m.in[from][i / L::kPer] >> i % L::kPer * kBits & mask;
      A[at.row][at.col] = kBits == 8 ? static_cast<int8_t>(code) : static_cast<int32_t>(code);
    }
    for (int i = 0; i < 2 * L::kPer; ++i) {
      const auto at = L::b(lane, i);
      const int reg = machine.plant.fault == Fault::swapped_registers ? 1 - i / L::kPer : i / L::kPer;
      B[at.row][at.col] = static_cast<int32_t>(m.in[lane][4 + reg] >> i % L::kPer * kBits & mask);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const auto at = L::c(lane, i);
      uint32_t sum = m.in[lane][6 + i];
      for (int k = 0; k < L::kK; ++k) sum += static_cast<uint32_t>(A[at.row][k] * B[k][at.col]);
      m.out[lane][i] = sum;
    }
  }
  ++machine.mma_count;
}

// mma.sp m16n8k64 s8: A's two values of each group of four k, and their places. Element i of a lane's A lies in register i / 4.
struct SparseMmaLayout {
  // Row, and first k of the group, of the pair of elements 2i, 2i + 1.
  static MmaLayout<8>::At a(int lane, int i) {
    return {(lane >> 2) + (i / 2 % 2 ? 8 : 0), lane % 4 * 8 + i % 2 * 4 + (i >= 4 ? 32 : 0)};
  }
  // Of group i of the places: 32 k of one row.
  static MmaLayout<8>::At places(int lane, int i) { return {(lane >> 2) + (lane & 1 ? 8 : 0), (lane & 2 ? 32 : 0) + 4 * i}; }
  static MmaLayout<8>::At b(int lane, int i) { return {lane % 4 * 4 + (i & 3) + (i >> 2) * 16, lane >> 2}; }
};

inline void mma_sparse(Meeting& m) {
  using L = SparseMmaLayout;
  static int32_t A[16][64], B[64][8];
  static uint32_t places[16][16];
  std::memset(A, 0, sizeof A);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) {
      const auto at = L::places(lane, i);
      const uint32_t pair = m.in[lane][12] >> 4 * i & 15;
      if ((pair & 3) >= pair >> 2) machine.fail("places of a sparse mma are not in ascending order");
      places[at.row][at.col / 4] = pair;
    }
    for (int i = 0; i < 16; ++i) {
      const auto at = L::b(lane, i);
      const int reg = machine.plant.fault == Fault::swapped_registers ? i / 4 ^ 1 : i / 4;
      B[at.row][at.col] = static_cast<int8_t>(m.in[lane][4 + reg] >> i % 4 * 8 & 255);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int from = machine.plant.fault == Fault::wrong_lane ? lane ^ 1 : lane;
    for (int i = 0; i < 8; ++i) {
      const auto at = L::a(lane, i);
      const uint32_t word = m.in[from][i / 2] >> i % 2 * 16, pair = places[at.row][at.col / 4];
      A[at.row][at.col + static_cast<int>(pair & 3)] = static_cast<int8_t>(word & 255);
      A[at.row][at.col + static_cast<int>(pair >> 2)] = static_cast<int8_t>(word >> 8 & 255);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const auto at = MmaLayout<8>::c(lane, i);
      uint32_t sum = m.in[lane][8 + i];
      for (int k = 0; k < 64; ++k) sum += static_cast<uint32_t>(A[at.row][k] * B[k][at.col]);
      m.out[lane][i] = sum;
    }
  }
  ++machine.mma_count;
}

}  // namespace tersor::cuda::emulator

namespace tersor::cuda::ptx {

using emulator::machine;

inline unsigned char* shared_memory() { return machine.shared(); }
template <typename T>
T load_shared(const void* p) {
  machine.touch_read(p, sizeof(T));
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename T>
void store_shared(void* p, T v) {
  machine.touch_write(p, sizeof(T), false);
  std::memcpy(p, &v, sizeof v);
}
inline uint4 load_shared16(const void* p) { return load_shared<uint4>(p); }
inline uint2 load_shared8(const void* p) { return load_shared<uint2>(p); }
inline uint32_t load_shared4(const void* p) { return load_shared<uint32_t>(p); }
inline void store_shared16(void* p, uint4 v) { store_shared(p, v); }
inline void store_shared4(void* p, uint32_t v) { store_shared(p, v); }

// Register j of lane 4 g + t: bytes 4t .. 4t+3 of the 16 that lane 8 j + g has named.
inline void load_matrices(uint32_t (&r)[4], const void* p) {
  static const char kind = 0;
  const uint4 v = load_shared16(p);
  const uint32_t in[4] = {v.x, v.y, v.z, v.w};
  machine.together(&kind, in, 4, r, 4, [](emulator::Meeting& m) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int j = 0; j < 4; ++j) m.out[lane][j] = m.in[8 * j + lane / 4][lane % 4];
    }
  });
}

inline void copy_async16(void* to, const void* from, bool valid) { machine.copy_async(to, from, valid); }
inline void copy_async_commit() { machine.copy_commit(); }
template <int kPending>
void copy_async_wait() {
  machine.copy_wait(kPending);
}

template <typename T>
T load_global(const void* p) {
  machine.check_global(p, sizeof(T));
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline uint4 load_global16(const void* p) { return load_global<uint4>(p); }
inline uint32_t load_global4(const void* p) { return load_global<uint32_t>(p); }
inline uint4 load_global16_once(const void* p) { return load_global<uint4>(p); }

inline int thread_index() { return machine.thread(); }
inline int threads() { return machine.threads(); }
inline int64_t block_x() { return machine.block(0); }
inline int64_t block_y() { return machine.block(1); }
inline int64_t block_z() { return machine.block(2); }
inline void barrier() { machine.barrier(); }
inline void warp_barrier() {
  static const char kind = 0;
  machine.together(&kind, nullptr, 0, nullptr, 0, [](emulator::Meeting&) {});
}
inline uint32_t shuffle_xor(uint32_t v, int mask) {
  static const char kind = 0;
  const uint32_t in[2] = {v, static_cast<uint32_t>(mask)};
  uint32_t out;
  machine.together(&kind, in, 2, &out, 1, [](emulator::Meeting& m) {
    for (uint32_t i = 0; i < 32; ++i) m.out[i][0] = m.in[i ^ m.in[i][1]][0];
  });
  return out;
}
inline uint32_t shuffle(uint32_t v, int lane) {
  static const char kind = 0;
  const uint32_t in[2] = {v, static_cast<uint32_t>(lane)};
  uint32_t out;
  machine.together(&kind, in, 2, &out, 1, [](emulator::Meeting& m) {
    for (uint32_t i = 0; i < 32; ++i) m.out[i][0] = m.in[m.in[i][1]][0];
  });
  return out;
}
inline uint32_t ballot(bool v) {
  static const char kind = 0;
  const uint32_t in = v;
  uint32_t out;
  machine.together(&kind, &in, 1, &out, 1, [](emulator::Meeting& m) {
    uint32_t all = 0;
    for (uint32_t i = 0; i < 32; ++i) all |= m.in[i][0] << i;
    for (uint32_t i = 0; i < 32; ++i) m.out[i][0] = all;
  });
  return out;
}

inline float mul(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float sub(float a, float b) { return a - b; }
inline float div(float a, float b) { return a / b; }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float sqrt(float a) { return std::sqrt(a); }
inline float to_f32(int32_t v) { return static_cast<float>(v); }
inline int32_t round_to_int(float v) { return static_cast<int32_t>(std::nearbyint(v)); }
inline uint32_t bits(float v) { return std::bit_cast<uint32_t>(v); }
inline float from_bits(uint32_t v) { return std::bit_cast<float>(v); }
inline int popcount(uint32_t v) { return std::popcount(v); }
inline uint16_t to_bf16(float v) { return test::encode(v, test::kBf16); }
inline uint16_t to_f16(float v) { return test::encode(v, test::kF16); }
inline float from_bf16(uint16_t v) { return test::decode(v, test::kBf16); }
inline float from_f16(uint16_t v) { return test::decode(v, test::kF16); }

inline uint32_t dot4_u8s8(uint32_t u, uint32_t s, uint32_t acc) {
  for (int i = 0; i < 32; i += 8)
    acc += static_cast<uint32_t>(static_cast<int32_t>(u >> i & 255) * static_cast<int8_t>(s >> i & 255));
  return acc;
}

template <int kBits>
void mma(uint32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static const char kind = 0;
  const uint32_t in[10] = {a[0], a[1], a[2], a[3], b[0], b[1], d[0], d[1], d[2], d[3]};
  machine.together(&kind, in, 10, d, 4, emulator::mma<kBits>);
}
inline void mma_s8u8(uint32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma<8>(d, a, b); }
inline void mma_and_popcount(uint32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma<1>(d, a, b); }
inline void mma_sparse_s8s8(uint32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t places) {
  static const char kind = 0;
  const uint32_t in[13] = {a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], d[0], d[1], d[2], d[3], places};
  machine.together(&kind, in, 13, d, 4, emulator::mma_sparse);
}

}  // namespace tersor::cuda::ptx
