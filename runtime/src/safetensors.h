// The safetensors header: u64 length, then JSON {"name": {"dtype", "shape", "data_offsets": [begin, end]}, …,
// "__metadata__": {…}}, then data.
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace er {

struct TensorEntry {
  std::string name, dtype;
  std::vector<uint64_t> shape;
  uint64_t begin, end;  // bytes from the beginning of the data section
};

// Larger headers are refused before they are read: 16 MB hold 100,000 tensors.
constexpr uint64_t kMaxHeaderBytes = 16u << 20;

using Metadata = std::vector<std::pair<std::string, std::string>>;

// Reads the JSON of a header, and of its metadata if that is asked for. Throws Error with ER_BAD_FILE unless the
// entries are well-formed, have distinct names, and tile a data section of `data_bytes` bytes without holes or
// overlaps, as the format demands; the message names `path`.
std::vector<TensorEntry> read_safetensors_header(const char* path, const std::string& json, uint64_t data_bytes,
                                                 Metadata* metadata = nullptr);

// The complete beginning of a file: length and JSON, padded so that the data section is aligned to 8 bytes. Metadata,
// if there is any, comes first.
std::string write_safetensors_header(const std::vector<TensorEntry>& entries, const Metadata& metadata = {});

}  // namespace er
