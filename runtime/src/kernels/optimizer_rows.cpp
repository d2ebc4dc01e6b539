// SGD and AdamW for a table whose gradient is a row set: exactly the dense update of optimizer.cpp with zeros in all
// other rows, whose momentum and decay go on as torch's do, but no gradient as large as the table anywhere.
#include "optimizer_rule.h"
#include "row_set.h"

namespace er::ER_ISA {
namespace {

// The attributes that both kernels begin with.
enum RowsInt : uint32_t { kRows, kCols, kCapacity, kAccumulatorCapacity, kRowsInts };

RowSet gradient_of(const Call& call) {
  return RowSet(call.operands[1].data, call.ints[kRows], call.ints[kCols], call.ints[kCapacity]);
}

RowSet accumulator_of(const Call& call, uint32_t operand) {
  return RowSet(call.operands[operand].data, call.ints[kRows], call.ints[kCols], call.ints[kAccumulatorCapacity]);
}

// Checks table, gradient and accumulator; returns the bytes of the table.
uint64_t check_rows(CallCheck& check, uint32_t accumulator) {
  const int64_t rows = check.size(kRows, "rows"), cols = check.size(kCols, "cols");
  const int64_t capacity = check.integer(kCapacity, "capacity", 1, rows);
  const int64_t most = check.integer(kAccumulatorCapacity, "accumulator capacity", 0, rows);
  const uint64_t bytes = byte_size({rows, cols});
  check.present(0, "param", bytes);
  check.present(1, "grad", row_set_bytes(rows, cols, capacity));
  check.optional(accumulator, "accumulator", row_set_bytes(rows, cols, most));
  return bytes;
}

// body(row, at) for every row of the table; `at` is its first element.
template <class F>
void table_rows(const Call& call, int64_t floats, F&& body) {
  const int64_t cols = call.ints[kCols];
  parallel(call, call.ints[kRows], floats * cols, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) body(row, row * cols);
  });
}

// f(column, columns that are left) over a row.
template <class F>
void row_vectors(int64_t cols, F&& f) {
  for (int64_t c = 0; c < cols; c += kLanes) f(c, cols - c);
}

VecF row_load(const float* row, int64_t c, int64_t left) { return row ? load_upto(row + c, left) : VecF{}; }

// Adds the micro-batch's gradient to what the ones before it left; the first one begins anew. False if a slot is wrong
// or there is no room: nothing has changed then but the accumulator.
bool accumulate_rows(const Call& call, const RowSet& gradient, const RowSet& accumulator) {
  if (call.context->micro_index == 0) std::fill(accumulator.slot, accumulator.slot + accumulator.rows, -1);
  if (!accumulator.valid()) return false;
  const int64_t before = accumulator.used();
  int64_t used = before;
  for (int64_t row = 0; row < gradient.rows; row++)
    if (gradient.slot[row] >= 0 && accumulator.slot[row] < 0) {
      if (used == accumulator.capacity) return false;
      accumulator.slot[row] = static_cast<int32_t>(used++);
    }
  table_rows(call, 1, [&](int64_t row, int64_t) {
    const float* from = gradient.find(row);
    float* to = accumulator.find(row);
    if (!from || !to) return;
    const bool fresh = accumulator.slot[row] >= before;
    row_vectors(gradient.cols, [&](int64_t c, int64_t left) {
      const VecF g = load_upto(from + c, left);
      store_upto(to + c, fresh ? g : load_upto(to + c, left) + g, left);
    });
  });
  return true;
}

// ---- sgd_rows: param[rows, cols], grad (row set), momentum?, accumulator? (row set); ints rows, cols, capacity,
// accumulator capacity, nesterov; floats momentum μ, weight_decay ----

std::string check_sgd_rows(const Call& call) {
  CallCheck check(call, 4, kRowsInts + 1, 2);
  const uint64_t bytes = check_rows(check, 3);
  const bool nesterov = check.integer(kRowsInts, "nesterov", 0, 1) == 1;
  check.optional(2, "momentum", bytes);
  check_sgd_floats(check, call, nesterov);
  return check.error();
}

