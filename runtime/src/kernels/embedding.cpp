// Rows of a table by index, forward and backward, and rotary position embedding (Su et al., "RoFormer", 2021).
#include <algorithm>

#include "../kernel.h"
#include "../simd.h"
#include "call_check.h"
#include "row_set.h"
#include "weight_view.h"

namespace er::ER_ISA {
namespace {

// embedding: ids[n] int32, W[vocabulary, cols] → Y[n, cols]; ints n, vocabulary, cols, form: 0 as it is; 1: stored
// [cols, vocabulary], as a linear layer that shares it needs it; 2, 3: rows in bf16, or int8 with a scale a row.
enum TableForm : int64_t { kTable = 0, kTransposed = 1, kTableBf16 = 2, kTableInt8 = 3 };

int64_t stored_as(int64_t form) { return form == kTableBf16 ? kRowsBf16 : form == kTableInt8 ? kRowsInt8 : kRowsFloat; }

std::string check_embedding(const Call& call) {
  CallCheck check(call, 3, 4, 0);
  const int64_t n = check.size(0, "n"), vocabulary = check.size(1, "vocabulary"), cols = check.size(2, "cols");
  const int64_t form = check.integer(3, "form", kTable, kTableInt8);
  check.present(0, "ids", byte_size({n}));
  check.present(1, "W", weight_rows_bytes(stored_as(form), vocabulary, cols));
  check.present(2, "Y", byte_size({n, cols}));
  return check.error();
}

bool ids_valid(const int32_t* ids, int64_t n, int64_t vocabulary) {
  return std::all_of(ids, ids + n, [&](int32_t id) { return id >= 0 && id < vocabulary; });
}

bool run_embedding(const Call& call) {
  const int64_t n = call.ints[0], vocabulary = call.ints[1], cols = call.ints[2];
  const int32_t* ids = call.as<const int32_t>(0);
  const float* w = call.as<const float>(1);
  float* y = call.as<float>(2);
  if (!ids_valid(ids, n, vocabulary)) return false;
  const int64_t form = call.ints[3];
  if (form == kTransposed) {
    parallel(call, n, 16 * cols, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++)
        for (int64_t c = 0; c < cols; c++) y[r * cols + c] = w[c * vocabulary + ids[r]];
    });
    return true;
  }
  const WeightView table{stored_as(form), 1, cols, vocabulary, w};
  table.with_form([&](auto known) {
    parallel(call, n, 2 * cols, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++)
        for (int64_t c = 0; c < cols; c += kLanes)
          store_upto(y + r * cols + c, table.load<known>(0, ids[r], c, cols - c), cols - c);
    });
  });
  return true;
}

// embedding_grad: ids[n], dY[n, cols] → G as W; ints n, vocabulary, cols, transposed, padding_idx (-1: none). Each
// thread owns rows of the table (columns, if transposed), so the sums have one order for every number of threads.
std::string check_embedding_grad(const Call& call) {
  CallCheck check(call, 3, 5, 0);
  const int64_t n = check.size(0, "n"), vocabulary = check.size(1, "vocabulary"), cols = check.size(2, "cols");
  check.integer(3, "transposed", 0, 1);
  check.integer(4, "padding_idx", -1, kMaxDim);
  check.present(0, "ids", byte_size({n}));
  check.present(1, "dY", byte_size({n, cols}));
  check.present(2, "G", byte_size({vocabulary, cols}));
  return check.error();
}

bool run_embedding_grad(const Call& call) {
  const int64_t n = call.ints[0], vocabulary = call.ints[1], cols = call.ints[2], padding = call.ints[4];
  const int32_t* ids = call.as<const int32_t>(0);
  const float* dy = call.as<const float>(1);
  float* g = call.as<float>(2);
  if (!ids_valid(ids, n, vocabulary)) return false;
  if (call.ints[3] == 1) {
    parallel(call, cols, 2 * (n + vocabulary), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; c++) {
        float* row = g + c * vocabulary;
        std::fill(row, row + vocabulary, 0.0f);
        for (int64_t r = 0; r < n; r++)
          if (ids[r] != padding) row[ids[r]] += dy[r * cols + c];
      }
    });
    return true;
  }
  parallel(call, vocabulary, 2 * cols, [&](int64_t begin, int64_t end) {
    std::fill(g + begin * cols, g + end * cols, 0.0f);
    for (int64_t r = 0; r < n; r++) {
      const int64_t id = ids[r];
      if (id < begin || id >= end || id == padding) continue;
      float* row = g + id * cols;
      for (int64_t c = 0; c < cols; c += kLanes)
        store_upto(row + c, load_upto(row + c, cols - c) + load_upto(dy + r * cols + c, cols - c), cols - c);
    }
  });
  return true;
}

