// Back Razor's second backward pass of attention (Jiang et al., NeurIPS 2022): the forward pass keeps the largest
// probabilities of each query, and the backward pass computes its products only where one was kept.
//
// Rows are (sample, head, query). A kept probability p is bf16 with a free sign, which says that dropout drops it: the
// backward pass needs no mask. With the kept set J of a query, m = 0 or 1/(1 − ratio), and dP[j] = m[j]·dY·V[j]:
//   delta = Σ p·dP / Σ p,  dS[j] = scale·p[j]·(dP[j] − delta),  dQ = Σ dS[j]·K[j],  dK[j] += dS[j]·Q,  dV[j] += p·m·dY.
// Over all keys Σ p is 1 and this is the exact gradient. Over some of them the division keeps Σ dS at 0, as it is in a
// softmax; without it whatever V and dY have in common leaks into dQ and dK.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../packed.h"
#include "../simd.h"

namespace er::ER_ISA {

// What to keep of a row of probabilities (their bits, which order like the numbers): those above `above`, and the first
// `ties` equal to `above` + 1.
struct RowChoice {
  int32_t above;
  int64_t ties;
};

inline VecI magnitude_bits(const float* p) { return (VecI)load(p) & 0x7fffffff; }

constexpr int kBounds = 4;  // that one pass over a row compares with

// count[i] = values of p[padded] whose bits are above bound[i].
inline void count_above(const float* p, int64_t padded, const int32_t bound[kBounds], int64_t count[kBounds]) {
  std::fill_n(count, kBounds, 0);
  for (int64_t j = 0; j < padded; j += kLanes) {
    const VecI bits = magnitude_bits(p + j);
    for (int i = 0; i < kBounds; i++) count[i] += __builtin_popcount(mask_bits(bits > bound[i]));
  }
}

// p[padded] are probabilities, 0 from the last key on; padded is a multiple of kLanes. The bound is searched for in
// fifths of an interval; four or five passes settle it, since a row's largest lie within a few powers of two.
inline RowChoice choose_row(const float* p, int64_t padded, int64_t keep) {
  VecI most{};
  for (int64_t j = 0; j < padded; j += kLanes) {
    const VecI bits = magnitude_bits(p + j);
    most = bits > most ? bits : most;
  }
  int32_t low = 0, high = 0;  // more than `keep` values lie above low, at most `keep` above high
  for (int lane = 0; lane < kLanes; lane++) high = std::max(high, most[lane]);
  int64_t count[kBounds], above_high = 0;
  int32_t bound[kBounds] = {0, high - (8 << 23), high - (4 << 23), high - (2 << 23)};  // an exponent has 23 bits below
  for (int i = 1; i < kBounds; i++) bound[i] = std::max(bound[i], 0);
  count_above(p, padded, bound, count);
  if (count[0] <= keep) return {0, 0};
  for (;;) {
    for (int i = 0; i < kBounds; i++) {
      if (count[i] == keep) return {bound[i], 0};
      if (count[i] > keep) low = std::max(low, bound[i]);
      if (count[i] < keep && bound[i] < high) high = bound[i], above_high = count[i];
    }
    if (high - low <= 1) return {low, keep - above_high};
    const int64_t width = int64_t{high} - low;
    for (int i = 0; i < kBounds; i++)
      bound[i] = static_cast<int32_t>(low + std::max<int64_t>(1, width * (i + 1) / (kBounds + 1)));
    count_above(p, padded, bound, count);
  }
}

inline uint16_t probability_to_bf16(float p) { return p == p ? to_bf16(p) : 0x7fc0; }

// Keeps the `keep` largest of p[count] (of equal ones the first; zeros never) as mask[words] and value[keep]. p is
// rounded up to whole vectors with zeros.
inline void keep_row(float* p, int64_t count, int64_t keep, int64_t words, uint64_t* mask, uint16_t* value) {
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  std::fill(p + count, p + padded, 0.f);
  const RowChoice choice = choose_row(p, padded, keep);
  std::fill_n(mask, words, 0);
  int64_t ties = choice.ties, n = 0;
  for (int64_t j = 0; j < padded; j += kLanes) {
    const VecI bits = magnitude_bits(p + j);
    uint32_t kept = mask_bits(bits > choice.above + 1);
    uint32_t equal = mask_bits(bits == choice.above + 1);
    if (choice.ties == 0) kept |= equal, equal = 0;
    for (; equal && ties > 0; equal &= equal - 1, ties--) kept |= equal & -equal;
    mask[j / 64] |= uint64_t{kept} << (j % 64);
    for (; kept; kept &= kept - 1) value[n++] = probability_to_bf16(p[j + __builtin_ctz(kept)]);
  }
}

// Marks the kept values whose probability is 0 in p, which is the row after dropout.
inline void mark_dropped(const float* p, int64_t words, const uint64_t* mask, uint16_t* value) {
  for (int64_t w = 0; w < words; w++)
    for (uint64_t left = mask[w]; left; left &= left - 1, value++)
      if (p[64 * w + __builtin_ctzll(left)] == 0.f) *value |= 0x8000;
}

// A query's kept probabilities, unpacked.
struct KeptRow {
  int32_t* key;   // [keep]
  float *p, *ds;  // [keep], and room for kLanes − 1 more
  int64_t n;

