// Files by descriptor, with errors as ER_IO and the system's reason; and files that take another's place whole.
#pragma once
#include <cstdint>
#include <string>

namespace er {

// Throws Error with ER_IO: "cannot <verb> <path>: <reason of errno>".
[[noreturn]] void io_error(const char* verb, const std::string& path);

class File {
 public:
  File(std::string path, int flags, const char* verb);  // verb for messages: "read", "write"
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  const char* path() const { return path_.c_str(); }
  int descriptor() const { return fd_; }
  // Bytes of a regular file; anything else is an error.
  uint64_t size() const;
  // Exactly `bytes` bytes; Error with ER_BAD_FILE if the file is shorter.
  void read(void* data, size_t bytes, uint64_t offset) const;
  void write(const void* data, size_t bytes) const;
  void write_at(const void* data, size_t bytes, uint64_t offset) const;
  void close();

 private:
  std::string path_;
  int fd_;
};

// What is written to `file()` takes the place of `path` at commit(), durably: written to <path>.tmp beside it, flushed
// to the disk, renamed, and the directory flushed. Until then, and if anything fails, the old file stays as it is. A
// temporary file that a crash left behind is used again. Two writers of one path at a time: the second is refused.
class ReplacedFile {
 public:
  explicit ReplacedFile(const char* path);
  ~ReplacedFile();
  const File& file() const { return file_; }
  void commit();

 private:
  std::string path_, temporary_;
  File file_;
  bool done_ = false;
};

}  // namespace er
