// What the libFuzzer targets share: a way to fail, and a file for the loaders that take a path.
#pragma once
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "edge_razor.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

inline void expect(bool holds) {
  if (holds) return;
  std::fprintf(stderr, "not as expected; the last error: %s\n", er_last_error());
  std::abort();
}

// A path in memory (/dev/shm) that is this process's own; nothing is left behind, except where a process is killed.
inline const std::string& fuzz_path() {
  static const std::string path = [] {
    char folder[] = "/dev/shm/edge-razor-fuzz-XXXXXX";
    expect(::mkdtemp(folder));
    return std::string(folder) + "/file";
  }();
  static const struct Cleaner {
    ~Cleaner() {
      ::unlink(path.c_str());
      ::rmdir(path.substr(0, path.rfind('/')).c_str());
    }
  } cleaner;
  return path;
}

// A new file, so that a session that has the last one mapped is left alone.
inline void write_file(const void* data, size_t bytes) {
  ::unlink(fuzz_path().c_str());
  const int file = ::open(fuzz_path().c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  expect(file >= 0 && ::write(file, data, bytes) == static_cast<ssize_t>(bytes) && ::close(file) == 0);
}

inline std::vector<er_session*> sessions;

// Opens a session for each of the plans that the environment variable EDGE_RAZOR_FUZZ_PLANS names, separated by colons.
// They are freed at the end, so that what leaks is a finding.
inline void open_sessions() {
  const char* value = std::getenv("EDGE_RAZOR_FUZZ_PLANS");
  std::string names = value ? value : "";
  for (size_t begin = 0; begin < names.size();) {
    const size_t end = std::min(names.find(':', begin), names.size());
    std::ifstream stream(names.substr(begin, end - begin), std::ios::binary);
    const std::vector<char> plan((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
    sessions.push_back(nullptr);
    if (er_session_create(plan.data() ? plan.data() : "", plan.size(), &sessions.back())) {
      std::fprintf(stderr, "%s: %s\n", names.substr(begin, end - begin).c_str(), er_last_error());
      std::exit(2);
    }
    begin = end + 1;
  }
  if (sessions.empty()) {
    std::fprintf(stderr, "EDGE_RAZOR_FUZZ_PLANS names no plan\n");
    std::exit(2);
  }
  std::atexit([] {
    for (er_session* session : sessions) er_session_free(session);
  });
}

// Alters the header of a safetensors file and makes its length right again; or, once in four, any bytes.
inline size_t mutate_safetensors(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
  uint64_t header = 0;
  if (size >= 8) std::memcpy(&header, data, 8);
  if (seed % 4 == 0 || size < 9 || header > size - 8) return LLVMFuzzerMutate(data, size, max_size);
  const std::vector<uint8_t> values(data + 8 + header, data + size);
  if (max_size < 9 + values.size()) return LLVMFuzzerMutate(data, size, max_size);
  header = LLVMFuzzerMutate(data + 8, header, max_size - 8 - values.size());
  std::memcpy(data, &header, 8);
  if (!values.empty()) std::memcpy(data + 8 + header, values.data(), values.size());
  return 8 + header + values.size();
}
