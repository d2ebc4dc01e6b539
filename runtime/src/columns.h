// Operands that may be columns of a wider matrix, as Q, K and V of one projection are of its result.
#pragma once
#include <cstdint>

#include "kernel.h"

namespace er {

// Where such an operand lies: from `column` of the first of rows that are `row` floats apart.
struct Columns {
  int64_t row, column;
};

// How many integers a call should have: from `at` on, row and column of `count` operands, or none.
inline uint32_t ints_with_columns(const Call& call, uint32_t at, uint32_t count) {
  return call.n_ints > at ? at + 2 * count : at;
}

// Fills out[count]. Without the integers every operand lies on its own, in rows of its width: the first of three has
// `first` columns, the next two `others`, and so on. Compiled once, for all instruction sets.
void read_columns(const Call& call, uint32_t at, uint32_t count, int64_t first, int64_t others, Columns* out);

}  // namespace er
