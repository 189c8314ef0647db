// A test harness of one header: checks that count, named tests, exact buffers, canaries and a small random generator.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "kernel_table.h"

#if defined(__SANITIZE_ADDRESS__)
#define TERSOR_TEST_ASAN 1
#else
#define TERSOR_TEST_ASAN 0
#endif

namespace tersor::test {

struct Options {
  uint64_t seed = 1;
  int64_t fuzz = 200;
  const char* only = "";
  bool every = false;
};
extern Options options;

// The indices of `count` choices that a case runs with: the one whose turn it is, or with --every all of them.
inline std::vector<int64_t> choices(int64_t turn, int64_t count) {
  if (!options.every) return {turn % count};
  std::vector<int64_t> all(static_cast<size_t>(count));
  std::iota(all.begin(), all.end(), 0);
  return all;
}

// What the next checks are about; printed when one fails and when the process dies. A test that draws its own seed passes it to
// set_seed.
[[gnu::format(printf, 1, 2)]] void set_case(const char* format, ...);
void set_seed(uint64_t seed);

[[gnu::format(printf, 4, 5)]] bool check(bool ok, const char* file, int line, const char* format, ...);
#define CHECK(condition, ...) ::tersor::test::check((condition), __FILE__, __LINE__, __VA_ARGS__)

// Every bit of `count` elements; names the first that differs.
template <typename T>
bool check_same(const char* file, int line, const char* what, const T* got, const T* want, int64_t count) {
  int64_t i = 0;
  if (count > 0 && std::memcmp(got, want, static_cast<size_t>(count) * sizeof(T)) != 0) {
    while (std::memcmp(got + i, want + i, sizeof(T)) == 0) ++i;
    return check(false, file, line, "%s[%lld of %lld] is %.9g, expected %.9g", what, static_cast<long long>(i),
                 static_cast<long long>(count), static_cast<double>(got[i]), static_cast<double>(want[i]));
  }
  return check(true, file, line, "%s", what);
}
#define CHECK_SAME(what, got, want, count) ::tersor::test::check_same(__FILE__, __LINE__, what, got, want, count)

// One list of tests, filled by the macro below before main runs.
struct Test {
  const char* name;
  void (*run)();
  Test* next;
  static Test *first, **end;
  Test(const char* n, void (*f)()) : name(n), run(f), next(nullptr) {
    *end = this;
    end = &next;
  }
};
#define TERSOR_TEST(id)                                       \
  static void id();                                           \
  static ::tersor::test::Test id##_registration = {#id, &id}; \
  static void id()

// What could not be tested and why; printed once at the end.
void skip(const char* what, const char* why);

// Bytes before a forbidden page that operands keep clear of it: 0, except where an emulator reads more than an instruction does.
int64_t page_slack();

// The table of every variant this CPU can run, entries that it leaves open filled from the ones below it. The last one is scalar.
const std::vector<Kernels>& runnable();

// splitmix64 (Vigna, public domain): the same numbers on every platform, which std:: distributions are not.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 0x1234567u) {}
  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int64_t between(int64_t low, int64_t high) { return low + static_cast<int64_t>(bits() % static_cast<uint64_t>(high - low + 1)); }
  bool coin() { return bits() & 1; }
  double unit() { return static_cast<double>(bits() >> 11) * 0x1p-53; }                                // [0, 1)
  float normal() { return static_cast<float>((unit() + unit() + unit() + unit() - 2.0) * 1.732051); }  // near enough
  template <typename T>
  T pick(std::initializer_list<T> list) {
    return list.begin()[between(0, static_cast<int64_t>(list.size()) - 1)];
  }

 private:
  uint64_t state_;
};

// Memory for operands: a byte read past the end is caught. Under ASan the end of a malloc; else the end of a page before one
// without access, which also catches instructions that ASan does not see. `offset` bytes precede the data and push it out of
// alignment.
template <typename T>
class Exact {
 public:
  explicit Exact(int64_t count = 0, int64_t offset = 0) : count_(count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T), shift = static_cast<size_t>(offset);
#if TERSOR_TEST_ASAN
    base_ = static_cast<char*>(std::malloc(shift + bytes));
    if (!base_) std::abort();
    data_ = reinterpret_cast<T*>(base_ + shift);
#else
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t body = (bytes + 64 + static_cast<size_t>(page_slack()) + page - 1) / page * page;
    mapped_ = body + page;
    void* p = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(static_cast<char*>(p) + body, page, PROT_NONE) != 0) std::abort();
    base_ = static_cast<char*>(p);
    const size_t clear = static_cast<size_t>(page_slack()) + (shift ? 64 - shift % 64 : 0);
    data_ = reinterpret_cast<T*>(base_ + body - bytes - clear);
#endif
  }
  explicit Exact(const std::vector<T>& from, int64_t offset = 0) : Exact(static_cast<int64_t>(from.size()), offset) {
    if (!from.empty()) std::memcpy(static_cast<void*>(data_), from.data(), from.size() * sizeof(T));
  }
  Exact(Exact&& other) noexcept { swap(other); }
  Exact& operator=(Exact&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Exact() {
#if TERSOR_TEST_ASAN
    std::free(base_);
#else
    if (base_) munmap(base_, mapped_);
#endif
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return count_; }

 private:
  void swap(Exact& other) {
    std::swap(base_, other.base_);
    std::swap(data_, other.data_);
    std::swap(mapped_, other.mapped_);
    std::swap(count_, other.count_);
  }
  char* base_ = nullptr;
  T* data_ = nullptr;
  size_t mapped_ = 0;
  int64_t count_ = 0;
};

// Memory for results: `rows` rows of `width` bytes, `ld` bytes apart. The rows, the gaps between them and 256 bytes on either side
// start as a canary; outside the rows it must survive. data() is 64-byte aligned plus `shift`.
class Canvas {
 public:
  Canvas(int64_t rows, int64_t width, int64_t ld, int64_t shift = 0) : rows_(rows), width_(width), ld_(ld), shift_(shift) {
    bytes_ = kMargin + shift_ + span() + kMargin;
    base_ = static_cast<unsigned char*>(std::aligned_alloc(64, static_cast<size_t>(round_up(bytes_, 64))));
    if (!base_) std::abort();
    std::memset(base_, kCanary, static_cast<size_t>(bytes_));
  }
  Canvas(const Canvas&) = delete;
  ~Canvas() { std::free(base_); }

  template <typename T = void>
  T* at(int64_t row = 0) {
    return reinterpret_cast<T*>(base_ + kMargin + shift_ + row * ld_);
  }
  int64_t span() const { return rows_ > 0 ? (rows_ - 1) * ld_ + width_ : 0; }
  bool intact() const {
    const unsigned char* p = base_ + kMargin + shift_;
    if (!untouched(base_, p)) return false;
    for (int64_t m = 0; m + 1 < rows_; ++m) {
      if (!untouched(p + m * ld_ + width_, p + (m + 1) * ld_)) return false;
    }
    return untouched(p + span(), base_ + bytes_);
  }
  static bool untouched(const unsigned char* from, const unsigned char* to) {
    for (; from < to; ++from) {
      if (*from != kCanary) return false;
    }
    return true;
  }

 private:
  static constexpr int64_t kMargin = 256;
  static constexpr unsigned char kCanary = 0xa5;
  int64_t rows_, width_, ld_, shift_, bytes_;
  unsigned char* base_;
};

}  // namespace tersor::test
