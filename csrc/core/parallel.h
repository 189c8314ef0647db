// Threads come from outside: a binding says how to run `n` independent pieces and how many threads there are. Without a binding
// that does (tersor.numpy) everything runs on the calling thread. Bodies must not throw.
#pragma once

#include <cstdint>

namespace tersor {

struct ThreadPool {
  int64_t (*threads)();
  void (*run)(int64_t n, void (*body)(void* context, int64_t i), void* context);
};

extern ThreadPool thread_pool;

// f(i) for i in [0, n), concurrently.
template <typename F>
void parallel_for(int64_t n, F& f) {
  auto body = [](void* context, int64_t i) { (*static_cast<F*>(context))(i); };
  if (n == 1) {
    f(int64_t{0});
  } else {
    thread_pool.run(n, body, &f);
  }
}

}  // namespace tersor