// M > 1, gradients add up in v, as sgd does it.
void sgd_rows_in_momentum(const Call& call, const RowSet& gradient, float* w, float* v) {
  const float mu = call.floats[0], decay = call.floats[1], rate = call.context->learning_rate;
  const bool first = call.context->micro_index == 0, last = last_micro(call);
  table_rows(call, 2, [&](int64_t row, int64_t at) {
    const float* g = gradient.find(row);
    if (!g && !first && !last) return;
    row_vectors(gradient.cols, [&](int64_t c, int64_t left) {
      VecF sum = load_upto(v + at + c, left);
      if (first) sum = mu * sum + decay * load_upto(w + at + c, left);
      sum += row_load(g, c, left);
      store_upto(v + at + c, sum, left);
      if (last) store_upto(w + at + c, load_upto(w + at + c, left) - rate * sum, left);
    });
  });
}

bool run_sgd_rows(const Call& call) {
  float *w = call.as<float>(0), *v = call.as<float>(2);
  const bool nesterov = call.ints[kRowsInts] == 1, split = call.context->micro_count > 1;
  RowSet gradient = gradient_of(call);
  if (!gradient.valid()) return false;
  if (split && !call.operands[3].data) {
    if (!v || nesterov) return false;  // there is no place to add the gradients up: refuse to change anything
    sgd_rows_in_momentum(call, gradient, w, v);
    return true;
  }
  if (split) {
    const RowSet accumulator = accumulator_of(call, 3);
    if (!accumulate_rows(call, gradient, accumulator)) return false;
    if (!last_micro(call)) return true;
    gradient = accumulator;
  }
  const Sgd rule(call, nesterov);
  const bool untouched_rows_stay = !v && rule.decay == 0;
  table_rows(call, v ? 3 : 1, [&](int64_t row, int64_t at) {
    const float* g = gradient.find(row);
    if (!g && untouched_rows_stay) return;
    row_vectors(gradient.cols, [&](int64_t c, int64_t left) {
      rule.update(w + at + c, v ? v + at + c : nullptr, row_load(g, c, left), left);
    });
  });
  return true;
}

// ---- adamw_rows: param[rows, cols], grad (row set), m, v, accumulator? (row set); ints rows, cols, capacity,
// accumulator capacity; floats beta1, beta2, epsilon, weight_decay ----

std::string check_adamw_rows(const Call& call) {
  CallCheck check(call, 5, kRowsInts, 4);
  const uint64_t bytes = check_rows(check, 4);
  check.present(2, "m", bytes);
  check.present(3, "v", bytes);
  check_adamw_floats(check, call);
  return check.error();
}

bool run_adamw_rows(const Call& call) {
  float *w = call.as<float>(0), *m = call.as<float>(2), *v = call.as<float>(3);
  const bool split = call.context->micro_count > 1;
  if (split && !call.operands[4].data) return false;  // no place to add the gradients up: refuse to change anything
  RowSet gradient = gradient_of(call);
  if (!gradient.valid()) return false;
  if (split) {
    const RowSet accumulator = accumulator_of(call, 4);
    if (!accumulate_rows(call, gradient, accumulator)) return false;
    if (!last_micro(call)) return true;
    gradient = accumulator;
  }
  const AdamW rule(call);
  table_rows(call, 4, [&](int64_t row, int64_t at) {
    const float* g = gradient.find(row);
    row_vectors(gradient.cols, [&](int64_t c, int64_t left) {
      rule.update(w + at + c, m + at + c, v + at + c, row_load(g, c, left), left);
    });
  });
  return true;
}

}  // namespace

extern const Kernel optimizer_rows_kernels[];
const Kernel optimizer_rows_kernels[] = {
    {"sgd_rows", ER_CHECK(check_sgd_rows), nullptr, run_sgd_rows},
    {"adamw_rows", ER_CHECK(check_adamw_rows), nullptr, run_adamw_rows},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
