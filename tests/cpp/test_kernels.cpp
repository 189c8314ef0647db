// Kernel tests without torch and without Python. Usage: kernel_tests [--seed S] [--fuzz COUNT] [--only SUBSTRING]
// Every variant that this CPU can run meets the same oracle on the same cases. The last line reads "N passed, M failed".
#include <chrono>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <string>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "check.h"

namespace tersor::test {

Options options;
Test* Test::first = nullptr;
Test** Test::end = &Test::first;

namespace {

constexpr int64_t kPrintedFailures = 10;  // per test; the rest is counted

int64_t passed = 0, failed = 0, failed_in_test = 0;
const char* test_name = "";
char case_text[256];
uint64_t case_seed = 0;
std::vector<std::string> skipped;

// The process is about to die: say where. write() is safe in a signal handler.
void say_case() {
  char text[512];
  const int n = std::snprintf(text, sizeof text, "\ndied in %s: %s (seed %llu)\n", test_name, case_text,
                              static_cast<unsigned long long>(case_seed));
  if (write(STDERR_FILENO, text, static_cast<size_t>(n)) < 0) return;
}

#if TERSOR_TEST_ASAN
extern "C" void __sanitizer_set_death_callback(void (*)());
void watch_crashes() { __sanitizer_set_death_callback(say_case); }
#else
void watch_crashes() {
  for (int s : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT}) {
    std::signal(s, [](int which) {
      say_case();
      std::signal(which, SIG_DFL);
      std::raise(which);
    });
  }
}
#endif

std::string runnable_names() {
  std::string names;
  for (const Kernels& k : runnable()) names += std::string(" ") + k.table.isa;
  return names;
}

}  // namespace

void set_case(const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::vsnprintf(case_text, sizeof case_text, format, args);
  va_end(args);
}

void set_seed(uint64_t seed) { case_seed = seed; }

void skip(const char* what, const char* why) { skipped.push_back(std::string(what) + ": " + why); }

bool check(bool ok, const char* file, int line, const char* format, ...) {
  if (ok) {
    ++passed;
    return true;
  }
  ++failed;
  if (++failed_in_test <= kPrintedFailures) {
    char text[512];
    va_list args;
    va_start(args, format);
    std::vsnprintf(text, sizeof text, format, args);
    va_end(args);
    std::printf("%s:%d: %s: %s (seed %llu): %s\n", file, line, test_name, case_text, static_cast<unsigned long long>(case_seed),
                text);
  }
  return false;
}

const std::vector<Kernels>& runnable() {
  static const std::vector<Kernels> all = [] {
    std::vector<Kernels> list;
    int count = 0;
    const Variant* rows = variants(&count);
    for (int i = 0; i < count; ++i) {
      Kernels k;
      if (!rows[i].runnable) {
        skip(rows[i].name, (std::string("this CPU has no ") + rows[i].missing).c_str());
      } else if (CHECK(resolve_kernels(rows[i].name, &k) == nullptr, "resolve_kernels(%s) fails", rows[i].name)) {
        list.push_back(k);
      }
    }
    return list;
  }();
  return all;
}

// ---- the machine ---------------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
static sigjmp_buf after_trap;

// Loads the first lane of a vector, four bytes, and none of the seven others.
[[gnu::target("avx"), gnu::noinline]] static void load_one_lane(const float* p) {
  const __m256 v = _mm256_maskload_ps(p, _mm256_setr_epi32(-1, 0, 0, 0, 0, 0, 0, 0));
  __asm__ volatile("" : : "x"(v));
}

// qemu 7.2 reads all 32 bytes of a masked load, wherever its lanes are; a CPU reads what is asked for. gcc makes such loads of
// `i < n ? a[i] : 0`, of 64 floats at most in the kernels.
static bool masked_loads_read_what_they_load() {
  if (!__builtin_cpu_supports("avx")) return true;
  const Exact<float> last(1);
  void (*const before)(int) = std::signal(SIGSEGV, [](int) { siglongjmp(after_trap, 1); });
  const bool fine = sigsetjmp(after_trap, 1) == 0;
  if (fine) load_one_lane(last.data());
  std::signal(SIGSEGV, before);
  return fine;
}
#else
static bool masked_loads_read_what_they_load() { return true; }
#endif

int64_t page_slack() {
  static int64_t bytes = -1;
  if (bytes < 0) {
    bytes = 0;  // for the buffer of the check itself
    if (!masked_loads_read_what_they_load()) {
      bytes = 256;
      skip("the last 256 bytes before a forbidden page", "masked loads read whole vectors here: an emulator's fault");
    }
  }
  return bytes;
}

// ---- dispatch -----------------------------------------------------------------------------------------------------------------

// A refusal names what was asked for and lists exactly the variants that can run.
static void check_refusal(const char* isa, const char* reason) {
  set_case("%.80s", isa);
  Kernels k;
  const char* message = resolve_kernels(isa, &k);
  if (!CHECK(message != nullptr, "accepted")) return;
  const std::string text = message;
  CHECK(text.find(std::string(isa).substr(0, 64)) != std::string::npos, "does not name what was asked for: %s", message);
  CHECK(text.find(reason) != std::string::npos, "does not say '%s': %s", reason, message);
  const std::string list = "can run:" + runnable_names();
  CHECK(text.size() >= list.size() && text.compare(text.size() - list.size(), list.size(), list) == 0, "does not end in '%s': %s",
        list.c_str(), message);
}

