// What the attention kernels share: sizes, masks, and the probabilities of a tile of queries.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "../simd.h"
#include "call_check.h"
#include "philox.h"
#include "product.h"

namespace er::ER_ISA {

constexpr int64_t kTile = 66;                   // queries at once at most: sums over them are long enough
constexpr int64_t kMaxSize = int64_t{1} << 30;  // no product of two overflows
constexpr uint32_t kAttentionInts = 9;          // that both kernels begin with

struct Attention {
  int64_t n, t, s, heads, kv_heads, d;
  bool causal;
  int64_t bias_heads;  // 0: no bias, 1: [t, s] for all heads, else `heads`
  int64_t stream;
  float scale = 0, ratio = 0;
  const float *key_mask = nullptr, *bias = nullptr;

  int64_t q_row() const { return heads * d; }
  int64_t kv_row() const { return kv_heads * d; }
  int64_t p_row() const { return (s + 15) / 16 * 16; }  // floats between two rows of a tile of probabilities
  int64_t reach(int64_t query) const { return causal ? std::min(s, query + 1) : s; }
  int64_t tiles() const { return (t + kTile - 1) / kTile; }
  int64_t tile_begin(int64_t i) const { return t * i / tiles(); }  // tiles are as even as rows are
};

inline Attention parse_sizes(const Call& call) {
  const int64_t* i = call.ints;
  return {i[0], i[1], i[2], i[3], i[4], i[5], i[6] == 1, i[7], i[8]};
}

inline Attention parse(const Call& call) {
  Attention a = parse_sizes(call);
  a.scale = call.floats[0], a.ratio = call.floats[1];
  return a;
}

// The attributes that both kernels share; sizes are bounded so that no product of a row and a size overflows.
inline void check_attributes(CallCheck& check, const Call& call) {
  static const char* const names[] = {"n", "t", "s", "heads", "kv_heads", "d"};
  for (uint32_t i = 0; i < 6; i++) check.integer(i, names[i], 1, kMaxSize);
  check.integer(6, "causal", 0, 1);
  check.integer(7, "bias_heads", 0, kMaxSize);
  check.integer(8, "stream", 0, UINT32_MAX);
  if (!check.ok()) return;
  const Attention a = parse(call);
  check.require(a.heads % a.kv_heads == 0, "heads must be a multiple of kv_heads");
  check.require(a.heads * a.d <= kMaxSize, "heads times d is too large");
  check.require(a.bias_heads <= 1 || a.bias_heads == a.heads, "bias_heads must be 0, 1 or heads");
  check.require(std::isfinite(a.scale), "scale must be finite");
  check.require(a.ratio >= 0 && a.ratio <= 1, "ratio must be 0 to 1");
  const uint64_t mask = byte_size({a.heads, a.t, a.s}, 1);
  check.require(a.ratio == 0 || mask <= static_cast<uint64_t>(kMaxMask), "the mask of dropout is too large");
}

inline uint64_t query_bytes(const Attention& a, uint64_t each = 4) { return byte_size({a.n, a.t, a.heads, a.d}, each); }
inline uint64_t key_bytes(const Attention& a, uint64_t each = 4) {
  return byte_size({a.n, a.s, a.kv_heads, a.d}, each);
}

// Bytes of the rows that one of Q, K, V, dQ, dK and dV has columns of.
ER_COLD inline uint64_t check_columns(CallCheck& check, const Call& call, const Attention& a, uint32_t at,
                                      uint32_t index) {
  const int64_t row = check_columns(check, call, at, index, index % 3 ? a.kv_row() : a.q_row());
  return byte_size({a.n, index % 3 ? a.s : a.t, row});
}

inline void check_masks(CallCheck& check, const Call& call, const Attention& a, bool needed = true) {
  check.optional(3, "key_mask", byte_size({a.n, a.s}));
  if (a.bias_heads && !needed)
    check.optional(4, "bias", byte_size({a.bias_heads, a.t, a.s}));
  else if (a.bias_heads)
    check.present(4, "bias", byte_size({a.bias_heads, a.t, a.s}));
  else if (check.ok())
    check.require(!call.operands[4].data, "bias is present, but bias_heads is 0");
}

inline VecF exp_or_zero(VecF x) { return (VecF)(~(VecI)(x < -87.0f) & (VecI)exp(x)); }

// Turns a row of products Q·K into probabilities: those of `count` keys, of which key_mask (or null) tells who may be
// looked at. Without any, all are 0. Whole vectors of x are written, with zeros behind `count`.
__attribute__((noinline)) inline void softmax_row(float* x, int64_t count, float scale, const float* bias,
                                                  const float* key_mask) {
  const VecF lowest = broadcast(-std::numeric_limits<float>::infinity());
  const int64_t whole = count / kLanes * kLanes, padded = whole_vectors(count);
  const bool plain = !bias && !key_mask && scale > 0;  // the largest product is the largest score
  VecF best = lowest;
  auto score = [&](int64_t j, auto&& from) {
    VecF v = load(x + j) * scale;
    if (bias) v += from(bias + j);
    return key_mask ? select(from(key_mask + j) > 0.5f, v, lowest) : v;
  };
  if (plain)
    for (int64_t j = 0; j < whole; j += kLanes) best = max(best, load(x + j));
  else
    for (int64_t j = 0; j < whole; j += kLanes) {
      const VecF v = score(j, [](const float* from) { return load(from); });
      store(x + j, v);
      best = max(best, v);
    }
  if (whole < count) {
    const int64_t left = count - whole;
    const VecF v = plain ? load(x + whole)
                         : score(whole, [&](const float* from) { return load_partial(from, static_cast<int>(left)); });
    store(x + whole, select(lane_index() < static_cast<int32_t>(left), v, lowest));
    best = max_or_nan(best, load(x + whole));
  }
  const float times = plain ? scale : 1.0f, top = highest(best) * times;
  if (top == lowest[0]) {
    std::fill_n(x, padded, 0.f);
    return;
  }
  double total = 0;
  constexpr int64_t kRun = 32 * kLanes;
  for (int64_t first = 0; first < padded; first += kRun) {
    const int64_t last = std::min(padded, first + kRun);
    VecF run{};
    for (int64_t j = first; j < last; j += kLanes) {
      const VecF e = exp_or_zero(load(x + j) * times - top);
      store(x + j, e);
      run += e;
    }
    total += sum(run);
  }
  const float factor = static_cast<float>(1.0 / total);
  for (int64_t j = 0; j < padded; j += kLanes) store(x + j, load(x + j) * factor);
}

// p[rows][p_row()] = probabilities of queries [first, first + rows) of a head for keys [0, end); what a causal mask
// hides is 0, and so is what fills the last vector. `keys` are all keys of the head, packed.
inline void probabilities(const Attention& a, int64_t sample, int64_t head, int64_t first, int64_t rows, int64_t end,
                          const float* q, int64_t q_row, ProductColumns keys, float* p) {
  product(rows, end, a.d, q, q_row, 1, keys, false, p, a.p_row());
  const float* mask = a.key_mask ? a.key_mask + sample * a.s : nullptr;
  for (int64_t i = 0; i < rows; i++) {
    const int64_t count = std::min(end, a.reach(first + i));
    const float* bias = a.bias ? a.bias + ((a.bias_heads > 1 ? head : 0) * a.t + first + i) * a.s : nullptr;
    softmax_row(p + i * a.p_row(), count, a.scale, bias, mask);
    std::fill(p + i * a.p_row() + count, p + i * a.p_row() + whole_vectors(end), 0.f);
  }
}

// Multiplies rows of keys [0, end) by the mask of dropout: element (head·t + query)·s + key of the sample.
inline void apply_dropout(const Attention& a, const DropoutMask& mask, int64_t sample, int64_t head, int64_t first,
                          int64_t rows, int64_t end, float* p) {
  for (int64_t i = 0; i < rows; i++) {
    const int64_t begin = (head * a.t + first + i) * a.s;
    float* row = p + i * a.p_row();
    for (int64_t at = begin / 4 * 4; at < begin + end; at += kWords) {
      float factor[kWords];
      mask.factors(sample, at, kWords, factor);
      for (int64_t e = std::max(at, begin); e < std::min(at + kWords, begin + end); e++)
        row[e - begin] *= factor[e - at];
    }
  }
}

}  // namespace er::ER_ISA
