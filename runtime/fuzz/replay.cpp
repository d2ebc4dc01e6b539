// Runs a libFuzzer target without libFuzzer, for compilers that have none: the given files, then altered copies of
// them.
//   TARGET SEED ROUNDS FILE …
// The same seed makes the same copies. runtime/tests/sanitize.sh runs it.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" {
int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed);
__attribute__((weak)) int LLVMFuzzerInitialize(int* count, char*** arguments);
}

namespace {

constexpr size_t kMaxBytes = 8192;
std::mt19937 generator;

size_t below(size_t n) { return n ? generator() % n : 0; }

}  // namespace

// One to four changes: a flipped bit, a word, or bytes that are removed or repeated.
extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size) {
  static const uint64_t kWords[] = {0,          1,          0x7f,       0xff,      0xffff,
                                    0x7fffffff, 0x80000000, 0xffffffff, INT64_MAX, UINT64_MAX};
  for (size_t changes = 1 + below(4); changes > 0; changes--) {
    const size_t at = below(size), count = std::min(size - at, size_t{1} << below(6));
    switch (below(4)) {
      case 0:
        if (size) data[at] = static_cast<uint8_t>(data[at] ^ 1u << below(8));
        break;
      case 1:
        std::memcpy(data + at, &kWords[below(std::size(kWords))], std::min(size - at, size_t{1} << below(4)));
        break;
      case 2:
        std::memmove(data + at, data + at + count, size - at - count);
        size -= count;
        break;
      default:
        if (size + count > max_size) break;
        std::memmove(data + at + count, data + at, size - at);
        size += count;
    }
  }
  return size;
}

int main(int count, char** arguments) {
  if (count < 4) {
    std::fprintf(stderr, "usage: %s SEED ROUNDS FILE …\n", arguments[0]);
    return 2;
  }
  if (LLVMFuzzerInitialize) LLVMFuzzerInitialize(&count, &arguments);
  const long seed = std::atol(arguments[1]), rounds = std::atol(arguments[2]);
  generator.seed(static_cast<unsigned>(seed));
  std::vector<std::vector<uint8_t>> files;
  for (int i = 3; i < count; i++) {
    std::ifstream stream(arguments[i], std::ios::binary);
    if (!stream) {
      std::fprintf(stderr, "cannot open %s\n", arguments[i]);
      return 2;
    }
    files.emplace_back((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
    LLVMFuzzerTestOneInput(files.back().data(), files.back().size());
  }
  for (long round = 0; round < rounds; round++) {
    std::vector<uint8_t> data = files[below(files.size())];
    size_t size = data.size();
    const size_t most = std::max(size, kMaxBytes);
    data.resize(most);
    for (size_t times = 1 + below(3); times > 0; times--)
      size = LLVMFuzzerCustomMutator(data.data(), size, most, generator());
    // A copy without room behind it, so that the address sanitizer sees a read beyond it.
    const std::vector<uint8_t> exact(data.begin(), data.begin() + static_cast<std::ptrdiff_t>(size));
    LLVMFuzzerTestOneInput(exact.data(), exact.size());
  }
  std::printf("%s: %zu files and %ld altered copies, seed %ld\n", arguments[0], files.size(), rounds, seed);
  return 0;
}
