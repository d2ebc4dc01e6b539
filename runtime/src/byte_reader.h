// Reads little-endian values from a buffer and refuses to read past its end.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "error.h"

namespace er {

class ByteReader {
 public:
  ByteReader(const uint8_t* data, size_t bytes) : at_(data), left_(bytes) {}
  size_t left() const { return left_; }

  template <class T>
  T value() {
    static_assert(std::is_arithmetic_v<T>);
    T v;
    std::memcpy(&v, take(sizeof v), sizeof v);
    return v;
  }

  // A u32 count whose items take `item_bytes` or more each: bounded by what is left, so that no count makes us allocate
  // more than the file could fill.
  uint32_t count(size_t item_bytes) {
    const uint32_t n = value<uint32_t>();
    if (n > left_ / item_bytes)
      throw Error{ER_BAD_PLAN, "the plan is truncated or altered: a list is longer than the file"};
    return n;
  }

  template <class T>
  std::vector<T> values() {
    std::vector<T> items(count(sizeof(T)));
    if (!items.empty()) std::memcpy(items.data(), take(items.size() * sizeof(T)), items.size() * sizeof(T));
    return items;
  }

  std::string string() {
    const uint32_t n = count(1);
    const char* text = reinterpret_cast<const char*>(take(n));
    return std::string(text, n);
  }

 private:
  const uint8_t* take(size_t bytes) {
    if (bytes > left_) throw Error{ER_BAD_PLAN, "the plan is truncated or altered: it ends in the middle of a field"};
    const uint8_t* at = at_;
    at_ += bytes;
    left_ -= bytes;
    return at;
  }
  const uint8_t* at_;
  size_t left_;
};

}  // namespace er
