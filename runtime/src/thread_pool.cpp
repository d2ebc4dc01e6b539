// The fixed pool behind ThreadPool. A convolution network runs thousands of short kernels a second: waking a sleeping
// thread for each costs half the speed of the small ones, so threads spin for a moment before they sleep.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "kernel.h"

namespace er {
namespace {

// Longer than the gap between two kernels of one step, short enough not to burn a core while data is decoded.
constexpr auto kSpin = std::chrono::microseconds(40);

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until ready() or until kSpin has passed; returns the last ready().
template <class F>
bool spin_until(F&& ready) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; i++) {
      if (ready()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return ready();
}

}  // namespace

struct ThreadPool::Impl {
  void (*call)(void*, int) = nullptr;
  void* f = nullptr;
  alignas(64) std::atomic<uint32_t> generation{0};  // grows by one for each dispatch; published after call and f
  alignas(64) std::atomic<int> pending{0};          // workers that have not finished this generation
  std::atomic<int> sleepers{0};
  std::atomic<bool> caller_sleeps{false};
  std::atomic<bool> stop{false};
  std::mutex mutex;
  std::condition_variable work, done;
  std::vector<std::thread> workers;

  // A sleeper announces itself before it looks a last time, and whoever changes the state looks for sleepers afterwards
  // (all sequentially consistent), so no wake-up is lost.
  void worker(int thread) {
    uint32_t seen = 0;
    for (;;) {
      if (!spin_until([&] { return generation.load(std::memory_order_acquire) != seen; })) {
        std::unique_lock<std::mutex> lock(mutex);
        sleepers.fetch_add(1);
        work.wait(lock, [&] { return generation.load() != seen; });
        sleepers.fetch_sub(1);
      }
      seen++;
      if (stop.load()) return;
      call(f, thread);
      if (pending.fetch_sub(1) == 1 && caller_sleeps.load()) {
        std::lock_guard<std::mutex> lock(mutex);
        done.notify_one();
      }
    }
  }

  void publish() {
    generation.fetch_add(1);
    if (sleepers.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex);
      work.notify_all();
    }
  }

  ~Impl() {
    stop.store(true);
    publish();
    for (std::thread& thread : workers) thread.join();
  }
};

ThreadPool::ThreadPool(int threads) : threads_(threads), impl_(nullptr) {
  if (threads_ <= 1) return;
  impl_ = new Impl;
  try {
    impl_->workers.reserve(threads_ - 1);
    for (int t = 1; t < threads_; t++) impl_->workers.emplace_back([impl = impl_, t] { impl->worker(t); });
  } catch (...) {
    delete impl_;
    throw;
  }
}

ThreadPool::~ThreadPool() { delete impl_; }

void ThreadPool::split_ranges(int64_t items, int64_t grain, bool alone, void (*call)(void*, int64_t, int64_t, int),
                              void* f) noexcept {
  if (alone || threads_ == 1) return call(f, 0, items, 0);
  run([&](int t) {
    const int64_t chunks = (items + grain - 1) / grain, n = threads_;
    const int64_t begin = chunks * t / n * grain, end = std::min(items, chunks * (t + 1) / n * grain);
    if (begin < end) call(f, begin, end, t);
  });
}

void ThreadPool::dispatch(void (*call)(void*, int), void* f) noexcept {
  if (!impl_) return call(f, 0);
  Impl& pool = *impl_;
  pool.call = call;
  pool.f = f;
  pool.pending.store(threads_ - 1);
  pool.publish();
  call(f, 0);
  const auto finished = [&] { return pool.pending.load() == 0; };
  if (spin_until(finished)) return;
  std::unique_lock<std::mutex> lock(pool.mutex);
  pool.caller_sleeps.store(true);
  pool.done.wait(lock, finished);
  pool.caller_sleeps.store(false);
}

}  // namespace er
