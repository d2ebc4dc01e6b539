// Parameters from and to safetensors files, streamed through a small buffer.
#pragma once
#include "plan.h"

namespace er {

// Both throw Error (ER_BAD_FILE, ER_IO). Loading checks everything before it changes the first parameter.
void load_weights(const Plan& plan, float* params, const char* path);
void save_weights(const Plan& plan, const float* params, const char* path);

}  // namespace er
