// Sums of many float32 terms that stay within a few roundings of the exact sum, whatever the number of rows: eight rows
// are added pairwise, eight such groups make a block, 64 blocks a stretch, stretches are added up.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../simd.h"
#include "call_check.h"

namespace er::ER_ISA {

constexpr int64_t kSumBlock = 64, kSumStretch = 64 * kSumBlock;  // rows
constexpr int kSumTile = 32;  // vectors of a column tile: a row's part is read in one run, the accumulators stay in L1

// The terms of a matrix x[rows][cols], its rows `pitch` floats apart.
struct MatrixTerms {
  const float* x;
  int64_t pitch;
  VecF operator()(int64_t r, int64_t c, int64_t left) const { return load_upto(x + r * pitch + c, left); }
};

// out[c] (=, or += if accumulate) Σ over rows r of term(r, c, left), for c in [begin, end); term gives the kLanes terms
// from column c on, of which `left` (at least 1) exist.
template <class Term>
void sum_columns(int64_t first_row, int64_t end_row, int64_t begin, int64_t end, bool accumulate, float* out,
                 const Term& term) {
  VecF total[kSumTile], stretch[kSumTile], block[kSumTile];
  for (int64_t tile = begin; tile < end; tile += kSumTile * kLanes) {
    const int64_t stop = std::min(end, tile + kSumTile * kLanes);
    const int vectors = static_cast<int>((stop - tile + kLanes - 1) / kLanes);
    for (int v = 0; v < vectors; v++) total[v] = stretch[v] = VecF{};
    for (int64_t first = first_row; first < end_row; first += kSumBlock) {
      const int64_t last = std::min(end_row, first + kSumBlock);
      for (int v = 0; v < vectors; v++) block[v] = VecF{};
      int64_t r = first;
      for (; r + 8 <= last; r += 8)
        for (int v = 0; v < vectors; v++) {
          const int64_t c = tile + int64_t{v} * kLanes, left = stop - c;
          auto two = [&](int64_t i) { return term(r + i, c, left) + term(r + i + 1, c, left); };
          if constexpr (std::is_same_v<Term, MatrixTerms>) {  // no more than a load: copies cost nothing
            block[v] += (two(0) + two(2)) + (two(4) + two(6));
          } else {
            VecF pair[4];
#pragma GCC unroll 1  // two copies of `term` instead of eight
            for (int64_t i = 0; i < 4; i++) pair[i] = two(2 * i);
            block[v] += (pair[0] + pair[1]) + (pair[2] + pair[3]);
          }
        }
      for (; r < last; r++)
        for (int v = 0; v < vectors; v++) {
          const int64_t c = tile + int64_t{v} * kLanes;
          block[v] += term(r, c, stop - c);
        }
      for (int v = 0; v < vectors; v++) stretch[v] += block[v];
      if (last == end_row || (last - first_row) % kSumStretch == 0)
        for (int v = 0; v < vectors; v++) {
          total[v] += stretch[v];
          stretch[v] = VecF{};
        }
    }
    for (int v = 0; v < vectors; v++) {
      const int64_t c = tile + int64_t{v} * kLanes, left = stop - c;
      store_upto(out + c, accumulate ? load_upto(out + c, left) + total[v] : total[v], left);
    }
  }
}

// Σ x[0 … n).
inline double sum_contiguous(const float* x, int64_t n) {
  double total = 0;
  constexpr int64_t kBlock = 64 * kLanes;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t last = std::min(n, first + kBlock);
    VecF acc[4] = {};
    int64_t i = first;
    for (; i + 4 * kLanes <= last; i += 4 * kLanes)
      for (int v = 0; v < 4; v++) acc[v] += load(x + i + v * kLanes);
    for (; i < last; i += kLanes) acc[0] += load_upto(x + i, last - i);
    total += sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
  }
  return total;
}

// Rows are cut into a fixed number of chunks, so that a sum over rows can use every thread and yet does not depend on
// their number.
inline int64_t sum_chunks(int64_t rows) { return std::clamp<int64_t>(rows / 512, 1, 32); }

// out[c] (=, or += if `add`) factor · Σ over rows r of term(r, c, left), which is asked once for each and may do more
// than tell. partial: float [sum_chunks(rows)][cols], unused if that is one chunk and not added.
template <class Term>
void sum_rows(const Call& call, int64_t rows, int64_t cols, float factor, bool add, float* out, float* partial,
              const Term& term) {
  const int64_t chunks = sum_chunks(rows), width = kSumTile * kLanes, tiles = (cols + width - 1) / width;
  float* sums = chunks == 1 && !add ? out : partial;
  parallel(call, chunks * tiles, rows * cols / (chunks * tiles), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t chunk = unit / tiles, column = unit % tiles * width;
      const int64_t first = rows * chunk / chunks, last = rows * (chunk + 1) / chunks;
      sum_columns(first, last, column, std::min(cols, column + width), false, sums + chunk * cols, term);
    }
  });
  for (int64_t c = 0; c < cols; c += kLanes) {
    const int64_t left = cols - c;
    VecF total{};
    for (int64_t chunk = 0; chunk < chunks; chunk++) total += load_upto(sums + chunk * cols + c, left);
    store_upto(out + c, add ? load_upto(out + c, left) + total * factor : total * factor, left);
  }
}

// The same of a matrix x[rows][cols].
inline void sum_rows(const Call& call, const float* x, int64_t rows, int64_t cols, float factor, bool add, float* out,
                     float* partial) {
  sum_rows(call, rows, cols, factor, add, out, partial, MatrixTerms{x, cols});
}

}  // namespace er::ER_ISA
