// Every instruction that C++ has no word for: inline PTX and intrinsics, each with the layout it expects. The kernels use these
// functions only, so that tests/cuda_emulator/emulator.h can stand in for this header under a C++ compiler.
//
// lane = 4 g + t, g = 0..7, t = 0..3 in all drawings.
#pragma once

#ifndef __CUDACC__
#include "emulator.h"
#else

#include <cstdint>

#define TERSOR_DEVICE __device__ __forceinline__

namespace tersor::cuda::ptx {

// ---- shared memory ------------------------------------------------------------------------------------------------------------
TERSOR_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}
TERSOR_DEVICE uint4 load_shared16(const void* p) { return *static_cast<const uint4*>(p); }
TERSOR_DEVICE uint2 load_shared8(const void* p) { return *static_cast<const uint2*>(p); }
TERSOR_DEVICE uint32_t load_shared4(const void* p) { return *static_cast<const uint32_t*>(p); }
// Four matrices of 8 rows x 16 bytes: lane i brings the address of row i % 8 of matrix i / 8, register j of lane 4 g + t gets bytes
// 4t .. 4t+3 of row g of matrix j.
TERSOR_DEVICE void load_matrices(uint32_t (&r)[4], const void* p) {
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(p));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}
TERSOR_DEVICE void store_shared16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }
TERSOR_DEVICE void store_shared4(void* p, uint32_t v) { *static_cast<uint32_t*>(p) = v; }

// 16 bytes from global to shared memory, both aligned to 16, past the registers and past L1. Not `valid`: 16 zeros, and `from` is
// not read. It lands when its thread has waited for its group; other threads see it after a barrier behind that wait.
TERSOR_DEVICE void copy_async16(void* to, const void* from, bool valid) {
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
}
TERSOR_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kPending of this thread's groups are under way.
template <int kPending>
TERSOR_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- global memory ------------------------------------------------------------------------------------------------------------
TERSOR_DEVICE uint4 load_global16(const void* p) { return __ldg(static_cast<const uint4*>(p)); }
TERSOR_DEVICE uint32_t load_global4(const void* p) { return __ldg(static_cast<const uint32_t*>(p)); }
// Weights of a matrix x vector product are read once: they leave L1 to the activations.
TERSOR_DEVICE uint4 load_global16_once(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// ---- threads ------------------------------------------------------------------------------------------------------------------
TERSOR_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
TERSOR_DEVICE int threads() { return static_cast<int>(blockDim.x); }
TERSOR_DEVICE int64_t block_x() { return blockIdx.x; }
TERSOR_DEVICE int64_t block_y() { return blockIdx.y; }
TERSOR_DEVICE int64_t block_z() { return blockIdx.z; }
TERSOR_DEVICE void barrier() { __syncthreads(); }
TERSOR_DEVICE void warp_barrier() { __syncwarp(); }
TERSOR_DEVICE uint32_t shuffle_xor(uint32_t v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
TERSOR_DEVICE uint32_t shuffle(uint32_t v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
TERSOR_DEVICE uint32_t ballot(bool v) { return __ballot_sync(0xffffffffu, v); }

// ---- arithmetic: one rounding each, never contracted --------------------------------------------------------------------------
TERSOR_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
TERSOR_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
TERSOR_DEVICE float sub(float a, float b) { return __fsub_rn(a, b); }
TERSOR_DEVICE float div(float a, float b) { return __fdiv_rn(a, b); }
TERSOR_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
TERSOR_DEVICE float sqrt(float a) { return __fsqrt_rn(a); }
TERSOR_DEVICE float to_f32(int32_t v) { return __int2float_rn(v); }
TERSOR_DEVICE int32_t round_to_int(float v) { return __float2int_rn(v); }  // ties to even
TERSOR_DEVICE uint32_t bits(float v) { return __float_as_uint(v); }
TERSOR_DEVICE float from_bits(uint32_t v) { return __uint_as_float(v); }
TERSOR_DEVICE int popcount(uint32_t v) { return __popc(v); }

// To 16 bits, nearest-even; a NaN gives the NaN of the hardware.
TERSOR_DEVICE uint16_t to_bf16(float v) {
  uint16_t r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
}
TERSOR_DEVICE uint16_t to_f16(float v) {
  uint16_t r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
}
TERSOR_DEVICE float from_bf16(uint16_t v) { return __uint_as_float(static_cast<uint32_t>(v) << 16); }
TERSOR_DEVICE float from_f16(uint16_t v) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
  return r;
}

// acc + sum of four products u8 x s8, modulo 2^32.
TERSOR_DEVICE uint32_t dot4_u8s8(uint32_t u, uint32_t s, uint32_t acc) {
  uint32_t r;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(r) : "r"(u), "r"(s), "r"(acc));
  return r;
}

// ---- D[16][8] += A[16][32] s8 * B[32][8] u8, s32 ------------------------------------------------------------------------------
// Four neighbouring k a register, lowest byte first:
//
//          k = 0..15   k = 16..31              n = g                       n = 2t, 2t+1
//   row g   a[0]        a[2]        k = 4t+b    b[0]              row g     d[0], d[1]
//   row g+8 a[1]        a[3]        k = 16+4t+b b[1]              row g+8   d[2], d[3]
//           k = 4t + b (+ 16)
TERSOR_DEVICE void mma_s8u8(uint32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- D[16][8] += popcount(A[16][256] and B[256][8]), bits ---------------------------------------------------------------------
// The drawing above with 32 neighbouring k a register, lowest bit first: k = 32t + b, and 128 + 32t + b. One BMMA on sm_80 to 90;
// xor.popc would be two on sm_90, and sm_100 and up have neither (8 IMMA): signs take another way there (signs_as_int8), and
// kernels that nobody launches are not worth their code.
TERSOR_DEVICE void mma_and_popcount(uint32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 1000
  asm volatile("trap;");
  return;
#endif
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- D[16][8] += A[16][64] s8 * B[64][8] s8, A with two values in every four k ------------------------------------------------
// A register of A holds the values of eight k, two for each four, in order; one of B four neighbouring k:
//
//           k = 0..31     k = 32..63
//   row g    a[0]          a[2]        k = 8t .. 8t+7 (+ 32)        b[i]: k = 16i + 4t + b, n = g        D as above
//   row g+8  a[1]          a[3]
//
// The k mod 4 of the two values of a group, ascending, are two bits each, lowest group first: the eight groups of row g + 8 (t mod
// 2), k = 32 (t / 2) .. +31, in `places` of lane 4 g + t (CuTe: MMA_Traits<SM80_SPARSE_16x8x64_S32S8S8S32_TN>::ELayout).
TERSOR_DEVICE void mma_sparse_s8s8(uint32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t places) {
  asm("mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, "
      "%11}, {%0, %1, %2, %3}, %12, 0x0;"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(places));
}

}  // namespace tersor::cuda::ptx

#endif  // __CUDACC__
