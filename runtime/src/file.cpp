#include "file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "error.h"

namespace er {

void io_error(const char* verb, const std::string& path) {
  throw Error{ER_IO, text("cannot %s %.400s: %s", verb, path.c_str(), std::strerror(errno))};
}

File::File(std::string path, int flags, const char* verb)
    : path_(std::move(path)), fd_(::open(path_.c_str(), flags | O_CLOEXEC, 0666)) {
  if (fd_ < 0) io_error(verb, path_);
}

File::~File() {
  if (fd_ >= 0) ::close(fd_);
}

uint64_t File::size() const {
  struct stat status;
  if (::fstat(fd_, &status)) io_error("read", path_);
  if (!S_ISREG(status.st_mode)) throw Error{ER_IO, text("%.400s is not a regular file", path_.c_str())};
  return static_cast<uint64_t>(status.st_size);
}

void File::read(void* data, size_t bytes, uint64_t offset) const {
  for (char* at = static_cast<char*>(data); bytes;) {
    const ssize_t n = ::pread(fd_, at, bytes, static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) io_error("read", path_);
    if (n == 0) throw Error{ER_BAD_FILE, text("%.400s is truncated", path_.c_str())};
    at += n;
    bytes -= static_cast<size_t>(n);
    offset += static_cast<uint64_t>(n);
  }
}

void File::write(const void* data, size_t bytes) const {
  for (const char* at = static_cast<const char*>(data); bytes;) {
    const ssize_t n = ::write(fd_, at, bytes);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) io_error("write", path_);
    at += n;
    bytes -= static_cast<size_t>(n);
  }
}

void File::write_at(const void* data, size_t bytes, uint64_t offset) const {
  if (::lseek(fd_, static_cast<off_t>(offset), SEEK_SET) < 0) io_error("write", path_);
  write(data, bytes);
}

void File::close() {
  const int fd = fd_;
  fd_ = -1;
  if (::close(fd)) io_error("write", path_);
}

ReplacedFile::ReplacedFile(const char* path)
    : path_(path), temporary_(path_ + ".tmp"), file_(temporary_, O_WRONLY | O_CREAT | O_NOFOLLOW, "write") {
  // Not truncated before it is ours: another process may be writing it. If that one renamed it between our open and our
  // lock, what we have open is its finished file. (Where the file system knows no locks, there is none.)
  struct stat opened, named;
  const int fd = file_.descriptor();
  const bool busy = ::flock(fd, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK;
  if (busy || ::fstat(fd, &opened) || ::stat(temporary_.c_str(), &named) || opened.st_ino != named.st_ino ||
      opened.st_dev != named.st_dev)
    throw Error{ER_IO, text("cannot write %.400s: another process or thread is writing it", path)};
  if (::ftruncate(fd, 0)) {
    ::unlink(temporary_.c_str());
    io_error("write", temporary_);
  }
}

ReplacedFile::~ReplacedFile() {
  if (!done_) ::unlink(temporary_.c_str());
}

void ReplacedFile::commit() {
  const auto flush = [](int fd) {
    int result;
    do result = ::fsync(fd);
    while (result && errno == EINTR);
    return result;
  };
  if (flush(file_.descriptor())) io_error("write", temporary_);
  if (::rename(temporary_.c_str(), path_.c_str())) io_error("replace", path_);
  done_ = true;
  file_.close();
  const size_t slash = path_.rfind('/');
  const File directory(slash == std::string::npos ? "." : path_.substr(0, slash ? slash : 1), O_RDONLY | O_DIRECTORY,
                       "write");
  // Some network file systems have no such thing as flushing a directory and say EINVAL.
  if (flush(directory.descriptor()) && errno != EINVAL) io_error("write", directory.path());
}

}  // namespace er
