// The only file that asks the CPU what it can do. Everything here is compiled with baseline flags.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernel_table.h"
#include "parallel.h"

#if defined(__x86_64__) || defined(_M_X64)
#if defined(__GNUC__) || defined(__clang__)
#include <cpuid.h>
#else
#include <intrin.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#if defined(__ELF__)
extern "C" [[gnu::weak, gnu::visibility("default")]] const char* tersor_emulated_features();
#endif

namespace tersor {

#define TERSOR_ISA_ROW(name, features) \
  namespace name {                     \
  extern const KernelTable table;      \
  }
#include "isa.inc"
#undef TERSOR_ISA_ROW

namespace {

// One list of features: the bit, its name in messages. Where CPUID reports each is in cpu_features().
#define TERSOR_FEATURES(X)                \
  X(kSsse3, "SSSE3")                      \
  X(kSse41, "SSE4.1")                     \
  X(kAvx2, "AVX2")                        \
  X(kFma, "FMA")                          \
  X(kF16c, "F16C")                        \
  X(kAvx512F, "AVX512F")                  \
  X(kAvx512Bw, "AVX512BW")                \
  X(kAvx512Dq, "AVX512DQ")                \
  X(kAvx512Vl, "AVX512VL")                \
  X(kAvx512Vnni, "AVX512_VNNI")           \
  X(kAvx512Vpopcntdq, "AVX512_VPOPCNTDQ") \
  X(kAvx512Vbmi, "AVX512_VBMI")           \
  X(kAvx512Vbmi2, "AVX512_VBMI2")         \
  X(kAvxVnni, "AVX_VNNI")                 \
  X(kAmxTile, "AMX_TILE")                 \
  X(kAmxInt8, "AMX_INT8")                 \
  X(kDotprod, "asimddp")                  \
  X(kI8mm, "i8mm")

enum FeatureIndex {
#define TERSOR_FEATURE(id, text) id##Index,
  TERSOR_FEATURES(TERSOR_FEATURE)
#undef TERSOR_FEATURE
};
enum : uint32_t {
#define TERSOR_FEATURE(id, text) id = 1u << id##Index,
  TERSOR_FEATURES(TERSOR_FEATURE)
#undef TERSOR_FEATURE
};
constexpr const char* kFeatureNames[] = {
#define TERSOR_FEATURE(id, text) text,
    TERSOR_FEATURES(TERSOR_FEATURE)
#undef TERSOR_FEATURE
};

#if defined(__x86_64__) || defined(_M_X64)
struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

#if defined(__GNUC__) || defined(__clang__)
// False where this CPU has no such leaf.
bool cpuid(unsigned leaf, unsigned subleaf, Registers* r) { return __get_cpuid_count(leaf, subleaf, &r->a, &r->b, &r->c, &r->d); }

uint32_t xcr0() {
  uint32_t low = 0, high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}
#else
bool cpuid(unsigned leaf, unsigned subleaf, Registers* r) {
  int out[4];
  __cpuid(out, 0);
  if (leaf > static_cast<unsigned>(out[0])) return false;
  __cpuidex(out, static_cast<int>(leaf), static_cast<int>(subleaf));
  std::memcpy(r, out, sizeof out);
  return true;
}

uint32_t xcr0() { return static_cast<uint32_t>(_xgetbv(0)); }
#endif

// Linux gives the 8 KiB of tile state to processes that ask (Documentation/arch/x86/xstate.rst); their threads have it too.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

uint32_t cpu_features() {
  Registers r;
  uint32_t have = 0;
  const auto bit = [](unsigned value, int index) { return (value >> index & 1u) != 0; };
  if (!cpuid(1, 0, &r)) return have;
  if (bit(r.c, 9)) have |= kSsse3;
  if (bit(r.c, 19)) have |= kSse41;
  if (!bit(r.c, 27)) return have;  // OSXSAVE
  const uint32_t saved = xcr0();
  const bool os_ymm = (saved & 0x6) == 0x6;            // Intel SDM vol. 1, 13.3: XMM and YMM state enabled by the OS
  const bool os_zmm = (saved & 0xe6) == 0xe6;          // and opmask, ZMM_Hi256, Hi16_ZMM
  const bool os_tiles = (saved & 0x60000) == 0x60000;  // XTILECFG and XTILEDATA
  if (os_ymm) {
    if (bit(r.c, 12)) have |= kFma;
    if (bit(r.c, 29)) have |= kF16c;
  }
  if (!cpuid(7, 0, &r)) return have;
  if (os_ymm && bit(r.b, 5)) have |= kAvx2;
  if (os_zmm) {
    if (bit(r.b, 16)) have |= kAvx512F;
    if (bit(r.b, 30)) have |= kAvx512Bw;
    if (bit(r.b, 17)) have |= kAvx512Dq;
    if (bit(r.b, 31)) have |= kAvx512Vl;
    if (bit(r.c, 11)) have |= kAvx512Vnni;
    if (bit(r.c, 14)) have |= kAvx512Vpopcntdq;
    if (bit(r.c, 1)) have |= kAvx512Vbmi;
    if (bit(r.c, 6)) have |= kAvx512Vbmi2;
  }
  if (os_tiles && bit(r.d, 24) && may_use_tiles()) {
    have |= kAmxTile;
    if (bit(r.d, 25)) have |= kAmxInt8;
  }
  if (os_ymm && cpuid(7, 1, &r) && bit(r.a, 4)) have |= kAvxVnni;
  return have;
}
#elif defined(__aarch64__) && defined(__linux__)
uint32_t cpu_features() {
  uint32_t have = 0;  // the bits as in asm/hwcap.h of Linux; older headers lack some
  if (getauxval(AT_HWCAP) >> 20 & 1) have |= kDotprod;
  if (getauxval(AT_HWCAP2) >> 13 & 1) have |= kI8mm;
  return have;
}
#elif defined(__aarch64__) && defined(__APPLE__)
bool has(const char* feature) {
  int value = 0;
  size_t bytes = sizeof value;
  return sysctlbyname(feature, &value, &bytes, nullptr, 0) == 0 && value;
}
uint32_t cpu_features() {
  return (has("hw.optional.arm.FEAT_DotProd") ? kDotprod : 0u) | (has("hw.optional.arm.FEAT_I8MM") ? kI8mm : 0u);
}
#else
uint32_t cpu_features() { return 0; }
#endif

// AMD's L3 takes what L2 evicts: an output larger than L2 first costs reads of the lines it overwrites, then drives the weights out
// of L2 and L3. Stores past the caches gained there; on Intel a prototype lost by them.
constexpr int64_t kStreamBytes = int64_t{6} << 20;
int64_t stream_bytes() {
#if defined(__x86_64__) || defined(_M_X64)
  Registers r;
  if (!cpuid(0, 0, &r)) return 0;
  const unsigned vendor[3] = {r.b, r.d, r.c};
  return std::memcmp(vendor, "AuthenticAMD", 12) == 0 || std::memcmp(vendor, "HygonGenuine", 12) == 0 ? kStreamBytes : 0;
#else
  return 0;
#endif
}

const char* first_missing(uint32_t wanted, uint32_t have) {
  for (size_t i = 0; i < sizeof kFeatureNames / sizeof *kFeatureNames; ++i) {
    if ((wanted & ~have) >> i & 1u) return kFeatureNames[i];
  }
  return "";
}

constexpr int kIsaCount = 0
#define TERSOR_ISA_ROW(name, features) +1
#include "isa.inc"
#undef TERSOR_ISA_ROW
    ;
static_assert(kIsaCount == TERSOR_ISA_COUNT, "isa.inc and the tersor_isa() lines of CMakeLists.txt differ");

// Features that an emulator loaded before us supplies where the CPU has none; see tests/emulator.
uint32_t emulated_features() {
  uint32_t have = 0;
#if defined(__ELF__)
  if (!tersor_emulated_features) return 0;
  const char* names = tersor_emulated_features();
  for (size_t i = 0; i < sizeof kFeatureNames / sizeof *kFeatureNames; ++i) {
    if (std::strstr(names, kFeatureNames[i])) have |= 1u << i;
  }
#endif
  return have;
}

struct Registry {
  Variant rows[kIsaCount];
  Registry() {
    const uint32_t have = cpu_features() | emulated_features();
    int i = 0;
#define TERSOR_ISA_ROW(name, features)                                     \
  {                                                                        \
    const char* missing = first_missing((features), have);                 \
    rows[i++] = Variant{#name, &name::table, missing[0] == '\0', missing}; \
  }
#include "isa.inc"
#undef TERSOR_ISA_ROW
  }
};

struct ProcessKernels {
  Kernels kernels;
  char error[512];
  ProcessKernels() {
    const char* message = resolve_kernels(std::getenv("TERSOR_ISA"), &kernels);
    std::snprintf(error, sizeof error, "%s", message ? message : "");
  }
};

const ProcessKernels& process_kernels() {
  static const ProcessKernels instance;
  return instance;
}

void run_serial(int64_t n, void (*body)(void*, int64_t), void* context) {
  for (int64_t i = 0; i < n; ++i) body(context, i);
}

}  // namespace

ThreadPool thread_pool = {[]() -> int64_t { return 1; }, run_serial};

const Variant* variants(int* count) {
  static const Registry registry;
  *count = kIsaCount;
  return registry.rows;
}

const char* resolve_kernels(const char* isa, Kernels* out) {
  static thread_local char error[512];
  int count = 0;
  const Variant* rows = variants(&count);
  int first = 0;
  if (isa && *isa) {
    while (first < count && std::strcmp(rows[first].name, isa) != 0) ++first;
    if (first == count || !rows[first].runnable) {
      int n = first == count
                  ? std::snprintf(error, sizeof error, "TERSOR_ISA=%.64s is not an instruction set of this build", isa)
                  : std::snprintf(error, sizeof error, "TERSOR_ISA=%.64s is not available here (no %s)", isa, rows[first].missing);
      n += std::snprintf(error + n, sizeof error - n, "; this CPU can run:");
      for (int i = 0; i < count; ++i) {
        if (rows[i].runnable) n += std::snprintf(error + n, sizeof error - n, " %s", rows[i].name);
      }
      return error;
    }
  }
  *out = Kernels{};
  out->table.isa = nullptr;
  for (int i = count - 1; i >= first; --i) {
    if (!rows[i].runnable) continue;
    const KernelTable& t = *rows[i].table;
#define TERSOR_KERNEL_RESOLVE(type, entry) \
  if (t.entry.run) {                       \
    out->table.entry = t.entry;            \
    out->entry##_isa = rows[i].name;       \
  }
    TERSOR_KERNEL_ENTRIES(TERSOR_KERNEL_RESOLVE)
#undef TERSOR_KERNEL_RESOLVE
    out->table.isa = rows[i].name;
  }
  out->table.stream_bytes = stream_bytes();
  return nullptr;
}

const Kernels* kernels() { return process_kernels().error[0] ? nullptr : &process_kernels().kernels; }
const char* kernels_error() { return process_kernels().error; }

}  // namespace tersor
