#include "safetensors.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "error.h"
#include "utf8.h"

namespace er {
namespace {

[[noreturn]] void bad(const std::string& what) { throw Error{ER_BAD_FILE, what}; }

// The part of JSON that safetensors uses: objects, arrays, strings and non-negative integers.
class Json {
 public:
  explicit Json(const std::string& text) : at_(text.data()), end_(text.data() + text.size()) {}

  // Calls member(key) for each member of an object; member reads the value.
  template <class F>
  void object(F&& member) {
    std::set<std::string> keys;
    list('{', '}', [&] {
      const std::string key = string();
      if (!keys.insert(key).second) bad("the header names '" + key.substr(0, 200) + "' twice");
      expect(':');
      member(key);
    });
  }

  std::vector<uint64_t> integers() {
    std::vector<uint64_t> out;
    list('[', ']', [&] { out.push_back(integer()); });
    return out;
  }

  std::string string() {
    expect('"');
    std::string out;
    for (;;) {
      const char c = next();
      if (c == '"') break;
      if (static_cast<unsigned char>(c) < 0x20) bad("a control character in the header");
      if (c == '\\')
        escape(out);
      else
        out += c;
    }
    return out;
  }

  void finish() {
    blank();
    if (at_ != end_) bad("text after the header");
  }

 private:
  char next() {
    if (at_ == end_) bad("the header ends too early");
    return *at_++;
  }
  void blank() {
    while (at_ != end_ && (*at_ == ' ' || *at_ == '\n' || *at_ == '\r' || *at_ == '\t')) at_++;
  }
  bool accept(char c) {
    blank();
    if (at_ == end_ || *at_ != c) return false;
    at_++;
    return true;
  }
  void expect(char c) {
    if (!accept(c)) bad(std::string("the header lacks a '") + c + "'");
  }
  template <class F>
  void list(char open, char close, F&& item) {
    expect(open);
    if (accept(close)) return;
    do item();
    while (accept(','));
    expect(close);
  }
  uint64_t integer() {
    blank();
    const char* begin = at_;
    uint64_t value = 0;
    for (; at_ != end_ && *at_ >= '0' && *at_ <= '9'; at_++)
      if (__builtin_mul_overflow(value, uint64_t{10}, &value) ||
          __builtin_add_overflow(value, static_cast<uint64_t>(*at_ - '0'), &value))
        bad("a number in the header is too large");
    if (at_ == begin || (*begin == '0' && at_ - begin > 1)) bad("the header has no integer where one must be");
    return value;
  }
  uint32_t hex4() {
    uint32_t value = 0;
    for (int i = 0; i < 4; i++) {
      const char c = next();
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) bad("an invalid \\u escape in the header");
      value = value * 16 + static_cast<uint32_t>(digit);
    }
    return value;
  }
  void escape(std::string& out) {
    const char c = next();
    static const char kFrom[] = "\"\\/bfnrt", kTo[] = "\"\\/\b\f\n\r\t";
    if (const char* found = c ? std::strchr(kFrom, c) : nullptr) {
      out += kTo[found - kFrom];
      return;
    }
    if (c != 'u') bad("an unknown escape in the header");
    uint32_t point = hex4();
    if (point >= 0xd800 && point < 0xdc00) {
      if (next() != '\\' || next() != 'u') bad("half a surrogate pair in the header");
      const uint32_t low = hex4();
      if (low < 0xdc00 || low > 0xdfff) bad("half a surrogate pair in the header");
      point = 0x10000 + ((point - 0xd800) << 10) + (low - 0xdc00);
    }
    if (point < 0x80) {
      out += static_cast<char>(point);
    } else if (point < 0x800) {
      out += static_cast<char>(0xc0 | point >> 6);
      out += static_cast<char>(0x80 | (point & 0x3f));
    } else {
      if (point < 0x10000) {
        out += static_cast<char>(0xe0 | point >> 12);
      } else {
        out += static_cast<char>(0xf0 | point >> 18);
        out += static_cast<char>(0x80 | (point >> 12 & 0x3f));
      }
      out += static_cast<char>(0x80 | (point >> 6 & 0x3f));
      out += static_cast<char>(0x80 | (point & 0x3f));
    }
  }
  const char* at_;
  const char* end_;
};

// 0: a type this reader does not know, whose sizes it cannot check.
uint64_t dtype_bits(const std::string& dtype) {
  static const struct {
    const char* name;
    uint64_t bits;
  } kTypes[] = {{"BOOL", 8}, {"U8", 8},   {"I8", 8},   {"F8_E5M2", 8}, {"F8_E4M3", 8},
                {"I16", 16}, {"U16", 16}, {"F16", 16}, {"BF16", 16},   {"I32", 32},
                {"U32", 32}, {"F32", 32}, {"F64", 64}, {"I64", 64},    {"U64", 64}};
  for (const auto& type : kTypes)
    if (dtype == type.name) return type.bits;
  return 0;
}

TensorEntry read_entry(Json& json, const std::string& name) {
  TensorEntry entry{name, "", {}, 0, 0};
  unsigned seen = 0;
  json.object([&](const std::string& key) {
    if (key == "dtype") {
      entry.dtype = json.string();
      seen |= 1;
    } else if (key == "shape") {
      entry.shape = json.integers();
      seen |= 2;
    } else if (key == "data_offsets") {
      const std::vector<uint64_t> offsets = json.integers();
      if (offsets.size() != 2) bad("'" + name.substr(0, 200) + "' has no pair of offsets");
      entry.begin = offsets[0];
      entry.end = offsets[1];
      seen |= 4;
    } else {
      bad("'" + name.substr(0, 200) + "' has an unknown field");
    }
  });
  if (seen != 7) bad("'" + name.substr(0, 200) + "' lacks dtype, shape or offsets");
  if (const uint64_t bits = dtype_bits(entry.dtype)) {
    uint64_t bytes = bits / 8;
    for (uint64_t dim : entry.shape)
      if (__builtin_mul_overflow(bytes, dim, &bytes)) bad("'" + name.substr(0, 200) + "' has an impossible shape");
    if (entry.begin > entry.end || entry.end - entry.begin != bytes)
      bad("'" + name.substr(0, 200) + "' has another size than its shape");
  }
  return entry;
}

std::string quoted(const std::string& s) {
  std::string out = "\"";
  for (const char c : s) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out += text("\\u%04x", c);
    } else {
      out += c;
    }
  }
  return out + '"';
}

