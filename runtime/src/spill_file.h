// The file that tensors lie in between the forward and the backward pass, and the thread that moves them.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>

#include "edge_razor.h"

namespace er {

// One tensor on its way; lives in the session, so that starting a transfer allocates nothing. The memory must stay
// untouched until it is done.
struct Transfer {
  uint8_t* data = nullptr;
  uint64_t bytes = 0, offset = 0;
  bool write = false;
  bool done = true;
  int error = 0;  // errno; -1: the file ended early
  Transfer* next = nullptr;
};

class SpillFile {
 public:
  // Makes an unnamed file in `directory`: nothing is left behind, even after a crash. Throws Error with ER_IO.
  explicit SpillFile(const char* directory);
  ~SpillFile();
  SpillFile(const SpillFile&) = delete;
  SpillFile& operator=(const SpillFile&) = delete;

  // Makes room for `bytes`, so that a full disk is noticed before training. Throws Error with ER_IO.
  void reserve(uint64_t bytes);
  // Queues a transfer; they are done in the order of the calls.
  void start(Transfer& transfer);
  // Returns when the transfer is done: ER_OK, or ER_IO with a message.
  er_status wait(Transfer& transfer);
  // Returns when nothing is under way.
  void drain();
  // Totals since the file was opened.
  void totals(er_spill_info* info);

 private:
  void work();
  int move(const Transfer& transfer);
  void forget(const Transfer& transfer);

  const std::string directory_;
  int file_;
  std::mutex mutex_;  // guards everything below
  std::condition_variable queued_, finished_;
  Transfer *first_ = nullptr, *last_ = nullptr;
  bool busy_ = false, stop_ = false;
  int lost_ = 0;  // errno of a page that the system could not bring to the disk later
  uint64_t written_ = 0, read_ = 0;
  double waited_ = 0;
  std::thread thread_;
};

}  // namespace er
