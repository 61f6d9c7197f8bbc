// Runs the threads of a block as fibers, one at a time and in random order, and watches over shared memory.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "cuda_shim.h"

namespace ck {
namespace cuda {
namespace shim {

constexpr int kWarp = 32, kMaxThreads = 1024, kMaxShared = 163 * 1024;
constexpr uint32_t kAll = ~0u;
constexpr int kGuard = 4096;  // bytes on both sides of shared memory
constexpr int kPoison = 0xFF;
constexpr size_t kStack = size_t(128) << 10;
constexpr uint64_t kStackEnd = 0x5AFE57ACC0DEull;

struct Random {  // splitmix64
  uint64_t state;
  uint64_t operator()() {
    uint64_t z = state += 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
  }
};

// A set bit of `mask`, which is not zero and has `size` bits; any of them, if 16 bits of `random` are so.
inline int pick(uint32_t mask, int size, uint32_t random) {
  const int turn = int((random & 0xffff) * unsigned(size) >> 16);
  const int bit = __builtin_ctzll((uint64_t(mask) | uint64_t(mask) << size) >> turn) + turn;
  return bit < size ? bit : bit - size;
}

struct Fiber {
  jmp_buf registers;
  bool started = false;
  std::unique_ptr<char[]> stack;
};

struct Copy {
  char* shared;
  const void* global;  // null: zeros
  int group;
};

struct Thread : Fiber {
  std::array<int, kSyncs> executed;
  std::vector<Copy> copies;  // in flight
  int groups;                // committed
};

// What the lanes of a warp meet for: the last to come computes for all, from every lane's own operands.
struct Meeting {
  const char* what;
  void (*finish)(void** operands);
  Where where;
};

struct Warp {
  uint32_t ready, meeting, at_barrier, gone;  // the lanes; each is in one of these
  Meeting site;                               // of those in `meeting`
  void* operands[kWarp];
};

inline bool same(const Where& a, const Where& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

inline std::string text(const char* what, const Where& where) {
  const char* slash = std::strrchr(where.file, '/');
  return std::string(what) + " (" + (slash ? slash + 1 : where.file) + ":" + std::to_string(where.line) + ")";
}

// Runs a block at a time. Fibers live on from block to block.
class Multiprocessor {
 public:
  // The one that runs the caller, if any.
  static Multiprocessor*& running() {
    static thread_local Multiprocessor* one = nullptr;
    return one;
  }

  // Returns what went wrong, or nothing.
  std::string run(const std::function<void()>& body, int64_t block, int threads, int64_t shared_bytes,
                  uint64_t seed) {
    body_ = &body, threads_ = threads, shared_bytes_ = shared_bytes;
    random_.state = seed * 0x2545F4914F6CDD1Dull + uint64_t(block);
    // How often a warp that could go on is left for another: from every other switch to never, so that some
    // warps get as far ahead as barriers let them.
    constexpr uint32_t kWander[] = {1, 31, 1023, ~0u};
    wander_ = kWander[random_() % 4];
    std::memset(shared_ - kGuard, kPoison, size_t(shared_bytes + 2 * kGuard));
    while (int(fibers_.size()) < threads) fibers_.push_back(std::make_unique<Thread>());
    for (int i = 0; i < threads; ++i) {
      fibers_[i]->executed = {};
      fibers_[i]->copies.clear();
      fibers_[i]->groups = 0;
    }
    for (int i = 0; i < threads / kWarp; ++i) warps_[i] = {kAll, 0, 0, 0, {}, {}};
    warps_ready_ = all_warps();
    arrived_ = gone_ = 0;
    error_.clear();
    blockIdx.x = unsigned(block);
    current_ = &host_;
    next(true);
    if (error_.empty()) check_ends();
    if (!error_.empty()) {
      for (auto& fiber : fibers_) fiber->started = false;  // they stopped halfway
      error_ = "block " + std::to_string(block) + ", " + error_;
    }
    return error_;
  }

  [[noreturn]] void fail(const std::string& why) {
    halt("thread " + std::to_string(threadIdx.x) + ": " + why);
  }

  // Whether this thread's next `sync` is the one that is left out.
  bool drops(Sync sync) { return me().executed[sync]++ == dropped[sync]; }

  void sync_threads(Where where) {
    if (drops(kBarrier)) return;
    if (arrived_ == 0) barrier_ = where;
    if (!same(barrier_, where)) {
      fail(text("__syncthreads", where) + " while others are in " + text("another", barrier_));
    }
    stop(warp().at_barrier);
    if (++arrived_ == threads_) {
      for (int i = 0; i < threads_ / kWarp; ++i) warps_[i].ready = kAll, warps_[i].at_barrier = 0;
      warps_ready_ = all_warps();
      arrived_ = 0;
    }
    next(arrived_ == 0);
  }

  void meet(const Meeting& site, void* operands) {
    Warp& warp = this->warp();
    if (warp.meeting == 0) warp.site = site;
    if (warp.site.finish != site.finish || !same(warp.site.where, site.where)) {
      fail(text(site.what, site.where) + " while lanes of its warp are in " +
           text(warp.site.what, warp.site.where));
    }
    warp.operands[threadIdx.x % kWarp] = operands;
    stop(warp.meeting);
    if (warp.meeting == kAll) {
      warp.site.finish(warp.operands);
      warp.ready = kAll, warp.meeting = 0;
      warps_ready_ |= 1u << threadIdx.x / kWarp;
    }
    next(false);
  }

  void copy(char* shared, const void* global, Where where) {
    check_shared(shared, "copy_async_16", where);
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
      fail(text("copy_async_16", where) + ": the global address is not a multiple of 16 bytes");
    }
    const Copy copy = {shared, global, me().groups};
    if (random_() % 4 == 0) return land(copy);
    std::memset(shared, kPoison, 16);
    me().copies.push_back(copy);
  }
  void commit() { ++me().groups; }
  void wait(int pending) {
    if (drops(kCopyWait)) return;
    Thread& thread = me();
    auto end = thread.copies.begin();
    for (; end != thread.copies.end() && end->group < thread.groups - pending; ++end) land(*end);
    thread.copies.erase(thread.copies.begin(), end);
  }

  char* shared() { return shared_; }

  // 16 bytes that lie in shared memory and are aligned.
  void check_shared(const void* address, const char* what, Where where) {
    const int64_t offset = static_cast<const char*>(address) - shared_;
    if (offset < 0 || offset + 16 > shared_bytes_) {
      fail(text(what, where) + ": offset " + std::to_string(offset) + " is outside the block's " +
           std::to_string(shared_bytes_) + " bytes of shared memory");
    }
    if (offset % 16 != 0) {
      fail(text(what, where) + ": offset " + std::to_string(offset) +
           " in shared memory is not a multiple of 16 bytes");
    }
  }

  std::array<int, kSyncs> dropped;
  std::array<int, kSyncs> executed;  // the most by any thread

 private:
  static void land(const Copy& copy) {
    if (copy.global) {
      std::memcpy(copy.shared, copy.global, 16);
    } else {
      std::memset(copy.shared, 0, 16);
    }
  }

  Thread& me() { return *fibers_[threadIdx.x]; }
  Warp& warp() { return warps_[threadIdx.x / kWarp]; }
  uint32_t all_warps() const { return kAll >> (32 - threads_ / kWarp); }

  // The running lane goes from `ready` into another set.
  void stop(uint32_t& set) {
    const uint32_t lane = 1u << threadIdx.x % kWarp;
    set |= lane;
    if ((warp().ready &= ~lane) == 0) warps_ready_ &= ~(1u << threadIdx.x / kWarp);
  }

  // Lets a random thread that can go on do so; returns when it is the caller's turn again.
  void next(bool any_warp) {
    if (warps_ready_ == 0) halt("nobody can go on: " + states());
    const uint64_t random = random_();
    int w = threadIdx.x / kWarp;
    if (any_warp || warps_[w].ready == 0 || (random >> 32 & wander_) == 0)
      w = pick(warps_ready_, threads_ / kWarp, uint32_t(random));
    threadIdx.x = unsigned(w * kWarp + pick(warps_[w].ready, kWarp, uint32_t(random >> 16)));
    resume(me());
  }

  // Registers are kept by _setjmp, which needs no system call; a context of the system starts a fiber.
  void resume(Fiber& fiber) {
    Fiber* const caller = current_;
    if (caller == &fiber || _setjmp(caller->registers) != 0) return;
    current_ = &fiber;
    if (fiber.started || &fiber == &host_) _longjmp(fiber.registers, 1);
    if (!fiber.stack) {
      fiber.stack.reset(new char[kStack]);
      std::memcpy(fiber.stack.get(), &kStackEnd, sizeof(kStackEnd));
    }
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, &Multiprocessor::enter, 0);
    setcontext(&context);
  }

