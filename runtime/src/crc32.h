// CRC-32 with zlib's polynomial. `before` is the checksum of the bytes that come before these.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>

namespace er {

inline uint32_t crc32(const uint8_t* data, size_t bytes, uint32_t before = 0) {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> t{};
    for (uint32_t i = 0; i < 256; i++) {
      uint32_t c = i;
      for (int bit = 0; bit < 8; bit++) c = (c & 1) ? 0xedb88320u ^ (c >> 1) : c >> 1;
      t[i] = c;
    }
    return t;
  }();
  uint32_t crc = ~before;
  for (size_t i = 0; i < bytes; i++) crc = table[(crc ^ data[i]) & 0xff] ^ (crc >> 8);
  return ~crc;
}

}  // namespace er
