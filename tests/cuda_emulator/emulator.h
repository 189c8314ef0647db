// Runs the kernels of csrc/cuda on the CPU: stands in for ptx.cuh when a C++ compiler reads them. One fiber for each thread of a
// block; blocks run one after the other. What a warp does together (mma, shuffles) waits for its 32 fibers, barriers for the block.
//
// Besides results it reports what a GPU would leave undetected:
//   - shared memory read or written without a barrier between it and another thread's access, or before an asynchronous copy has
//     been waited for, whatever the order in which the threads happened to run
//   - a barrier or a warp operation that not all threads reach
//   - asynchronous copies and wide loads off their alignment or outside memory declared by allow()
//   - shared memory out of bounds; it starts poisoned
//   - 16-byte loads of shared memory that meet a bank more than once (counted, not an error)
// The fragment layouts are those of the PTX manual, element by element.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "check.h"
#include "oracle.h"

#define __global__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define TERSOR_DEVICE inline

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};

namespace tersor::cuda::emulator {

// The order in which runnable threads go on. Copies land when issued (early) or when waited for: both must give the same.
struct Schedule {
  const char* name;
  enum Order { forward, backward, greedy_warps, random } order;
  bool early_copies;
};
inline constexpr Schedule kSchedules[] = {{"in order", Schedule::forward, false},
                                          {"in order, copies at once", Schedule::forward, true},
                                          {"reversed", Schedule::backward, false},
                                          {"greedy warps, copies at once", Schedule::greedy_warps, true},
                                          {"random", Schedule::random, false}};

// Mistakes that a kernel could hold, made by the emulator in its place: the tests see to it that each is found.
enum class Fault { none, no_copy_wait, no_barrier, divergent_barrier, copy_past_rows, wrong_lane, swapped_registers };
struct Plant {
  Fault fault = Fault::none;
  int which = 0;  // no_barrier, divergent_barrier: the how-manieth barrier of the kernel
};

struct Word {  // what is known of 4 bytes of shared memory
  int writer = -1;
  int64_t write_epoch = -1, write_warp_epoch = -1;
  bool pending = false;  // an asynchronous copy of `writer` is under way
  int reader = -1;       // of the latest epoch; kMany: threads of several warps
  int64_t read_epoch = -1, read_warp_epoch = -1;
};

struct Copy {
  unsigned char* to;
  unsigned char bytes[16];
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  enum State { ready, in_warp, in_block, done } state = ready;
  int64_t epoch = 0, warp_epoch = 0;  // barriers passed
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
  std::vector<std::pair<const void*, int>> wide_loads;  // for bank conflicts
};

// What the lanes of a warp bring to, and take from, what they do together.
struct Meeting {
  int arrived = 0;
  const void* kind = nullptr;
  uint32_t in[32][13], out[32][4];
};

class Machine {
 public:
  static constexpr int kMany = -2;

  // Bytes that copies and wide loads may read.
  void allow(const void* p, int64_t bytes) { ranges_.push_back({static_cast<const char*>(p), bytes}); }
  void forget_ranges() { ranges_.clear(); }

  Schedule schedule = kSchedules[0];
  Plant plant;
  std::string error;           // the first one; empty: none
  int64_t bank_conflicts = 0;  // further passes of 16-byte loads, over all blocks
  int64_t warp_loads = 0;      // 16-byte loads of whole warps
  int64_t mma_count = 0;

  template <typename Params>
  int launch(void (*kernel)(Params), int64_t gx, int64_t gy, int64_t gz, int threads, int shared_bytes, const Params& params) {
    grid_[0] = gx, grid_[1] = gy, grid_[2] = gz;
    struct Call {
      void (*kernel)(Params);
      const Params* params;
    } call{kernel, &params};
    body_ = [](const void* c) {
      const auto* call = static_cast<const Call*>(c);
      call->kernel(*call->params);
    };
    argument_ = &call;
    for (int64_t z = 0; z < gz; ++z) {
      for (int64_t y = 0; y < gy; ++y) {
        for (int64_t x = 0; x < gx && error.empty(); ++x) run_block(x, y, z, threads, shared_bytes);
      }
    }
    argument_ = nullptr;
    return error.empty() ? 0 : 1;
  }

