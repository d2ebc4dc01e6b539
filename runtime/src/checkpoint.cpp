#include "checkpoint.h"

#include <fcntl.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstring>
#include <map>

#include "crc32.h"
#include "error.h"
#include "file.h"
#include "safetensors.h"

namespace er {
namespace {

constexpr uint64_t kChunk = 16384;  // elements; 64 KB on the stack
constexpr char kFormat[] = "edge-razor checkpoint 1";
// The header's own checksum comes first, at a fixed place; it is taken with zeros there.
constexpr char kBegin[] = "{\"__metadata__\":{\"checksum\":\"";
constexpr char kNoChecksum[] = "00000000";
constexpr size_t kChecksumAt = 8 + sizeof kBegin - 1, kHex = 8;

// One tensor of the file and where it lives.
struct Item {
  TensorEntry entry;
  Layout layout;
  float* data;
};

// The trainable parameters, then their optimizer state, in the plan's order.
std::vector<Item> items(const Session& session) {
  const std::vector<PlanParam>& params = session.plan().params;
  std::vector<Item> out;
  uint64_t at = 0;
  const auto add = [&](const std::string& name, const PlanParam& p, float* data) {
    out.push_back({{name, "F32", p.shape, at, at + p.elements * 4},
                   make_layout(static_cast<int>(p.shape.size()), p.shape.data(), p.perm.data(), false),
                   data});
    at += p.elements * 4;
  };
  // What trains is float32 in memory: read_plan() refuses anything else.
  for (uint32_t i = 0; i < params.size(); i++)
    if (params[i].trainable) add(params[i].name, params[i], reinterpret_cast<float*>(session.param(i).data));
  for (uint32_t i = 0; i < params.size(); i++)
    for (uint32_t slot = 0; params[i].trainable && slot < params[i].state_offsets.size(); slot++)
      add("optimizer/" + std::to_string(slot) + "/" + params[i].name, params[i], session.state(i, slot));
  return out;
}

// body(first element, count) for every chunk of a tensor.
template <class F>
void for_each_chunk(uint64_t elements, F&& body) {
  for (uint64_t begin = 0; begin < elements; begin += kChunk) body(begin, std::min(kChunk, elements - begin));
}

uint32_t crc_of(const float* chunk, uint64_t count, uint32_t before) {
  return crc32(reinterpret_cast<const uint8_t*>(chunk), count * 4, before);
}

std::string to_hex(const void* data, size_t bytes) {
  static const char digits[] = "0123456789abcdef";
  std::string out;
  for (const uint8_t *p = static_cast<const uint8_t*>(data), *end = p + bytes; p != end; p++) {
    out += digits[*p >> 4];
    out += digits[*p & 15];
  }
  return out;
}

// The bytes of a string of hexadecimal digits; false if it is none.
bool from_hex(const std::string& hex, std::string* out) {
  const auto digit = [](char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1; };
  out->clear();
  if (hex.size() % 2) return false;
  for (size_t i = 0; i < hex.size(); i += 2) {
    const int high = digit(hex[i]), low = digit(hex[i + 1]);
    if (high < 0 || low < 0) return false;
    *out += static_cast<char>(high * 16 + low);
  }
  return true;
}

std::string crc_text(uint32_t crc) { return text("%08" PRIx32, crc); }

// The beginning of a checkpoint file, its own checksum filled in.
std::string header(const Session& session, const std::vector<Item>& tensors, uint64_t update, const std::string& user,
                   const std::string& crcs) {
  std::vector<TensorEntry> entries;
  for (const Item& item : tensors) entries.push_back(item.entry);
  std::string out = write_safetensors_header(entries, {{"checksum", kNoChecksum},
                                                       {"format", kFormat},
                                                       {"bundle_id", session.plan().bundle_id},
                                                       {"update", std::to_string(update)},
                                                       {"user", user},
                                                       {"crc32", crcs}});
  const std::string own = crc_text(crc32(reinterpret_cast<const uint8_t*>(out.data()), out.size()));
  out.replace(kChecksumAt, kHex, own);
  return out;
}

[[noreturn]] void damaged(const char* path, const char* what) {
  throw Error{ER_BAD_FILE, text("%.400s is damaged: %s", path, what)};
}

// What a checkpoint file says about itself.
struct Contents {
  uint64_t data_offset, update;
  std::string bundle_id, user;
  std::map<std::string, std::pair<TensorEntry, uint32_t>> tensors;  // with checksums
};

Contents read_contents(const File& file) {
  const char* path = file.path();
  const uint64_t size = file.size();
  uint64_t bytes = 0;
  if (size >= 8) file.read(&bytes, 8, 0);
  if (size < 8 || bytes > kMaxHeaderBytes || bytes > size - 8 || bytes < kChecksumAt + kHex)
    throw Error{ER_BAD_FILE, text("%.400s is no checkpoint, or is truncated", path)};
  std::string head(8 + bytes, '\0');
  file.read(head.data(), head.size(), 0);
  if (head.compare(8, sizeof kBegin - 1, kBegin))
    throw Error{ER_BAD_FILE, text("%.400s is no checkpoint that er_checkpoint_save wrote", path)};
  const std::string stated = head.substr(kChecksumAt, kHex);
  head.replace(kChecksumAt, kHex, kNoChecksum);
  if (crc_text(crc32(reinterpret_cast<const uint8_t*>(head.data()), head.size())) != stated)
    damaged(path, "the header does not match its checksum");

  Metadata metadata;
  const std::vector<TensorEntry> entries = read_safetensors_header(path, head.substr(8), size - 8 - bytes, &metadata);
  std::map<std::string, std::string> values(metadata.begin(), metadata.end());
  if (values["format"] != kFormat)
    throw Error{ER_BAD_FILE, text("%.400s is no checkpoint, or one of a newer version", path)};
  Contents out{8 + bytes, 0, values["bundle_id"], "", {}};
  const std::string &update = values["update"], &crcs = values["crc32"];
  if (update.empty() || update.size() > 20) damaged(path, "the update is no number");
  for (const char c : update)
    if (c < '0' || c > '9' || __builtin_mul_overflow(out.update, uint64_t{10}, &out.update) ||
        __builtin_add_overflow(out.update, static_cast<uint64_t>(c - '0'), &out.update))
      damaged(path, "the update is no number");
  if (!from_hex(values["user"], &out.user) || out.user.size() > kMaxUserBytes)
    damaged(path, "the program's own bytes are malformed");
  std::string bits;
  if (!from_hex(crcs, &bits) || bits.size() != entries.size() * 4)
    damaged(path, "there is not one checksum for each tensor");
  for (size_t i = 0; i < entries.size(); i++) {
    uint32_t crc = 0;
    for (int b = 0; b < 4; b++) crc = crc << 8 | static_cast<uint8_t>(bits[4 * i + static_cast<size_t>(b)]);
    out.tensors[entries[i].name] = {entries[i], crc};
  }
  return out;
}

}  // namespace

void save_checkpoint(const Session& session, const char* path, uint64_t update, const void* user, size_t user_bytes) {
  const std::vector<Item> tensors = items(session);
  const std::string hex = to_hex(user, user_bytes);
  ReplacedFile replaced(path);
  const File& file = replaced.file();
  std::string crcs(tensors.size() * kHex, '0');
  const std::string placeholder = header(session, tensors, update, hex, crcs);
  file.write(placeholder.data(), placeholder.size());
  float chunk[kChunk];
  for (size_t i = 0; i < tensors.size(); i++) {
    const Item& item = tensors[i];
    uint32_t crc = 0;
    for_each_chunk(item.layout.elements, [&](uint64_t begin, uint64_t count) {
      copy_out(item.layout, begin, count, item.data, chunk);
      for (uint64_t e = 0; e < count; e++)
        if (!std::isfinite(chunk[e]))
          throw Error{ER_NON_FINITE,
                      text("'%.200s' holds NaN or infinity; %.400s was not replaced", item.entry.name.c_str(), path)};
      crc = crc_of(chunk, count, crc);
      file.write(chunk, count * 4);
    });
    crcs.replace(i * kHex, kHex, crc_text(crc));
  }
  const std::string final = header(session, tensors, update, hex, crcs);
  file.write_at(final.data(), final.size(), 0);
  replaced.commit();
}

void load_checkpoint(const Session& session, const char* path, uint64_t* update, void* user, size_t capacity,
                     size_t* user_bytes) {
  const File file(path, O_RDONLY | O_NONBLOCK, "read");  // nor wait for a FIFO's writer
  const Contents contents = read_contents(file);
  if (contents.bundle_id != session.plan().bundle_id)
    throw Error{ER_BAD_FILE, text("%.400s belongs to another model than the plan", path)};
  if (contents.user.size() > capacity)
    throw Error{ER_INVALID_ARGUMENT, text("%.400s holds %zu bytes of the program's own, there is room for %zu", path,
                                          contents.user.size(), capacity)};
  const std::vector<Item> tensors = items(session);
  float chunk[kChunk];
  for (const Item& item : tensors) {
    const auto found = contents.tensors.find(item.entry.name);
    if (found == contents.tensors.end())
      throw Error{ER_BAD_FILE, text("%.400s lacks '%.200s': other parameters were trained, or with another optimizer",
                                    path, item.entry.name.c_str())};
    const TensorEntry& entry = found->second.first;
    if (entry.dtype != "F32" || entry.shape != item.entry.shape)
      throw Error{ER_BAD_FILE,
                  text("'%.200s' in %.400s has another shape or type than in the plan", item.entry.name.c_str(), path)};
    uint32_t crc = 0;
    for_each_chunk(item.layout.elements, [&](uint64_t begin, uint64_t count) {
      file.read(chunk, count * 4, contents.data_offset + entry.begin + begin * 4);
      crc = crc_of(chunk, count, crc);
    });
    if (crc != found->second.second)
      throw Error{ER_BAD_FILE,
                  text("%.400s is damaged: '%.200s' does not match its checksum", path, item.entry.name.c_str())};
  }
  if (contents.tensors.size() != tensors.size())
    throw Error{ER_BAD_FILE,
                text("%.400s holds other tensors than the plan trains: another optimizer, or other parameters", path)};
  for (const Item& item : tensors)
    for_each_chunk(item.layout.elements, [&](uint64_t begin, uint64_t count) {
      const uint64_t from = contents.tensors.at(item.entry.name).first.begin;
      file.read(chunk, count * 4, contents.data_offset + from + begin * 4);
      copy_in(item.layout, begin, count, chunk, item.data);
    });
  *update = contents.update;
  if (!contents.user.empty()) std::memcpy(user, contents.user.data(), contents.user.size());
  if (user_bytes) *user_bytes = contents.user.size();
}

}  // namespace er
