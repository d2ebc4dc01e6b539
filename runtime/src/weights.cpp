#include "weights.h"

#include <fcntl.h>

#include <algorithm>
#include <map>

#include "error.h"
#include "file.h"
#include "layout.h"
#include "safetensors.h"

namespace er {
namespace {

constexpr uint64_t kChunk = 16384;  // elements; 64 KB on the stack

std::string shape_text(const std::vector<uint64_t>& shape) {
  std::string out = "[";
  for (size_t d = 0; d < shape.size(); d++) out += (d ? ", " : "") + std::to_string(shape[d]);
  return out + "]";
}

}  // namespace

void load_weights(const Plan& plan, float* params, const char* path) {
  const File file(path, O_RDONLY, "read");
  const uint64_t size = file.size();
  uint64_t header_bytes = 0;
  if (size >= 8) file.read(&header_bytes, 8, 0);
  if (size < 8 || header_bytes > kMaxHeaderBytes || header_bytes > size - 8)
    throw Error{ER_BAD_FILE, text("%.400s is not a safetensors file, or is truncated", path)};
  std::vector<TensorEntry> entries;
  {
    std::string json(header_bytes, '\0');
    file.read(json.data(), json.size(), 8);
    entries = read_safetensors_header(json, size - 8 - header_bytes);
  }
  std::map<std::string, const TensorEntry*> by_name;
  for (const TensorEntry& entry : entries) by_name[entry.name] = &entry;

  std::vector<uint64_t> offsets;
  for (const PlanParam& param : plan.params) {
    const auto found = by_name.find(param.name);
    if (found == by_name.end())
      throw Error{ER_BAD_FILE, text("%.400s lacks the tensor '%.200s'", path, param.name.c_str())};
    const TensorEntry& entry = *found->second;
    if (entry.dtype != "F32")
      throw Error{ER_BAD_FILE,
                  text("tensor '%.200s' is %.40s, F32 is needed", param.name.c_str(), entry.dtype.c_str())};
    if (entry.shape != param.shape)
      throw Error{ER_BAD_FILE, text("tensor '%.200s' has shape %.100s, %.100s is needed", param.name.c_str(),
                                    shape_text(entry.shape).c_str(), shape_text(param.shape).c_str())};
    offsets.push_back(8 + header_bytes + entry.begin);
  }
  float chunk[kChunk];
  for (size_t i = 0; i < plan.params.size(); i++) {
    const PlanParam& param = plan.params[i];
    const Layout layout =
        make_layout(static_cast<int>(param.shape.size()), param.shape.data(), param.perm.data(), false);
    for (uint64_t begin = 0; begin < param.elements; begin += kChunk) {
      const uint64_t count = std::min(kChunk, param.elements - begin);
      file.read(chunk, count * 4, offsets[i] + begin * 4);
      copy_in(layout, begin, count, chunk, params + param.offset / 4);
    }
  }
}

void save_weights(const Plan& plan, const float* params, const char* path) {
  std::vector<TensorEntry> entries;
  uint64_t at = 0;
  for (const PlanParam& param : plan.params) {
    entries.push_back({param.name, "F32", param.shape, at, at + param.elements * 4});
    at += param.elements * 4;
  }
  const std::string header = write_safetensors_header(entries);
  ReplacedFile replaced(path);
  const File& file = replaced.file();
  file.write(header.data(), header.size());
  float chunk[kChunk];
  for (const PlanParam& param : plan.params) {
    const Layout layout =
        make_layout(static_cast<int>(param.shape.size()), param.shape.data(), param.perm.data(), false);
    for (uint64_t begin = 0; begin < param.elements; begin += kChunk) {
      const uint64_t count = std::min(kChunk, param.elements - begin);
      copy_out(layout, begin, count, params + param.offset / 4, chunk);
      file.write(chunk, count * 4);
    }
  }
  replaced.commit();
}

}  // namespace er
