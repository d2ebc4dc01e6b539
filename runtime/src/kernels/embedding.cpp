// Rows of a table by index, forward and backward, and rotary position embedding (Su et al., "RoFormer", 2021).
#include <algorithm>
#include <cstring>

#include "../kernel.h"
#include "../simd.h"
#include "call_check.h"

namespace er::ER_ISA {
namespace {

// embedding: ids[n] int32, W[vocabulary, cols] → Y[n, cols]; ints n, vocabulary, cols, transposed.
// transposed: W is stored [cols, vocabulary], as a linear layer that shares it needs it.
std::string check_embedding(const Call& call) {
  CallCheck check(call, 3, 4, 0);
  const int64_t n = check.size(0, "n"), vocabulary = check.size(1, "vocabulary"), cols = check.size(2, "cols");
  check.integer(3, "transposed", 0, 1);
  check.present(0, "ids", byte_size({n}));
  check.present(1, "W", byte_size({vocabulary, cols}));
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
  const bool transposed = call.ints[3] == 1;
  parallel(call, n, transposed ? 16 * cols : 2 * cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      if (!transposed) {
        std::memcpy(y + r * cols, w + ids[r] * cols, static_cast<size_t>(cols) * sizeof(float));
        continue;
      }
      for (int64_t c = 0; c < cols; c++) y[r * cols + c] = w[c * vocabulary + ids[r]];
    }
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
    {"embedding", check_embedding, nullptr, run_embedding},
    {"embedding_grad", check_embedding_grad, nullptr, run_embedding_grad},
    {"rotary", check_rotary, nullptr, run_rotary},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