  // False if the mask has more than `keep` bits or one at or past `keys`.
  bool read(const RowsLayout& at, const uint64_t* mask, const uint16_t* value) {
    n = 0;
    for (int64_t w = 0; w < at.words; w++)
      for (uint64_t left = mask[w]; left; left &= left - 1) {
        const int64_t j = 64 * w + __builtin_ctzll(left);
        if (n == at.keep || j >= at.cols) return false;
        key[n] = static_cast<int32_t>(j);
        p[n] = from_bf16(value[n]);
        n++;
      }
    return true;
  }
};

// ds[i] = dy·v[key[i]] for all kept keys, and for up to kLanes − 1 more.
inline void dot_rows(const KeptRow& row, const float* dy, const float* v, int64_t width) {
  for (int64_t first = 0; first < row.n; first += kLanes) {
    VecF product[kLanes];
    for (int u = 0; u < kLanes; u++) {
      const float* other = v + row.key[std::min(first + u, row.n - 1)] * width;
      product[u] = load(dy) * load(other);
      for (int64_t c = kLanes; c < width; c += kLanes) product[u] += load(dy + c) * load(other + c);
    }
    transpose(product);
    for (int u = 1; u < kLanes; u++) product[0] += product[u];
    store(row.ds + first, product[0]);
  }
}

// to += Σ ds[j]·k[key[j]], kVectors vectors of it.
template <int kVectors>
inline void gather_rows(const KeptRow& row, const float* k, int64_t width, float* to) {
  VecF total[kVectors];
  for (int u = 0; u < kVectors; u++) total[u] = load(to + u * kLanes);
  for (int64_t i = 0; i < row.n; i++)
    for (int u = 0; u < kVectors; u++) total[u] += load(k + row.key[i] * width + u * kLanes) * row.ds[i];
  for (int u = 0; u < kVectors; u++) store(to + u * kLanes, total[u]);
}

inline void add_row(float factor, const float* x, int64_t width, float* to) {
  for (int64_t c = 0; c < width; c += kLanes) store(to + c, load(to + c) + load(x + c) * factor);
}

// One query. q, dy, dq and the rows of k, v, dk, dv have `width` floats, a multiple of kLanes, zeros behind d; dq, dk
// or dv may be null. `scale` is that of the scores, `kept_scale` 1/(1 − ratio).
inline void row_gradient(KeptRow& row, float scale, float kept_scale, int64_t width, const float* q, const float* k,
                         const float* v, const float* dy, float* dq, float* dk, float* dv) {
  dot_rows(row, dy, v, width);
  std::fill_n(row.p + row.n, (kLanes - row.n % kLanes) % kLanes, 0.f);
  VecF products{}, mass{};
  for (int64_t i = 0; i < row.n; i += kLanes) {
    const VecF p = load(row.p + i), dp = (VecF)(~((VecI)p < 0) & (VecI)(load(row.ds + i) * kept_scale));
    store(row.ds + i, dp);
    products += abs(p) * dp;
    mass += abs(p);
  }
  const float total = sum(mass), delta = total > 0 ? sum(products) / total : 0.f;
  for (int64_t i = 0; i < row.n; i += kLanes)
    store(row.ds + i, abs(load(row.p + i)) * (load(row.ds + i) - delta) * scale);
  if (dv)
    for (int64_t i = 0; i < row.n; i++)
      if (!std::signbit(row.p[i])) add_row(row.p[i] * kept_scale, dy, width, dv + row.key[i] * width);
  if (dq) {
    std::fill_n(dq, width, 0.f);
    int64_t c = 0;
    for (; c + 4 * kLanes <= width; c += 4 * kLanes) gather_rows<4>(row, k + c, width, dq + c);
    for (; c < width; c += kLanes) gather_rows<1>(row, k + c, width, dq + c);
  }
  if (dk)
    for (int64_t i = 0; i < row.n; i++) add_row(row.ds[i], q, width, dk + row.key[i] * width);
}

}  // namespace er::ER_ISA
