// A weights file of which parts are read in place.
#pragma once
#include <cstdint>

#include "file.h"

namespace er {

// An open regular file, or `bytes` of one from `start` on (a stored member of a zip). Throws Error with ER_IO or
// ER_BAD_FILE.
class WeightsFile {
 public:
  // `bytes` UINT64_MAX: to the end.
  WeightsFile(const char* path, uint64_t start, uint64_t bytes);
  ~WeightsFile();
  WeightsFile(const WeightsFile&) = delete;
  WeightsFile& operator=(const WeightsFile&) = delete;

  const char* path() const { return file_.path(); }
  uint64_t bytes() const { return bytes_; }
  void read(void* data, uint64_t bytes, uint64_t offset) const;
  // The file's bytes in memory, read-only: pages that the system reads when they are touched and may drop again.
  const uint8_t* map();
  // The mapping's bytes [begin, end) are not read in place as a rule: touching pages beside them shall not make them
  // resident.
  void set_apart(uint64_t begin, uint64_t end);
  // Whether the file is what it was when it was opened. Reading a mapping behind the end of a file that was cut short
  // kills the process, so this is asked before every step.
  bool unchanged() const;

 private:
  struct Identity {
    uint64_t size;
    int64_t seconds, nanoseconds;  // of the last modification
  };
  Identity identity() const;

  File file_;
  uint64_t start_, bytes_;
  Identity opened_;
  void* pages_ = nullptr;
  uint64_t pages_bytes_ = 0;
};

}  // namespace er
