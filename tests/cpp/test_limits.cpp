// The loops that measure the machine: how much work they say they did, and that they read what they were given and no more.
#include "check.h"

namespace tersor::test {
namespace {

TERSOR_TEST(limits_work) {
  for (const Kernels& k : runnable()) {
    for (Limit what : {Limit::int8, Limit::f32, Limit::popcount}) {
      set_case("%s, limit %d", k.limits_isa, static_cast<int>(what));
      const int64_t one = k.table.limits.run(what, 1, nullptr, 0);
      CHECK(one > 0 && one % 4 == 0, "one iteration is %lld units", static_cast<long long>(one));
      CHECK(k.table.limits.run(what, 7, nullptr, 0) == 7 * one, "seven iterations are not seven times one");
      CHECK(k.table.limits.run(what, 0, nullptr, 0) == 0, "no iteration is no work");
    }
  }
}

TERSOR_TEST(limits_read_stays_inside) {
  for (const Kernels& k : runnable()) {
    for (int64_t bytes : {0, 1, 255, 256, 257, 511, 1000, 4096, 70001}) {
      for (int64_t offset : {0, 1}) {
        set_case("%s, %lld bytes at offset %lld", k.limits_isa, static_cast<long long>(bytes), static_cast<long long>(offset));
        const Exact<uint8_t> data(std::vector<uint8_t>(static_cast<size_t>(bytes), 1), offset);
        const int64_t read = k.table.limits.run(Limit::read, 2, data.data(), bytes);
        CHECK(read == 2 * (bytes / 256 * 256), "%lld bytes read", static_cast<long long>(read));
      }
    }
  }
}

}  // namespace
}  // namespace tersor::test
