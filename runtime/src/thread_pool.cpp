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

ThreadPool::ThreadPool(int threads) : threads_(threads), parts_(new Part[threads]), impl_(nullptr) {
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

void ThreadPool::cut(int64_t units) noexcept {
  for (int64_t t = 0; t < threads_; t++) {
    const uint64_t begin = units * t / threads_, end = units * (t + 1) / threads_;
    parts_[t].range.store(begin << 32 | end, std::memory_order_relaxed);  // run() publishes it
  }
}

bool ThreadPool::next(int thread, int64_t* begin, int64_t* end, bool own) noexcept {
  for (int i = 0; i < (own ? 1 : threads_); i++) {
    std::atomic<uint64_t>& range = parts_[(thread + i) % threads_].range;
    uint64_t left = range.load();
    for (;;) {
      const uint64_t first = left >> 32, last = left & UINT32_MAX;
      if (first == last) break;
      const uint64_t half = threads_ == 1 ? last - first : (last - first + 1) / 2;
      const uint64_t cut = i == 0 ? first + half : last - half;
      if (!range.compare_exchange_weak(left, i == 0 ? cut << 32 | last : first << 32 | cut)) continue;
      if (i > 0 && half > 1) {  // taken over: the first half of it now, and others may take of the rest
        const uint64_t some = cut + (half + 1) / 2;
        parts_[thread].range.store(some << 32 | last);
        *begin = cut, *end = some;
        return true;
      }
      *begin = i == 0 ? first : cut, *end = i == 0 ? cut : last;
      return true;
    }
  }
  return false;
}

void ThreadPool::share_ranges(int64_t items, int64_t grain, bool alone, void (*call)(void*, int64_t, int64_t, int),
                              void* f) noexcept {
  constexpr int64_t kUnits = 32;  // a thread
  if (alone || threads_ == 1) return call(f, 0, items, 0);
  const int64_t chunks = (items + grain - 1) / grain, most = kUnits * threads_;
  const int64_t step = (chunks + most - 1) / most * grain;
  if (!step) return;
  cut((items + step - 1) / step);
  run([&](int thread) {
    for (int64_t begin, end; next(thread, &begin, &end);) call(f, begin * step, std::min(items, end * step), thread);
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
