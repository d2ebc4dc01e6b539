// Checkpoints of a session, one safetensors file each (docs/c-api.md, "The checkpoint file").
#pragma once
#include <cstdint>

#include "session.h"

namespace er {

constexpr size_t kMaxUserBytes = 64 << 10;

// All throw Error. Saving replaces `path` whole or not at all; loading checks everything, all checksums included,
// before it changes the first parameter.
void save_checkpoint(const Session& session, const char* path, uint64_t update, const void* user, size_t user_bytes);
void load_checkpoint(const Session& session, const char* path, uint64_t* update, void* user, size_t capacity,
                     size_t* user_bytes);

}  // namespace er