TERSOR_TEST(dispatch_refuses_unknown_names) {
  check_refusal("nonsense", "not an instruction set");
  check_refusal("AVX2", "not an instruction set");
  check_refusal("scalar ", "not an instruction set");
  check_refusal(std::string(5000, 'x').c_str(), "not an instruction set");
  int count = 0, refused = 0;
  const Variant* rows = variants(&count);
  for (int i = 0; i < count; ++i) {
    if (rows[i].runnable) continue;
    ++refused;
    check_refusal(rows[i].name, rows[i].missing);
  }
  if (!refused) skip("refusal of an unavailable variant", "this CPU runs all of them (valgrind's has no AVX-512)");
}

TERSOR_TEST(dispatch_resolves_each_entry) {
  int count = 0;
  const Variant* rows = variants(&count);
  CHECK(count > 0 && std::strcmp(rows[count - 1].name, "scalar") == 0 && rows[count - 1].runnable, "scalar is not the last resort");
  const char* best = nullptr;
  for (int i = count - 1; i >= 0; --i) {
    CHECK(std::strcmp(rows[i].name, rows[i].table->isa) == 0, "row %s holds the table of %s", rows[i].name, rows[i].table->isa);
    CHECK(rows[i].runnable == (rows[i].missing[0] == '\0'), "%s is runnable but lacks %s", rows[i].name, rows[i].missing);
    if (!rows[i].runnable) continue;
    best = rows[i].name;
    set_case("%s", rows[i].name);
    Kernels k;
    if (!CHECK(resolve_kernels(rows[i].name, &k) == nullptr, "refused")) continue;
    CHECK(std::strcmp(k.table.isa, rows[i].name) == 0, "the table calls itself %s", k.table.isa);
#define TERSOR_KERNEL_CHECK(type, entry)                                                                                 \
  CHECK(k.table.entry.run != nullptr, #entry " is empty");                                                               \
  CHECK(!rows[i].table->entry.run || k.table.entry.run == rows[i].table->entry.run, #entry " is not the variant's own"); \
  CHECK(!rows[i].table->entry.run || std::strcmp(k.entry##_isa, rows[i].name) == 0, #entry " is said to be %s", k.entry##_isa);
    TERSOR_KERNEL_ENTRIES(TERSOR_KERNEL_CHECK)
#undef TERSOR_KERNEL_CHECK
  }
  for (const char* uncapped : {static_cast<const char*>(nullptr), ""}) {
    Kernels k;
    set_case("uncapped");
    if (CHECK(resolve_kernels(uncapped, &k) == nullptr, "refused"))
      CHECK(std::strcmp(k.table.isa, best) == 0, "is %s", k.table.isa);
  }
}

TERSOR_TEST(dispatch_honours_the_environment) {
  const char* asked = std::getenv("TERSOR_ISA");
  set_case("TERSOR_ISA=%.80s", asked ? asked : "");
  Kernels k;
  const char* message = resolve_kernels(asked, &k);
  if (message) {
    CHECK(kernels() == nullptr && std::strcmp(kernels_error(), message) == 0, "kernels_error() is '%s'", kernels_error());
  } else if (CHECK(kernels() != nullptr && kernels_error()[0] == '\0', "kernels_error() is '%s'", kernels_error())) {
    CHECK(std::strcmp(kernels()->table.isa, k.table.isa) == 0, "kernels() is %s", kernels()->table.isa);
  }
}

static int run_all() {
  watch_crashes();
  std::printf("variants:%s\n", runnable_names().c_str());
  int ran = 0;
  for (Test* t = Test::first; t; t = t->next) {
    if (!std::strstr(t->name, options.only)) continue;
    ++ran;
    test_name = t->name;
    failed_in_test = 0;
    set_case("start");
    set_seed(options.seed);
    const int64_t before = passed;
    const auto start = std::chrono::steady_clock::now();
    t->run();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::printf("%-36s %9lld passed %6lld failed %7.2f s\n", t->name, static_cast<long long>(passed - before),
                static_cast<long long>(failed_in_test), seconds);
    std::fflush(stdout);
  }
  test_name = "";
  set_case("end");
  CHECK(ran > 0, "no test is called *%s*", options.only);
  for (const std::string& s : skipped) std::printf("skipped %s\n", s.c_str());
  std::printf("%lld passed, %lld failed\n", static_cast<long long>(passed), static_cast<long long>(failed));
  return failed == 0 ? 0 : 1;
}

}  // namespace tersor::test

int main(int argc, char** argv) {
  auto& options = tersor::test::options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    char* end = nullptr;
    if (name == "--every") {
      options.every = true;
      continue;
    }
    const char* value = i + 1 < argc ? argv[i + 1] : "";
    if (*value && name == "--seed") {
      options.seed = std::strtoull(value, &end, 10);
    } else if (*value && name == "--fuzz") {
      options.fuzz = std::strtoll(value, &end, 10);
    } else if (*value && name == "--only") {
      options.only = value;
    } else {
      end = argv[i];
    }
    if (end && (*end || end == value)) {
      std::fprintf(stderr,
                   "kernel_tests: cannot read '%s'; usage: kernel_tests [--seed S] [--fuzz COUNT] [--only SUBSTRING] [--every]\n",
                   argv[i]);
      return 2;
    }
    ++i;
  }
  return tersor::test::run_all();
}