// embedding_grad_rows: ids[n], dY[n, cols] → R, the row set of the table's gradient; ints n, vocabulary, cols, capacity
// (at least min(n, vocabulary)), padding_idx (−1: none). Rows get slots in the order in which the batch names them.
std::string check_embedding_grad_rows(const Call& call) {
  CallCheck check(call, 3, 5, 0);
  const int64_t n = check.size(0, "n"), vocabulary = check.size(1, "vocabulary"), cols = check.size(2, "cols");
  const int64_t capacity = check.integer(3, "capacity", std::min(n, vocabulary), vocabulary);
  check.integer(4, "padding_idx", -1, kMaxDim);
  check.present(0, "ids", byte_size({n}));
  check.present(1, "dY", byte_size({n, cols}));
  check.present(2, "R", row_set_bytes(vocabulary, cols, capacity));
  return check.error();
}

bool run_embedding_grad_rows(const Call& call) {
  const int64_t n = call.ints[0], cols = call.ints[2], padding = call.ints[4];
  const int32_t* ids = call.as<const int32_t>(0);
  const float* dy = call.as<const float>(1);
  const RowSet set(call.operands[2].data, call.ints[1], cols, call.ints[3]);
  if (!ids_valid(ids, n, set.rows)) return false;
  std::fill(set.slot, set.slot + set.rows, -1);
  // A wrong plan may have ids and R overlap, so that ids change while R is written: each use of one is checked.
  const auto slot_of = [&](int64_t r) -> int32_t* {
    const int64_t id = ids[r];
    return id < 0 || id >= set.rows || id == padding ? nullptr : set.slot + id;
  };
  int32_t used = 0;
  for (int64_t r = 0; r < n; r++)
    if (int32_t* slot = slot_of(r); slot && *slot < 0 && used < set.capacity) *slot = used++;
  // Each thread owns slots, so that the sums have one order for every number of threads.
  parallel(call, used, n + cols, [&](int64_t begin, int64_t end) {
    std::fill(set.value + begin * cols, set.value + end * cols, 0.0f);
    for (int64_t r = 0; r < n; r++) {
      const int32_t* slot = slot_of(r);
      const int64_t at = slot ? *slot : -1;
      if (at < begin || at >= end) continue;
      float* row = set.value + at * cols;
      for (int64_t c = 0; c < cols; c += kLanes)
        store_upto(row + c, load_upto(row + c, cols - c) + load_upto(dy + r * cols + c, cols - c), cols - c);
    }
  });
  return true;
}

// rotary: X[n, t, heads·d], cos[t, d], sin[t, d] → Y (may alias X); ints n, t, heads, d, inverse.
// y = x·cos + rotate_half(x)·sin with rotate_half([a, b]) = [−b, a]; inverse is the transpose, its gradient.
std::string check_rotary(const Call& call) {
  CallCheck check(call, 4, 5, 0);
  const int64_t n = check.size(0, "n"), t = check.size(1, "t"), heads = check.size(2, "heads"), d = check.size(3, "d");
  check.integer(4, "inverse", 0, 1);
  check.require(d % 2 == 0, "d must be even");
  check.present(0, "X", byte_size({n, t, heads, d}));
  check.present(1, "cos", byte_size({t, d}));
  check.present(2, "sin", byte_size({t, d}));
  check.present(3, "Y", byte_size({n, t, heads, d}));
  return check.error();
}

bool run_rotary(const Call& call) {
  const int64_t t = call.ints[1], heads = call.ints[2], d = call.ints[3], half = d / 2;
  const bool inverse = call.ints[4] == 1;
  const float *x = call.as<const float>(0), *cosines = call.as<const float>(1), *sines = call.as<const float>(2);
  float* y = call.as<float>(3);
  parallel(call, call.ints[0] * t, 4 * heads * d, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const float *cosine = cosines + row % t * d, *sine = sines + row % t * d;
      for (int64_t h = 0; h < heads; h++) {
        const float* a = x + (row * heads + h) * d;
        float* out = y + (row * heads + h) * d;
        for (int64_t c = 0; c < half; c += kLanes) {
          const int64_t left = half - c;
          const VecF first = load_upto(a + c, left), second = load_upto(a + half + c, left);
          const VecF c0 = load_upto(cosine + c, left), c1 = load_upto(cosine + half + c, left);
          const VecF s0 = load_upto(sine + c, left), s1 = load_upto(sine + half + c, left);
          store_upto(out + c, inverse ? first * c0 + second * s1 : first * c0 - second * s0, left);
          store_upto(out + half + c, inverse ? second * c1 - first * s0 : second * c1 + first * s1, left);
        }
      }
    }
  });
  return true;
}

}  // namespace

extern const Kernel embedding_kernels[];
const Kernel embedding_kernels[] = {
    {"embedding", ER_CHECK(check_embedding), nullptr, run_embedding},
    {"embedding_grad", ER_CHECK(check_embedding_grad), nullptr, run_embedding_grad},
    {"embedding_grad_rows", ER_CHECK(check_embedding_grad_rows), nullptr, run_embedding_grad_rows},
    {"rotary", ER_CHECK(check_rotary), nullptr, run_rotary},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
