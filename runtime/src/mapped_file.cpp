#include "mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "error.h"
#include "file.h"

namespace er {
WeightsFile::WeightsFile(const char* path, uint64_t start, uint64_t bytes)
    : path_(path), fd_(::open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)), start_(start), bytes_(bytes) {
  if (fd_ < 0) io_error("read", path_);
  try {
    opened_ = identity();
    if (start > opened_.size || (bytes != UINT64_MAX && bytes > opened_.size - start))
      throw Error{ER_BAD_FILE, text("%.400s is truncated", path)};
    if (bytes == UINT64_MAX) bytes_ = opened_.size - start;
  } catch (...) {
    ::close(fd_);
    throw;
  }
}

WeightsFile::~WeightsFile() {
  if (pages_) ::munmap(pages_, pages_bytes_);
  ::close(fd_);
}

WeightsFile::Identity WeightsFile::identity() const {
  struct stat status;
  if (::fstat(fd_, &status)) io_error("read", path_);
  if (!S_ISREG(status.st_mode)) throw Error{ER_IO, text("%.400s is not a regular file", path_.c_str())};
#if defined(__APPLE__)
  const struct timespec& modified = status.st_mtimespec;
#else
  const struct timespec& modified = status.st_mtim;
#endif
  return {static_cast<uint64_t>(status.st_size), modified.tv_sec, modified.tv_nsec};
}

bool WeightsFile::unchanged() const {
  const Identity now = identity();
  return now.size == opened_.size && now.seconds == opened_.seconds && now.nanoseconds == opened_.nanoseconds;
}

void WeightsFile::read(void* data, uint64_t bytes, uint64_t offset) const {
  uint64_t from = start_ + offset;
  for (char* at = static_cast<char*>(data); bytes;) {
    const ssize_t n = ::pread(fd_, at, bytes, static_cast<off_t>(from));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) io_error("read", path_);
    if (n == 0) throw Error{ER_BAD_FILE, text("%.400s is truncated", path_.c_str())};
    at += n;
    bytes -= static_cast<uint64_t>(n);
    from += static_cast<uint64_t>(n);
  }
}

const uint8_t* WeightsFile::map() {
  const uint64_t page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE)), skip = start_ % page;
  if (!pages_) {
    pages_bytes_ = skip + bytes_;
    void* pages = ::mmap(nullptr, pages_bytes_, PROT_READ, MAP_PRIVATE, fd_, static_cast<off_t>(start_ - skip));
    if (pages == MAP_FAILED) io_error("map", path_);
    pages_ = pages;
  }
  return static_cast<const uint8_t*>(pages_) + skip;
}

}  // namespace er