std::vector<TensorEntry> read_header(const std::string& text, uint64_t data_bytes, Metadata* metadata) {
  if (!is_utf8(text)) bad("its header is not UTF-8");
  Json json(text);
  std::vector<TensorEntry> entries;
  json.object([&](const std::string& name) {
    if (name == "__metadata__")
      json.object([&](const std::string& key) {
        std::string value = json.string();
        if (metadata) metadata->emplace_back(key, std::move(value));
      });
    else
      entries.push_back(read_entry(json, name));
  });
  json.finish();
  std::vector<const TensorEntry*> order;
  for (const TensorEntry& entry : entries) order.push_back(&entry);
  std::sort(order.begin(), order.end(), [](const TensorEntry* a, const TensorEntry* b) {
    return a->begin != b->begin ? a->begin < b->begin : a->end < b->end;
  });
  uint64_t at = 0;
  for (const TensorEntry* entry : order) {
    if (entry->begin != at || entry->end < entry->begin)
      bad("'" + entry->name.substr(0, 200) + "' does not begin where the tensor before it ends");
    at = entry->end;
  }
  if (at != data_bytes) bad("it holds another number of bytes than its header says");
  return entries;
}

}  // namespace

std::vector<TensorEntry> read_safetensors_header(const char* path, const std::string& json, uint64_t data_bytes,
                                                 Metadata* metadata) {
  try {
    return read_header(json, data_bytes, metadata);
  } catch (const Error& error) {
    throw Error{ER_BAD_FILE, text("%.400s is damaged: %s", path, error.message.c_str())};
  }
}

std::string write_safetensors_header(const std::vector<TensorEntry>& entries, const Metadata& metadata) {
  std::string json = "{";
  for (const auto& [key, value] : metadata)
    json += (json.size() > 1 ? "," : "\"__metadata__\":{") + quoted(key) + ":" + quoted(value);
  if (!metadata.empty()) json += '}';
  for (const TensorEntry& entry : entries) {
    if (json.size() > 1) json += ',';
    json += quoted(entry.name) + ":{\"dtype\":" + quoted(entry.dtype) + ",\"shape\":[";
    for (size_t d = 0; d < entry.shape.size(); d++) json += (d ? "," : "") + std::to_string(entry.shape[d]);
    json += "],\"data_offsets\":[" + std::to_string(entry.begin) + "," + std::to_string(entry.end) + "]}";
  }
  json += '}';
  json.resize((json.size() + 7) / 8 * 8, ' ');
  const uint64_t length = json.size();
  std::string out(8, '\0');
  for (int i = 0; i < 8; i++) out[i] = static_cast<char>(length >> (8 * i));
  return out + json;
}

}  // namespace er
