// What C++17 lacks, in the words of each compiler. GCC and clang (clang-cl too, which builds for Windows) share theirs; the forms
// for MSVC keep the meaning of the code, not its speed, and have never been compiled.
#pragma once

#define TERSOR_PRAGMA(text) _Pragma(#text)

#if defined(__GNUC__) || defined(__clang__)
#define TERSOR_UNROLL(times) TERSOR_PRAGMA(GCC unroll times)
#define TERSOR_INLINE [[gnu::always_inline]] inline
#define TERSOR_NOINLINE [[gnu::noinline]]
#define TERSOR_INLINE_LAMBDA __attribute__((always_inline))
// The value, held where `constraint` says ("x": a vector register), is another one from here on as far as the optimiser knows.
#define TERSOR_OPAQUE(constraint, value) __asm__ volatile("" : "+" constraint(value))
#define TERSOR_MEMORY_BARRIER() __asm__ volatile("" : : : "memory")
#elif defined(_MSC_VER)
#include <intrin.h>
#include <math.h>
#include <memory.h>
#define TERSOR_UNROLL(times)
#define TERSOR_INLINE __forceinline
#define TERSOR_NOINLINE __declspec(noinline)
#define TERSOR_INLINE_LAMBDA [[msvc::forceinline]]
#define TERSOR_OPAQUE(constraint, value) (static_cast<void>(value), _ReadWriteBarrier())
#define TERSOR_MEMORY_BARRIER() _ReadWriteBarrier()
// GCC's and clang's names; memcpy itself would have the others include a header of the standard library in every variant.
#define __builtin_memcpy memcpy
#define __builtin_memset memset
#define __builtin_nanf nanf
#define __builtin_sqrtf sqrtf
#define __builtin_fabsf fabsf
#define __builtin_popcount __popcnt
#define __builtin_popcountll __popcnt64
#define __builtin_prefetch(address, write, level) static_cast<void>(address)
#endif
