#include "spill_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>

#include "error.h"

namespace er {
namespace {

constexpr uint64_t kChunkBytes = uint64_t{4} << 20;
constexpr int kEarlyEnd = -1;

const char* reason(int error) {
  return error == kEarlyEnd ? "it is shorter than what was written" : std::strerror(error);
}

int unnamed_file(const std::string& directory) {
  std::string path = directory + "/edge-razor-spill-XXXXXX";
  const int file = ::mkstemp(path.data());
  if (file < 0)
    throw Error{ER_IO, text("cannot make a spill file in '%.500s': %s; choose another directory", directory.c_str(),
                            std::strerror(errno))};
  ::unlink(path.c_str());
  ::fcntl(file, F_SETFD, FD_CLOEXEC);
  return file;
}

}  // namespace

SpillFile::SpillFile(const char* directory) : directory_(directory), file_(unnamed_file(directory_)) {
  try {
    thread_ = std::thread([this] { work(); });
  } catch (...) {
    ::close(file_);
    throw;
  }
}

SpillFile::~SpillFile() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  queued_.notify_one();
  thread_.join();
  ::close(file_);
}

void SpillFile::reserve(uint64_t bytes) {
#if defined(__linux__)
  int result;
  do result = ::fallocate(file_, 0, 0, static_cast<off_t>(bytes));
  while (result && errno == EINTR);
  if (result && errno != EOPNOTSUPP && errno != ENOSYS)
    throw Error{ER_IO, text("the spill file in '%.500s' needs %llu bytes: %s; free space there or choose another "
                            "directory",
                            directory_.c_str(), static_cast<unsigned long long>(bytes), std::strerror(errno))};
#else
  (void)bytes;
#endif
}

void SpillFile::start(Transfer& transfer) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    transfer.done = false;
    transfer.error = 0;
    transfer.next = nullptr;
    (last_ ? last_->next : first_) = &transfer;
    last_ = &transfer;
  }
  queued_.notify_one();
}

er_status SpillFile::wait(Transfer& transfer) {
  using Clock = std::chrono::steady_clock;
  std::unique_lock<std::mutex> lock(mutex_);
  if (!transfer.done) {
    const Clock::time_point begin = Clock::now();
    finished_.wait(lock, [&] { return transfer.done; });
    waited_ += std::chrono::duration<double>(Clock::now() - begin).count();
  }
  const int error = transfer.error ? transfer.error : lost_;
  if (!error) return ER_OK;
  if (transfer.write || lost_)
    return fail(ER_IO, "cannot write the spill file in '%.500s': %s; free space there or choose another directory",
                directory_.c_str(), reason(error));
  return fail(ER_IO, "cannot read the spill file in '%.500s': %s", directory_.c_str(), reason(error));
}

void SpillFile::drain() {
  std::unique_lock<std::mutex> lock(mutex_);
  finished_.wait(lock, [&] { return !first_ && !busy_; });
}

void SpillFile::totals(er_spill_info* info) {
  std::lock_guard<std::mutex> lock(mutex_);
  info->written_bytes = written_;
  info->read_bytes = read_;
  info->waited_seconds = waited_;
}

void SpillFile::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    queued_.wait(lock, [&] { return first_ || stop_; });
    if (!first_) return;
    Transfer* const transfer = first_;
    first_ = transfer->next;
    if (!first_) last_ = nullptr;
    const Transfer copy = *transfer;  // its owner may use it again once it is done
    busy_ = true;
    lock.unlock();
    const int error = move(copy);
    lock.lock();
    transfer->error = error;
    transfer->done = true;
    if (!error) (copy.write ? written_ : read_) += copy.bytes;
    finished_.notify_all();
    lock.unlock();
    if (!error) forget(copy);
    lock.lock();
    busy_ = false;
    finished_.notify_all();
  }
}

// 0, errno, or kEarlyEnd.
int SpillFile::move(const Transfer& transfer) {
  for (uint64_t done = 0; done < transfer.bytes;) {
    const size_t count = std::min(kChunkBytes, transfer.bytes - done);
    const off_t at = static_cast<off_t>(transfer.offset + done);
    const ssize_t moved = transfer.write ? ::pwrite(file_, transfer.data + done, count, at)
                                         : ::pread(file_, transfer.data + done, count, at);
    if (moved < 0 && errno == EINTR) continue;
    if (moved < 0) return errno;
    if (moved == 0) return transfer.write ? ENOSPC : kEarlyEnd;
#if defined(__linux__)
    if (transfer.write) ::sync_file_range(file_, at, moved, SYNC_FILE_RANGE_WRITE);
#endif
    done += static_cast<uint64_t>(moved);
  }
  return 0;
}

// Takes the tensor's pages out of the page cache, which counts towards the cap of a memory cgroup. Dirty pages do not
// go, so what was written is first brought to the disk; the next transfer waits for that.
void SpillFile::forget(const Transfer& transfer) {
#if defined(__linux__)
  const off_t at = static_cast<off_t>(transfer.offset), count = static_cast<off_t>(transfer.bytes);
  if (transfer.write &&
      ::sync_file_range(file_, at, count,
                        SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER)) {
    if (errno == EIO || errno == ENOSPC) {
      const int error = errno;
      std::lock_guard<std::mutex> lock(mutex_);
      lost_ = error;
    }
  }
  ::posix_fadvise(file_, at, count, POSIX_FADV_DONTNEED);
#else
  (void)transfer;
#endif
}

}  // namespace er
