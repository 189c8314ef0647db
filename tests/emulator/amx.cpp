// Runs AMX code on a CPU without AMX: its instructions trap, and the handler does what they say. Finds out too whether AVX-VNNI
// runs where CPUID does not name it. Linked into kernel_tests, and preloaded into Python. tersor_emulated_features() is what
// csrc/core/dispatch.cpp asks.
//
// Stricter than the hardware where that finds mistakes: any use of a register that is not set up as the instruction needs ends the
// process.
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

struct Tiles {
  bool configured;
  uint8_t rows[8];
  uint16_t row_bytes[8];
  uint8_t data[8][16][64];
};
// Initial-exec: a handler may not allocate.
[[gnu::tls_model("initial-exec")]] thread_local Tiles tiles;
struct sigaction previous;

[[noreturn]] void die(const char* what) {
  char text[160];
  const int n = std::snprintf(text, sizeof text, "AMX emulator: %s\n", what);
  if (write(STDERR_FILENO, text, static_cast<size_t>(n)) < 0) std::_Exit(3);
  std::abort();
}

void need(bool ok, const char* what) {
  if (!ok) die(what);
}

// Intel SDM vol. 2A, LDTILECFG: byte 0 palette, 16..31 bytes of a row, 48..55 rows.
void load_config(const uint8_t* memory) {
  std::memset(&tiles, 0, sizeof tiles);
  need(memory[0] == 1, "palette is not 1");
  for (int i = 0; i < 8; ++i) {
    std::memcpy(&tiles.row_bytes[i], memory + 16 + 2 * i, 2);
    tiles.rows[i] = memory[48 + i];
    need(tiles.rows[i] <= 16 && tiles.row_bytes[i] <= 64, "a register larger than 16 rows of 64 bytes");
    need((tiles.rows[i] == 0) == (tiles.row_bytes[i] == 0), "rows without bytes or bytes without rows");
  }
  tiles.configured = true;
}

void check(int t) { need(tiles.configured && t < 8 && tiles.rows[t], "a register that is not set up"); }

template <typename A, typename B>
void multiply(int to, int a, int b) {
  check(to), check(a), check(b);
  const int words = tiles.row_bytes[a] / 4;
  need(tiles.rows[to] == tiles.rows[a] && tiles.row_bytes[to] == tiles.row_bytes[b] && words == tiles.rows[b],
       "shapes that do not fit each other");
  for (int m = 0; m < tiles.rows[to]; ++m) {
    for (int n = 0; n < tiles.row_bytes[to] / 4; ++n) {
      uint32_t sum;
      std::memcpy(&sum, &tiles.data[to][m][4 * n], 4);
      for (int k = 0; k < words; ++k) {
        for (int i = 0; i < 4; ++i) {
          sum += static_cast<uint32_t>(static_cast<A>(tiles.data[a][m][4 * k + i]) * static_cast<B>(tiles.data[b][k][4 * n + i]));
        }
      }
      std::memcpy(&tiles.data[to][m][4 * n], &sum, 4);
    }
  }
}

struct Memory {
  const char* at;
  int64_t stride;  // the index register, scaled
  int length;      // of ModRM, SIB and displacement
};

Memory memory_operand(const uint8_t* modrm, bool x, bool b, const greg_t* regs) {
  static constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                     REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  const int mod = *modrm >> 6, rm = *modrm & 7;
  Memory m{nullptr, 0, 1};
  uint64_t address = 0;
  bool displacement32 = mod == 2;
  if (rm == 4) {
    const int sib = modrm[m.length++], index = (sib >> 3 & 7) | (x ? 8 : 0), base = (sib & 7) | (b ? 8 : 0);
    if (index != 4) m.stride = regs[kOrder[index]] << (sib >> 6);
    if ((base & 7) == 5 && mod == 0) {
      displacement32 = true;
    } else {
      address = static_cast<uint64_t>(regs[kOrder[base]]);
    }
  } else if (rm == 5 && mod == 0) {
    need(false, "an operand relative to the instruction pointer");
  } else {
    address = static_cast<uint64_t>(regs[kOrder[rm | (b ? 8 : 0)]]);
  }
  if (displacement32) {
    int32_t d;
    std::memcpy(&d, modrm + m.length, 4);
    address += static_cast<uint64_t>(int64_t{d});
    m.length += 4;
  } else if (mod == 1) {
    address += static_cast<uint64_t>(int64_t{static_cast<int8_t>(modrm[m.length++])});
  }
  m.at = reinterpret_cast<const char*>(address);
  return m;
}

