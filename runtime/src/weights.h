// Parameters from and to safetensors files, streamed through a small buffer or read in place.
#pragma once
#include <memory>

#include "mapped_file.h"
#include "session.h"

namespace er {

// Both throw Error (ER_BAD_FILE, ER_IO). Loading checks everything before it changes the first parameter.
void load_weights(Session& session, std::unique_ptr<WeightsFile> file);
void save_weights(const Session& session, const char* path);

}  // namespace er
