// libFuzzer target: the loader of safetensors weights. benchmarks/fuzz.py builds and runs it; the environment variable
// EDGE_RAZOR_FUZZ_PLAN names the plan whose parameters are loaded.
#include <sys/mman.h>
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

namespace {

er_session* session = nullptr;
int file = -1;
std::string path;

void expect(bool holds) {
  if (!holds) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  const char* name = std::getenv("EDGE_RAZOR_FUZZ_PLAN");
  std::ifstream stream(name ? name : "", std::ios::binary);
  const std::vector<char> plan((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  if (er_session_create(plan.data() ? plan.data() : "", plan.size(), &session)) {
    std::fprintf(stderr, "EDGE_RAZOR_FUZZ_PLAN: %s\n", er_last_error());
    std::exit(2);
  }
  file = ::memfd_create("weights", MFD_CLOEXEC);
  expect(file >= 0);
  path = "/proc/self/fd/" + std::to_string(file);
  return 0;
}

// Half of the inputs keep a header length that is right, so that changes of the header are seen as such.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
  uint64_t header = 0;
  if (size >= 8) std::memcpy(&header, data, 8);
  if (seed % 2 || size < 9 || header > size - 8) return LLVMFuzzerMutate(data, size, max_size);
  const std::vector<uint8_t> values(data + 8 + header, data + size);
  if (max_size < 9 + values.size()) return LLVMFuzzerMutate(data, size, max_size);
  header = LLVMFuzzerMutate(data + 8, header, max_size - 8 - values.size());
  std::memcpy(data, &header, 8);
  if (!values.empty()) std::memcpy(data + 8 + header, values.data(), values.size());
  return 8 + header + values.size();
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  expect(::ftruncate(file, 0) == 0 && ::pwrite(file, data, size, 0) == static_cast<ssize_t>(size));
  const er_status status = er_weights_load(session, path.c_str());
  expect(status == ER_OK || status == ER_BAD_FILE);
  expect(status == ER_OK || std::strlen(er_last_error()) > 0);
  if (status) return 0;
  // What was loaded can be saved, and loaded again.
  expect(er_weights_save(session, path.c_str()) == ER_OK);
  expect(er_weights_load(session, path.c_str()) == ER_OK);
  return 0;
}