  static void enter() { running()->live(); }
  void live() {
    for (;;) {
      (*body_)();
      Thread& thread = me();
      if (!thread.copies.empty()) {
        fail("ends with " + std::to_string(thread.copies.size()) + " asynchronous copies not waited for");
      }
      for (int i = 0; i < kSyncs; ++i) executed[i] = std::max(executed[i], thread.executed[i]);
      stop(warp().gone);
      if (++gone_ == threads_) {
        resume(host_);
      } else {
        next(false);
      }
    }
  }

  // Ends the block; its fibers are left where they are, and their stacks used anew.
  [[noreturn]] void halt(const std::string& why) {
    error_ = why;
    current_ = &host_;
    _longjmp(host_.registers, 1);
  }

  // "threads 0-15 wait in __syncthreads (file:line), threads 16-31 ended".
  std::string states() {
    std::string all, last;
    int first = 0;
    for (int i = 0; i <= threads_; ++i) {
      std::string state;
      if (i < threads_) {
        const Warp& warp = warps_[i / kWarp];
        const uint32_t lane = 1u << i % kWarp;
        state = warp.gone & lane         ? "ended"
                : warp.at_barrier & lane ? "wait in " + text("__syncthreads", barrier_)
                                         : "wait in " + text(warp.site.what, warp.site.where);
      }
      if (i > 0 && state != last) {
        all += (all.empty() ? "threads " : ", threads ") + std::to_string(first) + "-" +
               std::to_string(i - 1) + " " + last;
        first = i;
      }
      last = state;
    }
    return all;
  }