// Bytes of the instruction at `code` if it is one of AMX and has been done, else 0.
int execute(const uint8_t* code, const greg_t* regs) {
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) return 0;  // three-byte VEX, map 0F38, W0, 128 bits
  enum { kNone, k66, kF3, kF2 };
  const int prefix = code[2] & 3, opcode = code[3], modrm = code[4], reg = modrm >> 3 & 7, rm = modrm & 7;
  const bool registers = modrm >> 6 == 3, x = !(code[1] & 0x40), b = !(code[1] & 0x20);
  if (opcode == 0x5e && registers) {
    const int second = ~code[2] >> 3 & 15;
    if (prefix == kF2) multiply<int8_t, int8_t>(reg, rm, second);
    if (prefix == kF3) multiply<int8_t, uint8_t>(reg, rm, second);
    if (prefix == k66) multiply<uint8_t, int8_t>(reg, rm, second);
    if (prefix == kNone) multiply<uint8_t, uint8_t>(reg, rm, second);
    return 5;
  }
  if (opcode == 0x49 && registers) {
    if (prefix == kNone && modrm == 0xc0) {
      std::memset(&tiles, 0, sizeof tiles);  // TILERELEASE
      return 5;
    }
    if (prefix != kF2 || rm) return 0;
    check(reg);
    std::memset(tiles.data[reg], 0, sizeof tiles.data[reg]);  // TILEZERO
    return 5;
  }
  if (registers || (opcode != 0x49 && opcode != 0x4b)) return 0;
  const Memory m = memory_operand(code + 4, x, b, regs);
  if (opcode == 0x49) {
    if (prefix != kNone || reg) return 0;
    load_config(reinterpret_cast<const uint8_t*>(m.at));
  } else if (prefix == kF2 || prefix == k66) {  // TILELOADD, TILELOADDT1
    check(reg);
    std::memset(tiles.data[reg], 0, sizeof tiles.data[reg]);
    for (int i = 0; i < tiles.rows[reg]; ++i) std::memcpy(tiles.data[reg][i], m.at + i * m.stride, tiles.row_bytes[reg]);
  } else if (prefix == kF3) {  // TILESTORED
    check(reg);
    for (int i = 0; i < tiles.rows[reg]; ++i)
      std::memcpy(const_cast<char*>(m.at) + i * m.stride, tiles.data[reg][i], tiles.row_bytes[reg]);
  } else {
    return 0;
  }
  return 4 + m.length;
}

// vpdpbusd ymm0, ymm1, ymm0 by its VEX form, AVX-VNNI's: a hypervisor may hide it from CPUID on a CPU that has it.
constexpr int kProbeBytes = 5;
volatile sig_atomic_t probing = 0, trapped = 0;

[[maybe_unused]] bool runs_avx_vnni() {
#ifdef TERSOR_EVEX_VNNI
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl");
#endif
  if (!__builtin_cpu_supports("avx2")) return false;
  probing = 1;
  __asm__ volatile(".byte 0xc4, 0xe2, 0x75, 0x50, 0xc0" : : : "xmm0");
  probing = 0;
  return !trapped;
}

void on_illegal_instruction(int, siginfo_t*, void* context) {
  greg_t* regs = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  if (probing) {
    trapped = 1;
    regs[REG_RIP] += kProbeBytes;
    return;
  }
  const int length = execute(reinterpret_cast<const uint8_t*>(regs[REG_RIP]), regs);
  if (length) {
    regs[REG_RIP] += length;
  } else {
    sigaction(SIGILL, &previous, nullptr);  // not ours: it traps again
  }
}

}  // namespace

extern "C" [[gnu::visibility("default")]] const char* tersor_emulated_features() {
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO;
  if (sigaction(SIGILL, &action, &previous) != 0) return "";
#if defined(TERSOR_SIMDE)  // what the variants were compiled without: see avx512_by_simde.h
  return "AMX_TILE AMX_INT8 AVX_VNNI AVX512F AVX512BW AVX512DQ AVX512VL AVX512_VNNI AVX512_VPOPCNTDQ AVX512_VBMI AVX512_VBMI2";
#else
  return runs_avx_vnni() ? "AMX_TILE AMX_INT8 AVX_VNNI" : "AMX_TILE AMX_INT8";
#endif
}
