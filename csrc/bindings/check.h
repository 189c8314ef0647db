// Checks shared by the bindings, the second line behind the Python ones: every size is verified against every pointer before a
// kernel runs. Messages name the function, the argument, what came and what was wanted.
#pragma once

#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../core/kernel_table.h"

namespace tersor {

template <typename... Parts>
[[noreturn]] void fail(const char* function, const Parts&... parts) {
  std::ostringstream message;
  message << function << ": ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline const KernelTable& table_or_throw() {
  const Kernels* k = kernels();
  if (!k) throw std::runtime_error(kernels_error());
  return k->table;
}

inline void check_memory(const char* function, const char* error) {
  if (error) throw std::runtime_error(std::string(function) + ": " + error);
}

inline Activation activation_from(const char* function, const std::string& name) {
#define TERSOR_EPILOGUE_ROW(id) \
  if (name == #id) return Activation::id;
#include "../core/epilogue.inc"
#undef TERSOR_EPILOGUE_ROW
  std::ostringstream known;
#define TERSOR_EPILOGUE_ROW(id) known << " " << #id;
#include "../core/epilogue.inc"
#undef TERSOR_EPILOGUE_ROW
  fail(function, "epilogue is '", name, "', expected one of:", known.str());
}

// The bound leaves room for rounding up; no tensor has as many tiles.
inline void check_out_features(const char* function, int64_t N) {
  constexpr int64_t kMaxN = int64_t{1} << 48;
  if (N < 0 || N > kMaxN) fail(function, "out_features is ", N, ", expected 0 to ", kMaxN);
}

inline void check_k(const char* function, int64_t K) {
  if (K > kMaxK) fail(function, "K=", K, " is above ", kMaxK, ", the largest for which int32 sums are exact");
}

inline int check_bits(const char* function, int64_t bits) {
  if (bits != 8 && bits != 4 && bits != 2 && bits != 1) fail(function, "bits is ", bits, ", expected 8, 4, 2 or 1");
  return static_cast<int>(bits);
}

// Size of the groups of group_scale [ceil(N/16), groups, 32].
inline int64_t check_groups(const char* function, int64_t K, int64_t groups) {
  if (K == 0 && groups == 0) return kGroupUnit;
  if (groups < 1 || K % groups || K / groups % kGroupUnit) {
    fail(function, "group_scale has ", groups, " groups, which do not split K=", K, " into multiples of ", kGroupUnit);
  }
  return K / groups;
}

}  // namespace tersor