  // Nothing was written beside shared memory or beyond a stack.
  void check_ends() {
    const auto touched = [](char byte) { return byte != char(kPoison); };
    char* const end = shared_ + shared_bytes_;
    char* const after = std::find_if(end, end + kGuard, touched);
    char* const before = std::find_if(shared_ - kGuard, shared_, touched);
    if (after != end + kGuard || before != shared_) {
      const int64_t offset = (after != end + kGuard ? after : before) - shared_;
      error_ = "a write outside shared memory: at offset " + std::to_string(offset) + " of " +
               std::to_string(shared_bytes_) + " bytes";
    }
    for (int i = 0; i < threads_; ++i) {
      if (std::memcmp(fibers_[i]->stack.get(), &kStackEnd, sizeof(kStackEnd)) != 0) {
        std::fprintf(stderr, "cuda_shim: a thread needs more stack than %zu bytes\n", kStack);
        std::abort();  // other memory is overwritten
      }
    }
  }

  const std::function<void()>* body_ = nullptr;
  int threads_ = 0;
  int64_t shared_bytes_ = 0;
  std::unique_ptr<char[]> memory_{new char[kMaxShared + 2 * kGuard + 128]};
  char* shared_ = memory_.get() + kGuard + (-(reinterpret_cast<uintptr_t>(memory_.get()) + kGuard) & 127);
  std::vector<std::unique_ptr<Thread>> fibers_;
  Fiber host_;
  Fiber* current_ = nullptr;
  Warp warps_[kMaxThreads / kWarp];
  uint32_t warps_ready_ = 0;
  int arrived_ = 0, gone_ = 0;
  Where barrier_{};
  Random random_{};
  uint32_t wander_ = 0;
  std::string error_;
};

}  // namespace shim
}  // namespace cuda
}  // namespace ck
