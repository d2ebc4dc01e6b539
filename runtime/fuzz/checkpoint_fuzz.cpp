// libFuzzer target: er_checkpoint_load. benchmarks/fuzz.py builds and runs it; EDGE_RAZOR_FUZZ_PLANS names plans whose
// parameters and optimizer state are loaded.
#include "crc32.h"
#include "fuzz_file.h"

namespace {

constexpr char kBegin[] = "{\"__metadata__\":{\"checksum\":\"";
constexpr size_t kChecksumAt = 8 + sizeof kBegin - 1, kHex = 8;

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  open_sessions();
  return 0;
}

// Almost every altered header would end at its checksum, which is made right again, but for one in 16.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
  size = mutate_safetensors(data, size, max_size, seed);
  uint64_t header = 0;
  if (size >= 8) std::memcpy(&header, data, 8);
  if (seed % 16 == 0 || size < 8 || header > size - 8 || header < kChecksumAt + kHex) return size;
  std::memcpy(data + 8, kBegin, sizeof kBegin - 1);
  std::memset(data + kChecksumAt, '0', kHex);
  char checksum[kHex + 1];
  std::snprintf(checksum, sizeof checksum, "%08x", er::crc32(data, 8 + header));
  std::memcpy(data + kChecksumAt, checksum, kHex);
  return size;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  for (er_session* session : sessions) {
    write_file(data, size);
    uint64_t update = 0;
    uint8_t user[64];
    size_t user_bytes = 0;
    const er_status status = er_checkpoint_load(session, fuzz_path().c_str(), &update, user, sizeof user, &user_bytes);
    expect(status == ER_OK || status == ER_BAD_FILE || status == ER_INVALID_ARGUMENT);
    expect(status == ER_OK || std::strlen(er_last_error()) > 0);
    if (status) continue;
    expect(user_bytes <= sizeof user);
    // What was loaded can be saved, and loaded again.
    const er_status saved = er_checkpoint_save(session, fuzz_path().c_str(), update, user, user_bytes);
    expect(saved == ER_OK || saved == ER_NON_FINITE);
    uint64_t again = 0;
    if (saved == ER_OK)
      expect(er_checkpoint_load(session, fuzz_path().c_str(), &again, user, sizeof user, &user_bytes) == ER_OK &&
             again == update);
  }
  return 0;
}
