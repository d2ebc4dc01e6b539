// The gradient of a table by the rows that have one: int32 slot[rows] (−1: the row's gradient is zero), then, aligned
// to 64 bytes, float32 value[capacity][cols] (docs/plan-format.md, "Row set").
#pragma once
#include <algorithm>
#include <cstdint>

#include "../kernel.h"
#include "call_check.h"

namespace er::ER_ISA {

constexpr uint64_t row_set_values(int64_t rows) { return (static_cast<uint64_t>(rows) * 4 + 63) / 64 * 64; }

// UINT64_MAX if it is too large. Sizes are at most kMaxDim.
inline uint64_t row_set_bytes(int64_t rows, int64_t cols, int64_t capacity) {
  const uint64_t values = byte_size({capacity, cols});
  uint64_t total;
  return values == UINT64_MAX || __builtin_add_overflow(values, row_set_values(rows), &total) ? UINT64_MAX : total;
}

struct RowSet {
  int32_t* slot;
  float* value;
  int64_t rows, cols, capacity;

  RowSet(void* data, int64_t rows_, int64_t cols_, int64_t capacity_)
      : slot(static_cast<int32_t*>(data)),
        value(reinterpret_cast<float*>(static_cast<char*>(data) + row_set_values(rows_))),
        rows(rows_),
        cols(cols_),
        capacity(capacity_) {}

  // Slots are memory contents that nothing vouches for.
  bool valid() const {
    return std::all_of(slot, slot + rows, [&](int32_t s) { return s >= -1 && s < capacity; });
  }
  int64_t used() const {
    int32_t last = -1;
    for (int64_t r = 0; r < rows; r++) last = std::max(last, slot[r]);
    return last + 1;
  }
  // The gradient of a row, or null. Checked at each use: in a wrong plan what is written may be the slots themselves.
  float* find(int64_t row) const {
    const int64_t at = slot[row];
    return at < 0 || at >= capacity ? nullptr : value + at * cols;
  }
};

}  // namespace er::ER_ISA