  // ---- called by the running fiber --------------------------------------------------------------------------------------------
  int thread() const { return current_; }
  int threads() const { return static_cast<int>(fibers_.size()); }
  int64_t block(int i) const { return block_[i]; }
  unsigned char* shared() { return shared_.data(); }

  [[gnu::format(printf, 2, 3)]] void fail(const char* format, ...) {
    if (error.empty()) {
      char text[300];
      va_list list;
      va_start(list, format);
      vsnprintf(text, sizeof text, format, list);
      va_end(list);
      error = std::string(text) + " (block " + std::to_string(block_[0]) + "," + std::to_string(block_[1]) + "," +
              std::to_string(block_[2]) + " thread " + std::to_string(current_) + ", schedule " + schedule.name + ")";
    }
    for (;;) swapcontext(&fibers_[current_].context, &main_);  // the block ends here
  }

  void barrier() {
    Fiber& f = fibers_[current_];
    const int64_t number = f.epoch;
    if (plant.fault == Fault::no_barrier && number - skipped_[current_] == plant.which && !skipped_[current_]) {
      skipped_[current_] = 1;
      return;
    }
    if (plant.fault == Fault::divergent_barrier && number == plant.which && current_ == 5 && !skipped_[5]) {
      skipped_[5] = 1;
      return;
    }
    if (++in_block_ == threads()) {
      in_block_ = 0;
      for (Fiber& other : fibers_) {
        ++other.epoch;
        if (other.state == Fiber::in_block) other.state = Fiber::ready;
      }
      return;
    }
    f.state = Fiber::in_block;
    yield();
  }

  // f(meeting) runs once, when the whole warp is there. `kind` tells operations apart.
  template <typename F>
  void together(const void* kind, const uint32_t* in, int count_in, uint32_t* out, int count_out, F f) {
    Meeting& m = meetings_[current_ / 32];
    const int lane = current_ % 32;
    if (m.arrived && m.kind != kind) fail("lanes of a warp meet in different operations");
    m.kind = kind;
    std::copy(in, in + count_in, m.in[lane]);
    if (++m.arrived == 32) {
      m.arrived = 0;
      f(m);
      for (int i = current_ / 32 * 32; i < current_ / 32 * 32 + 32; ++i) {
        ++fibers_[i].warp_epoch;
        fibers_[i].state = Fiber::ready;
      }
    } else {
      fibers_[current_].state = Fiber::in_warp;
      yield();
    }
    std::copy(m.out[lane], m.out[lane] + count_out, out);
  }

  void copy_async(void* to, const void* from, bool valid) {
    if (plant.fault == Fault::copy_past_rows && !valid && from == lowest_) {
      valid = true;
      from = past_end_;
    }
    if (reinterpret_cast<uintptr_t>(from) % 16 && valid) fail("an asynchronous copy reads from an address off 16 bytes");
    if (valid) check_global(from, 16);
    Copy c{static_cast<unsigned char*>(to), {}};
    if (valid) std::memcpy(c.bytes, from, 16);
    touch_write(to, 16, true);
    if (schedule.early_copies) std::memcpy(to, c.bytes, 16);
    fibers_[current_].open.push_back(c);
  }
  void copy_commit() {
    Fiber& f = fibers_[current_];
    f.groups.push_back(std::move(f.open));
    f.open.clear();
  }
  void copy_wait(int pending) {
    if (plant.fault == Fault::no_copy_wait) return;
    Fiber& f = fibers_[current_];
    for (; static_cast<int>(f.groups.size()) > pending; f.groups.pop_front()) {
      for (const Copy& c : f.groups.front()) {
        std::memcpy(c.to, c.bytes, 16);
        for (int i = 0; i < 4; ++i) {
          Word& w = words_[(c.to - shared()) / 4 + i];
          w = {current_, f.epoch, f.warp_epoch, false, -1, -1, -1};
        }
      }
    }
  }
  // The address that a copy without a valid row names, and one past the last row: for Fault::copy_past_rows.
  void plant_row(const void* lowest, const void* past_end) { lowest_ = lowest, past_end_ = past_end; }

