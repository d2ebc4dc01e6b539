// The safetensors header: u64 length, then JSON {"name": {"dtype", "shape", "data_offsets": [begin, end]}, …,
// "__metadata__": {…}}, then data.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace er {

struct TensorEntry {
  std::string name, dtype;
  std::vector<uint64_t> shape;
  uint64_t begin, end;  // bytes from the beginning of the data section
};

// Larger headers are refused before they are read: 16 MB hold 100,000 tensors.
constexpr uint64_t kMaxHeaderBytes = 16u << 20;

// Reads the JSON of a header. Throws Error with ER_BAD_FILE unless the entries are well-formed, have distinct names,
// and tile a data section of `data_bytes` bytes without holes or overlaps, as the format demands.
std::vector<TensorEntry> read_safetensors_header(const std::string& json, uint64_t data_bytes);

// The complete beginning of a file: length and JSON, padded so that the data section is aligned to 8 bytes.
std::string write_safetensors_header(const std::vector<TensorEntry>& entries);

}  // namespace er
