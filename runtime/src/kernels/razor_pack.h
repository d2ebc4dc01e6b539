// Packing of one sample into the razor forms (razor_pack.cpp), for the `pack` kernel.
#pragma once
#include <algorithm>
#include <cfloat>
#include <climits>
#include <cstdint>
#include <cstring>

#include "../kernel.h"
#include "../packed.h"
#include "../simd.h"
#include "bytes.h"

namespace er::ER_ISA {

constexpr int kBins = 4096;
constexpr int32_t kBf16Overflow =
    0x7f7f8000;  // the smallest magnitude that rounds to an infinite bf16; NaN and infinity lie above it
constexpr int32_t kInfinity = 0x7f800000;

// A magnitude is the bits of a float without its sign: it orders as the absolute value does.
inline int32_t magnitude(float x) {
  int32_t b;
  std::memcpy(&b, &x, sizeof b);
  return b & INT_MAX;
}

inline VecH to_bf16_vector(VecF x) {
  const VecU u = (VecU)x;
  return narrow_to_halves((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// The sections of one sample.
struct Sample {
  const PackedLayout& at;
  const float* x;  // [rows][cols], rows `row` floats apart
  int64_t row;
  uint16_t* mean;    // [blocks][cols] or null
  uint64_t* mask;    // [blocks][cols]
  uint32_t* offset;  // [blocks][groups]
  uint8_t* value;    // [keep]
  float* scale;      // one, or null
};

// What one thread works in.
struct PackScratch {
  uint32_t* histogram;  // [kBins]
  float* list;          // [list_capacity]
};

// Residuals that a thread can remember: what is kept, and some more, since the threshold is not known beforehand.
inline int64_t list_capacity(const PackedLayout& at) { return (at.keep + at.keep / 2 + 4096 + 15) / 16 * 16; }
inline uint64_t pack_scratch_bytes(const PackedLayout& at) {
  return kBins * sizeof(uint32_t) + static_cast<uint64_t>(list_capacity(at)) * sizeof(float);
}
inline PackScratch pack_scratch_of(const PackedLayout& at, void* scratch, int thread) {
  uint8_t* own = static_cast<uint8_t*>(scratch) + static_cast<uint64_t>(thread) * pack_scratch_bytes(at);
  return {reinterpret_cast<uint32_t*>(own), reinterpret_cast<float*>(own + kBins * sizeof(uint32_t))};
}

// Packs a sample on the calling thread. False if a value is not finite (bf16: or would overflow).
bool pack_sample(const Sample& sample, const PackScratch& scratch);
// The same with all threads of the pool (at most 64), each a range of blocks. The result is the same.
bool pack_sample_shared(const Sample& sample, void* scratch, ThreadPool* pool);

}  // namespace er::ER_ISA