  void check_global(const void* p, int64_t bytes) {
    const char* c = static_cast<const char*>(p);
    if (reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes)) fail("a load of %d bytes off its alignment", int(bytes));
    for (const Range& r : ranges_) {
      if (r.from <= c && c + bytes <= r.from + r.bytes) return;
    }
    fail("a read of global memory out of bounds");
  }

  void touch_read(const void* p, int bytes) {
    Word* w = find(p, bytes);
    const Fiber& f = fibers_[current_];
    for (int i = 0; i < bytes / 4; ++i, ++w) {
      if (w->writer < 0) fail("shared memory is read before it is written");
      if (w->pending) fail("shared memory is read while a copy into it is under way");
      if (w->writer != current_ && w->write_epoch >= f.epoch &&
          (w->writer / 32 != current_ / 32 || w->write_warp_epoch >= f.warp_epoch)) {
        fail("shared memory is read with no barrier behind another thread's write");
      }
      if (w->read_epoch == f.epoch && w->reader != current_) {
        w->reader = w->reader >= 0 && w->reader / 32 == current_ / 32 ? current_ : kMany;
      } else {
        w->reader = current_;
      }
      w->read_epoch = f.epoch;
      w->read_warp_epoch = f.warp_epoch;
    }
    if (bytes == 16) fibers_[current_].wide_loads.push_back({p, 0});
  }
  void touch_write(void* p, int bytes, bool pending) {
    Word* w = find(p, bytes);
    const Fiber& f = fibers_[current_];
    for (int i = 0; i < bytes / 4; ++i, ++w) {
      const bool same_warp = w->reader >= 0 && w->reader / 32 == current_ / 32;
      if (w->read_epoch >= f.epoch && w->reader != current_ && !(same_warp && w->read_warp_epoch < f.warp_epoch)) {
        fail("shared memory is written with no barrier behind another thread's read");
      }
      if (w->pending) fail("shared memory is written while a copy into it is under way");
      if (w->writer >= 0 && w->writer != current_ && w->write_epoch >= f.epoch) fail("two threads write one word of shared memory");
      *w = {current_, f.epoch, f.warp_epoch, pending, w->reader, w->read_epoch, w->read_warp_epoch};
    }
  }

 private:
  struct Range {
    const char* from;
    int64_t bytes;
  };

  Word* find(const void* p, int bytes) {
    const auto at = static_cast<const unsigned char*>(p) - shared();
    if (at < 0 || at + bytes > static_cast<int64_t>(shared_.size())) fail("shared memory is accessed out of bounds");
    if (at % bytes) fail("an access of %d bytes to shared memory off its alignment", bytes);
    return &words_[static_cast<size_t>(at / 4)];
  }

  void yield() { swapcontext(&fibers_[current_].context, &main_); }

  static void enter();

  void run_block(int64_t x, int64_t y, int64_t z, int threads, int shared_bytes) {
    block_[0] = x, block_[1] = y, block_[2] = z;
    in_block_ = 0;
    shared_.assign(static_cast<size_t>(round_up(shared_bytes, 128)), 0xa5);
    words_.assign(shared_.size() / 4, Word{});
    meetings_.assign(static_cast<size_t>(threads / 32), Meeting{});
    skipped_.assign(static_cast<size_t>(threads), 0);
    if (fibers_.size() != static_cast<size_t>(threads)) fibers_ = std::vector<Fiber>(static_cast<size_t>(threads));
    for (Fiber& f : fibers_) {
      f.stack.resize(128 * 1024);
      f.state = Fiber::ready;
      f.epoch = f.warp_epoch = 0;
      f.groups.clear(), f.open.clear(), f.wide_loads.clear();
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.data();
      f.context.uc_stack.ss_size = f.stack.size();
      f.context.uc_link = nullptr;
      makecontext(&f.context, enter, 0);
    }
    current_ = -1;
    for (int next; error.empty() && (next = pick()) >= 0;) {
      current_ = next;
      swapcontext(&main_, &fibers_[next].context);
    }
    if (!error.empty()) return;
    for (const Fiber& f : fibers_) {
      current_ = static_cast<int>(&f - fibers_.data());
      if (f.state != Fiber::done) return report("a barrier or a warp operation is not reached by all threads");
      if (!f.open.empty() ||
          (!f.groups.empty() && !std::all_of(f.groups.begin(), f.groups.end(), [](auto& g) { return g.empty(); })))
        return report("asynchronous copies are under way when the block ends");
    }
    count_bank_conflicts();
  }

