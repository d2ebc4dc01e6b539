// Names come from files and go out as C strings to callers that decode them.
#pragma once
#include <cstdint>
#include <string>

namespace er {

// Whether `s` is well-formed UTF-8 (no surrogates, no overlong forms) without NUL characters.
inline bool is_utf8(const std::string& s) {
  for (size_t i = 0; i < s.size();) {
    const uint8_t c = static_cast<uint8_t>(s[i++]);
    if (c == 0) return false;
    if (c < 0x80) continue;
    const int more = c >= 0xc2 && c < 0xe0 ? 1 : c >= 0xe0 && c < 0xf0 ? 2 : c >= 0xf0 && c < 0xf5 ? 3 : 0;
    if (!more || s.size() - i < static_cast<size_t>(more)) return false;
    uint32_t point = c & (0x3f >> more);
    for (int k = 0; k < more; k++) {
      const uint8_t next = static_cast<uint8_t>(s[i++]);
      if ((next & 0xc0) != 0x80) return false;
      point = point << 6 | (next & 0x3f);
    }
    if ((more == 2 && point < 0x800) || (more == 3 && (point < 0x10000 || point > 0x10ffff)) ||
        (point >= 0xd800 && point < 0xe000))
      return false;
  }
  return true;
}

}  // namespace er
