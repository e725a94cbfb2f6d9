#include "thread_pool.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace midstream {
namespace {

using Body = void (*)(const void*, std::int64_t, std::int64_t);

/// Waking a thread takes some 5 to 60 us, so one that has just worked looks out for more itself
/// for a while: the calls of a prefill may follow each other at once.
constexpr std::chrono::microseconds kLookOut{50};
constexpr int kPauses = 1000;  // some 20 to 50 us
constexpr int kMaxThreads = 64;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

struct Job {
  Body body;
  const void* context;
  std::int64_t rows;
  std::int64_t part;  // rows of a range
};

class Pool {
 public:
  /// Whether the job was run; false where another caller has the pool.
  bool run(const Job& job, int parts) {
    const std::unique_lock<std::mutex> mine(callers_, std::try_to_lock);
    if (!mine) return false;
    grow(parts - 1);
    job_ = job;
    left_.store(workers_, std::memory_order_relaxed);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      round_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work(job, 0);
    for (int p = workers_ + 1; p < parts; ++p) work(job, p);  // threads that could not be had
    for (int i = 0; left_.load(std::memory_order_acquire) > 0; ++i) {
      // Where there are more threads than cores, the one that is waited for may need this core.
      i < kPauses ? pause() : std::this_thread::yield();
    }
    return true;
  }

 private:
  static void work(const Job& job, int part) {
    const std::int64_t begin = part * job.part;
    const std::int64_t end = std::min(begin + job.part, job.rows);
    if (begin < end) job.body(job.context, begin, end);
  }

  void grow(int wanted) {
    for (; workers_ < wanted; ++workers_) {
      try {
        const int part = workers_ + 1;
        const std::uint64_t seen = round_.load(std::memory_order_relaxed);
        std::thread([this, part, seen] { serve(part, seen); }).detach();
      } catch (const std::system_error&) {
        return;
      }
    }
  }

  void serve(int part, std::uint64_t seen) {
    for (;;) {
      wait_for_other_than(seen);
      seen = round_.load(std::memory_order_acquire);
      work(job_, part);
      left_.fetch_sub(1, std::memory_order_release);
    }
  }

  void wait_for_other_than(std::uint64_t seen) {
    const auto until = std::chrono::steady_clock::now() + kLookOut;
    while (std::chrono::steady_clock::now() < until) {
      if (round_.load(std::memory_order_acquire) != seen) return;
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen; });
  }

  std::mutex callers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<std::uint64_t> round_{0};
  std::atomic<int> left_{0};
  Job job_{};
  int workers_ = 0;
};

/// Never destroyed: its threads may outlive every static at exit, and end with the process.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
  static const bool once = [] {
    current.store(new Pool);
#if defined(__unix__) || defined(__APPLE__)
    // A child of fork() has none of its parent's threads, and maybe a locked mutex: it starts anew.
    pthread_atfork(nullptr, nullptr, [] { current.store(new Pool); });
#endif
    return true;
  }();
  static_cast<void>(once);
  return *current.load();
}

}  // namespace

void parallel_rows(std::int64_t rows, int threads, std::int64_t grain, Body body,
                   const void* context) {
  threads = std::min(threads, kMaxThreads);
  if (threads > 1 && rows > grain) {
    const std::int64_t grains = (rows + grain - 1) / grain;
    const std::int64_t part = (grains + threads - 1) / threads * grain;
    const auto parts = static_cast<int>((rows + part - 1) / part);
    if (pool().run({body, context, rows, part}, parts)) return;
  }
  body(context, 0, rows);
}

}  // namespace midstream
