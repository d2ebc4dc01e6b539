#include "mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "error.h"

namespace er {

WeightsFile::WeightsFile(const char* path, uint64_t start, uint64_t bytes)
    : file_(path, O_RDONLY | O_NONBLOCK, "read"), start_(start), bytes_(bytes), opened_(identity()) {
  if (start > opened_.size || (bytes != UINT64_MAX && bytes > opened_.size - start))
    throw Error{ER_BAD_FILE, text("%.400s is truncated", path)};
  if (bytes == UINT64_MAX) bytes_ = opened_.size - start;
}

WeightsFile::~WeightsFile() {
  if (pages_) ::munmap(pages_, pages_bytes_);
}

WeightsFile::Identity WeightsFile::identity() const {
  const uint64_t size = file_.size();
  struct stat status;
  if (::fstat(file_.descriptor(), &status)) io_error("read", path());
#if defined(__APPLE__)
  const struct timespec& modified = status.st_mtimespec;
#else
  const struct timespec& modified = status.st_mtim;
#endif
  return {size, modified.tv_sec, modified.tv_nsec};
}

bool WeightsFile::unchanged() const {
  const Identity now = identity();
  return now.size == opened_.size && now.seconds == opened_.seconds && now.nanoseconds == opened_.nanoseconds;
}

void WeightsFile::read(void* data, uint64_t bytes, uint64_t offset) const { file_.read(data, bytes, start_ + offset); }

const uint8_t* WeightsFile::map() {
  const uint64_t page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE)), skip = start_ % page;
  if (!pages_) {
    pages_bytes_ = skip + bytes_;
    void* pages =
        ::mmap(nullptr, pages_bytes_, PROT_READ, MAP_PRIVATE, file_.descriptor(), static_cast<off_t>(start_ - skip));
    if (pages == MAP_FAILED) io_error("map", path());
    pages_ = pages;
  }
  return static_cast<const uint8_t*>(pages_) + skip;
}

void WeightsFile::set_apart(uint64_t begin, uint64_t end) {
  const uint64_t page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  uint8_t* const pages = const_cast<uint8_t*>(map()) - start_ % page;
  begin = (start_ % page + begin + page - 1) / page * page;
  end = (start_ % page + end) / page * page;
  // Linux maps what the page cache holds around a touched page, 64 KB or the 2 MB of a large folio, but not across the
  // border of an area with other advice.
  if (begin < end) (void)::madvise(pages + begin, end - begin, MADV_RANDOM);
}

}  // namespace er
