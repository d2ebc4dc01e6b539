#include "columns.h"

namespace er {

void read_columns(const Call& call, uint32_t at, uint32_t count, int64_t first, int64_t others, Columns* out) {
  const bool given = call.n_ints > at;
  for (uint32_t i = 0; i < count; i++, at += 2) {
    out[i] = {i % 3 ? others : first, 0};
    if (given) out[i] = {call.ints[at], call.ints[at + 1]};
  }
}

}  // namespace er
