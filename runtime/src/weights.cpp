#include "weights.h"

#include <algorithm>
#include <map>

#include "error.h"
#include "file.h"
#include "safetensors.h"

namespace er {
namespace {

constexpr uint64_t kChunk = 16384;  // elements; 64 KB on the stack

std::string shape_text(const std::vector<uint64_t>& shape) {
  std::string out = "[";
  for (size_t d = 0; d < shape.size(); d++) out += (d ? ", " : "") + std::to_string(shape[d]);
  return out + "]";
}

using Span = std::pair<uint64_t, uint64_t>;  // first byte of the file, and the one behind the last

void set_apart_the_rest(std::vector<Span> used, WeightsFile& file) {
  constexpr uint64_t kLeast = 1 << 16;  // bytes of a gap that is worth an area of its own
  std::sort(used.begin(), used.end());
  used.emplace_back(file.bytes(), file.bytes());
  uint64_t at = 0;
  for (const auto& [begin, end] : used) {
    if (begin >= at + kLeast) file.set_apart(at, begin);
    at = std::max(at, end);
  }
}

}  // namespace

void load_weights(Session& session, std::unique_ptr<WeightsFile> file) {
  const Plan& plan = session.plan();
  const char* path = file->path();
  const uint64_t size = file->bytes();
  uint64_t header_bytes = 0;
  if (size >= 8) file->read(&header_bytes, 8, 0);
  if (size < 8 || header_bytes > kMaxHeaderBytes || header_bytes > size - 8)
    throw Error{ER_BAD_FILE, text("%.400s is not a safetensors file, or is truncated", path)};
  std::vector<TensorEntry> entries;
  {
    std::string json(header_bytes, '\0');
    file->read(json.data(), json.size(), 8);
    entries = read_safetensors_header(path, json, size - 8 - header_bytes);
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
  std::vector<uint8_t*> frozen(plan.params.size());
  std::vector<std::unique_ptr<Pages>> copies(plan.params.size());
  std::vector<Span> whole;  // that steps read in the file
  float chunk[kChunk];
  for (uint32_t i = 0; i < plan.params.size(); i++) {
    const PlanParam& param = plan.params[i];
    StoredParam stored = session.param(i);
    if (param.form == kInFile) {
      uint8_t* const place = const_cast<uint8_t*>(file->map()) + offsets[i];
      frozen[i] = place;  // only_reads() of plan.cpp sees to it that no step writes there
      if (param.looked_up && !param.read_whole) continue;  // rows, by read()
      if (reinterpret_cast<uintptr_t>(place) % alignof(float) == 0) {
        whole.emplace_back(offsets[i], offsets[i] + param.elements * 4);
        continue;
      }
      // A zip member may begin anywhere.
      copies[i] = std::make_unique<Pages>(stored_bytes(param));
      frozen[i] = stored.data = copies[i]->data();
    }
    const auto each_chunk = [&](auto&& take) {
      for (uint64_t begin = 0; begin < param.elements; begin += kChunk) {
        const uint64_t count = std::min(kChunk, param.elements - begin);
        file->read(chunk, count * 4, offsets[i] + begin * 4);
        take(begin, count);
      }
    };
    if (stored.needs_scales()) {
      stored.begin_scales();
      each_chunk([&](uint64_t begin, uint64_t count) { stored.scan(begin, count, chunk); });
      stored.end_scales();
    }
    each_chunk([&](uint64_t begin, uint64_t count) { stored.write(begin, count, chunk); });
  }
  if (!whole.empty()) set_apart_the_rest(std::move(whole), *file);
  session.set_frozen(std::move(frozen), std::move(copies), std::move(file));
}

void save_weights(const Session& session, const char* path) {
  const std::vector<PlanParam>& params = session.plan().params;
  std::vector<TensorEntry> entries;
  uint64_t at = 0;
  for (uint32_t i = 0; i < params.size(); i++) {
    const PlanParam& param = params[i];
    if (!session.param(i).data)
      throw Error{ER_INVALID_ARGUMENT,
                  text("parameter '%.200s' has no value: load a weights file", param.name.c_str())};
    entries.push_back({param.name, "F32", param.shape, at, at + param.elements * 4});
    at += param.elements * 4;
  }
  const std::string header = write_safetensors_header(entries);
  ReplacedFile replaced(path);
  const File& file = replaced.file();
  file.write(header.data(), header.size());
  float chunk[kChunk];
  for (uint32_t i = 0; i < params.size(); i++) {
    for (uint64_t begin = 0; begin < params[i].elements; begin += kChunk) {
      const uint64_t count = std::min(kChunk, params[i].elements - begin);
      session.param(i).read(begin, count, chunk);
      file.write(chunk, count * 4);
    }
  }
  replaced.commit();
}

}  // namespace er
