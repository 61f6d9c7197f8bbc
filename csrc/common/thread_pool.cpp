#include "common/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace ck {
namespace {

constexpr int kSpins = 2000;  // some 20 us: the gap between two kernels of one layer
constexpr size_t kKeptScratch = size_t(32) << 20;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// One parallel_for: lives on the caller's stack while any worker is inside it.
struct Job {
  const std::function<void(int64_t)>& task;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::mutex error_mutex;
  std::exception_ptr error;

  void run() {
    try {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
    } catch (...) {
      next.store(count);  // the others stop at their next task
      std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  }
};

class Pool {
 public:
  // False if the pool is busy with another caller's job.
  bool run(int threads, Job& job) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    recruit(threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      wanted_ = threads - 1;
      epoch_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job.run();
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;  // whoever has not woken by now is not waited for
    lock.unlock();
    for (int spin = 0; spin < kSpins && active_.load(std::memory_order_acquire) != 0; ++spin) relax();
    lock.lock();
    done_.wait(lock, [&] { return active_.load() == 0; });
    return true;
  }

 private:
  // Makes sure of that many workers; a machine that refuses more threads gets by with those it has.
  void recruit(int helpers) {
    try {
      while (static_cast<int>(workers_.size()) < helpers) {
        const int index = static_cast<int>(workers_.size());
        workers_.emplace_back([this, index] { serve(index); });
      }
    } catch (const std::system_error&) {
    }
  }

  void serve(int index) {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < kSpins && epoch_.load(std::memory_order_acquire) == seen; ++spin) relax();
      Job* job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return epoch_.load() != seen; });
        seen = epoch_.load();
        if (job_ == nullptr || index >= wanted_) continue;
        job = job_;
        active_.fetch_add(1);
      }
      job->run();
      std::lock_guard<std::mutex> lock(mutex_);
      if (active_.fetch_sub(1, std::memory_order_acq_rel) == 1) done_.notify_one();
    }
  }

  std::mutex turn_;   // held by the caller whose job is running
  std::mutex mutex_;  // guards job_, wanted_ and the changes of epoch_ and active_
  std::condition_variable wake_, done_;
  std::atomic<uint64_t> epoch_{0};
  std::atomic<int> active_{0};  // workers inside the job
  Job* job_ = nullptr;
  int wanted_ = 0;
  std::vector<std::thread> workers_;
};

// The pool is never destroyed: its workers sleep until the process ends. After a fork the child has none of
// the workers and perhaps a locked mutex, so it leaves that pool alone and makes its own.
std::atomic<Pool*> g_pool{nullptr};
std::atomic<HostParallel> g_host{nullptr};

void forget_threads_after_fork() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] {
    g_pool.store(nullptr);
    g_host.store(nullptr);
  });
  (void)registered;
}

Pool& pool() {
  forget_threads_after_fork();
  Pool* current = g_pool.load();
  if (current == nullptr) {
    Pool* fresh = new Pool;
    if (g_pool.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;  // another thread was first; this one has no workers yet
  }
  return *current;
}

class Buffer {
 public:
  ~Buffer() { release(); }

  void* reserve(size_t bytes) {
    if (bytes > capacity_ || capacity_ > kKeptScratch) {
      release();
      memory_ = ::operator new(bytes, std::align_val_t(64));
      capacity_ = bytes;
    }
    return memory_;
  }

 private:
  void release() {
    ::operator delete(memory_, std::align_val_t(64));
    memory_ = nullptr;
    capacity_ = 0;
  }

  void* memory_ = nullptr;
  size_t capacity_ = 0;
};

}  // namespace

void parallel_for(int threads, int64_t count, const std::function<void(int64_t)>& task) {
  if (count <= 0) return;
  Job job{task, count};
  const HostParallel host = g_host.load();
  if (threads <= 1 || count == 1) {
    job.run();
  } else if (host != nullptr) {
    // Always the same number of threads: a team of another size would have to be made anew.
    host([](void* shared) { static_cast<Job*>(shared)->run(); }, &job, static_cast<unsigned>(threads), 0);
  } else if (!pool().run(static_cast<int>(std::min<int64_t>(threads, count)), job)) {
    job.run();
  }
  if (job.error) std::rethrow_exception(job.error);
}

void use_host_threads(HostParallel run) {
  forget_threads_after_fork();
  g_host.store(run);
}

void* thread_scratch(Scratch purpose, size_t bytes) {
  thread_local Buffer buffers[2];
  return buffers[static_cast<int>(purpose)].reserve(bytes);
}

}  // namespace ck