  void report(const char* what) { error = std::string(what) + " (schedule " + schedule.name + ")"; }

  int pick() {
    const int n = threads();
    auto ready = [&](int i) { return fibers_[i].state == Fiber::ready; };
    if (schedule.order == Schedule::random) {
      const int from = static_cast<int>(random_.bits() % static_cast<uint64_t>(n));
      for (int i = 0; i < n; ++i) {
        if (ready((from + i) % n)) return (from + i) % n;
      }
      return -1;
    }
    if (schedule.order == Schedule::greedy_warps && current_ >= 0) {  // the last warp as far as it goes
      for (int i = current_ / 32 * 32; i < current_ / 32 * 32 + 32; ++i) {
        if (ready(i)) return i;
      }
    }
    if (schedule.order == Schedule::backward) {
      for (int i = n; i-- > 0;) {
        if (ready(i)) return i;
      }
      return -1;
    }
    // In order: on from the last one, so that warps stay together.
    for (int i = 0; i < n; ++i) {
      const int next = (current_ + 1 + i) % n;
      if (ready(next)) return next;
    }
    return -1;
  }

  // Hardware serves a 16-byte load of a warp in four passes of 8 lanes; in each, the 8 chunks of 128 bytes must differ or coincide.
  void count_bank_conflicts() {
    for (size_t first = 0; first < fibers_.size(); first += 32) {
      const size_t loads = fibers_[first].wide_loads.size();
      bool same = true;
      for (size_t i = first; i < first + 32; ++i) same = same && fibers_[i].wide_loads.size() == loads;
      if (!same) continue;  // lanes that went different ways
      warp_loads += static_cast<int64_t>(loads);
      for (size_t load = 0; load < loads; ++load) {
        for (size_t pass = first; pass < first + 32; pass += 8) {
          std::map<uintptr_t, std::map<uintptr_t, bool>> banks;
          size_t most = 1;
          for (size_t i = pass; i < pass + 8; ++i) {
            const auto at =
                reinterpret_cast<uintptr_t>(fibers_[i].wide_loads[load].first) - reinterpret_cast<uintptr_t>(shared_.data());
            auto& rows = banks[at / 16 % 8];
            rows[at / 128] = true;
            most = std::max(most, rows.size());
          }
          bank_conflicts += static_cast<int64_t>(most) - 1;
        }
      }
    }
  }

  std::vector<Range> ranges_;
  std::vector<unsigned char> shared_;
  std::vector<Word> words_;
  std::vector<Fiber> fibers_;
  std::vector<Meeting> meetings_;
  std::vector<int> skipped_;
  ucontext_t main_;
  int64_t grid_[3], block_[3];
  int current_ = -1, in_block_ = 0;
  void (*body_)(const void*) = nullptr;
  const void* argument_ = nullptr;
  const void* lowest_ = nullptr;
  const void* past_end_ = nullptr;
  test::Random random_{7};
};

inline Machine machine;

inline void Machine::enter() {
  machine.body_(machine.argument_);
  machine.fibers_[machine.current_].state = Fiber::done;
  for (;;) machine.yield();
}

}  // namespace tersor::cuda::emulator

#include "emulated_ptx.h"
