// Where the sections of a kept tensor lie (docs/plan-format.md, "Packed tensor"), for the kernels that write and read
// it.
#pragma once
#include <cstdint>
#include <cstring>

namespace er {

enum Form : int64_t { kDense = 0, kBf16 = 1, kPlain = 2, kCentered = 3, kRows = 4 };

constexpr int64_t kBlockRows = 64;     // at most; rows of one mask word
constexpr int64_t kGroupColumns = 16;  // columns that share one stored value offset

// A kept tensor of shape [samples, rows, cols], or some samples of one. Offsets in bytes from the tensor's beginning;
// forms 0 and 1 have one section, `value`.
struct PackedLayout {
  int64_t form, samples, rows, cols, keep;
  int64_t blocks, groups;                            // a sample
  uint64_t scale, mean, mask, offset, value, bytes;  // bytes: of the whole tensor

  int64_t row_begin(int64_t block) const { return block * rows / blocks; }
  int64_t value_bytes() const { return form == kDense ? 4 : form == kCentered ? 1 : 2; }
  bool razor() const { return form >= kPlain; }
  // Samples [first, first + count), counted from 0: what is written or read by it is that part of the whole tensor.
  PackedLayout part(int64_t first, int64_t count) const;
};

// Lays out a kept tensor. False if the arguments are invalid: a dimension below 1, more than 2^40 elements, 2^32 or
// more elements a sample for forms 2 and 3, keep negative or above the elements of a sample, or not 0 for forms 0
// and 1.
bool packed_layout(int64_t form, int64_t samples, int64_t rows, int64_t cols, int64_t keep, PackedLayout* layout);

// A matrix of which each row keeps its largest values (form 4): rows of all samples, `keep` values a row.
struct RowsLayout {
  int64_t rows, cols, keep, words;  // words of 64 mask bits a row
  uint64_t value, bytes;            // the mask begins at 0
};

// False if the arguments are invalid: a dimension or keep below 1, more than 2^40 elements, or keep above cols.
bool rows_layout(int64_t samples, int64_t rows, int64_t cols, int64_t keep, RowsLayout* layout);

inline float from_bf16(uint16_t half) {
  uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Rounds to the nearest, ties to even. x is not NaN; overflow gives infinity.
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Typed pointers to the sections of a kept tensor. Const correctness is the caller's.
struct PackedSections {
  float* scale;      // [samples], centered
  uint16_t* mean;    // [samples][blocks][cols], centered
  uint64_t* mask;    // [samples][blocks][cols]
  uint32_t* offset;  // [samples][blocks][groups]
  uint8_t* value;    // [samples][keep] of value_bytes(); forms 0 and 1: [samples][rows][cols]

  PackedSections(const PackedLayout& at, void* packed)
      : scale(reinterpret_cast<float*>(static_cast<uint8_t*>(packed) + at.scale)),
        mean(reinterpret_cast<uint16_t*>(static_cast<uint8_t*>(packed) + at.mean)),
        mask(reinterpret_cast<uint64_t*>(static_cast<uint8_t*>(packed) + at.mask)),
        offset(reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(packed) + at.offset)),
        value(static_cast<uint8_t*>(packed) + at.value) {}
};

}  // namespace er
