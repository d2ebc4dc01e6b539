// The contract between the executor and the kernels. Kernel files are compiled once per instruction set, each time with
// another ER_ISA (namespace) and ER_VECTOR_BYTES; registry.cpp collects the tables.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "edge_razor.h"

namespace er {

// A fixed pool; the caller is thread 0. How work is cut depends on the number of threads alone, so the same number
// gives the same bits; which thread does a piece may change, so what is added up is added up by piece, not by thread.
class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  int threads() const { return threads_; }
  // Calls body(thread) once on every thread and returns when all are done. Not reentrant. body must not throw.
  template <class F>
  void run(F&& body) {
    dispatch([](void* f, int thread) { (*static_cast<F*>(f))(thread); },
             const_cast<void*>(static_cast<const void*>(&body)));
  }
  // Splits [0, items) into one contiguous range a thread (in multiples of `grain`): body(begin, end, thread). `alone`:
  // the caller does all of it, through the same copy of the body.
  template <class F>
  void split(int64_t items, int64_t grain, F&& body, bool alone = false) {
    split_ranges(
        items, grain, alone,
        [](void* f, int64_t begin, int64_t end, int thread) { (*static_cast<F*>(f))(begin, end, thread); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }
  // The same where it does not matter who does what: a thread that is done takes over from another, so that none waits
  // for one that was interrupted. body(begin, end, thread) may be called several times by a thread.
  template <class F>
  void share(int64_t items, int64_t grain, F&& body, bool alone = false) {
    share_ranges(
        items, grain, alone,
        [](void* f, int64_t begin, int64_t end, int thread) { (*static_cast<F*>(f))(begin, end, thread); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }
  // share() by hand: before run(), cuts [0, units) into one contiguous part a thread; `units` are below 2^32.
  void cut(int64_t units) noexcept;
  // Inside run(): the first half of what is left of the thread's part, or else of the last half of what is left of
  // another's, unless the thread is to do its `own` part only. False if nothing is left.
  bool next(int thread, int64_t* begin, int64_t* end, bool own = false) noexcept;

 private:
  struct alignas(64) Part {
    std::atomic<uint64_t> range;  // begin << 32 | end
  };
  void dispatch(void (*call)(void*, int), void* f) noexcept;
  void split_ranges(int64_t items, int64_t grain, bool alone, void (*call)(void*, int64_t, int64_t, int),
                    void* f) noexcept;
  void share_ranges(int64_t items, int64_t grain, bool alone, void (*call)(void*, int64_t, int64_t, int),
                    void* f) noexcept;
  int threads_;
  std::unique_ptr<Part[]> parts_;  // [threads]
  struct Impl;
  Impl* impl_;
};

struct Call {
  const int64_t* ints;
  uint32_t n_ints;
  const float* floats;
  uint32_t n_floats;
  const er_operand* operands;
  uint32_t n_operands;
  ThreadPool* pool;     // null while checking
  er_context* context;  // null while checking
  template <class T>
  T* as(int operand) const {
    return static_cast<T*>(operands[operand].data);
  }
};

struct Kernel {
  const char* name;
  // Says what is wrong with the call's attributes, operand counts and operand sizes ("" if nothing). Runs at plan load:
  // operands have sizes, and data is non-null exactly where an operand is present, but must not be read. After it
  // passes, run() may trust everything except tensor contents. Those of the portable kernels serve every instruction
  // set (check_call); others need none.
  std::string (*check)(const Call& call);
  // Scratch bytes for attributes that check() would accept; null: none. A kernel with scratch() takes it as its last
  // operand, whose size the executor compares with this (check() cannot: it does not know the threads). Operands are
  // aligned to 8 bytes at least. Must not crash or overflow on any attributes (returns UINT64_MAX for nonsense).
  uint64_t (*scratch)(const Call& call, int threads);
  // Runs the kernel. Reports a non-finite value it stumbles on by returning false. Null: only a session can run it.
  bool (*run)(const Call& call);
};

// A table ends with an entry whose name is null.
// Each kernel file defines `const Kernel <family>_kernels[]` in namespace er::ER_ISA and is listed in registry.cpp.

}  // namespace er
