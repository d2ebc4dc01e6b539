// A lock that is given in the order of arrival. With a mutex, a thread that trains step after step takes it again
// before the one that waits for a prediction has woken up, and so for ever.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace er {

class Turns {
 public:
  void lock() {
    std::unique_lock<std::mutex> lock(mutex_);
    const uint64_t mine = last_++;
    next_.wait(lock, [&] { return serving_ == mine; });
  }
  void unlock() {
    std::lock_guard<std::mutex> lock(mutex_);
    serving_++;
    next_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable next_;
  uint64_t last_ = 0, serving_ = 0;
};

}  // namespace er
