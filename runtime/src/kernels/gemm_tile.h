// The innermost loop of all matrix products: a few rows by a few vectors of accumulators in registers. It takes its
// rows from anywhere (one pointer a row and tap), so that convolutions need no column buffer, and finishes the sums
// before they are stored.
#pragma once
#include <cmath>

#include "slope.h"

namespace er::ER_ISA {

// Registers: 32 with AVX-512 and NEON, else 16. kTileVectors × kTileRows accumulators leave room for B's vectors and
// one broadcast.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileVectors = 4, kTileRowsWide = 6, kTileRowsNarrow = 8;
#else
constexpr int kTileVectors = 2, kTileRowsWide = 6, kTileRowsNarrow = 8;
#endif

// A masked load or store takes no branch. It does take a slot of the ports that multiply, so B's whole vectors are read
// without (whole steps of ViT-Tiny, ResNet-50 and MobileNetV2: 1 to 3 % faster).
#if defined(__AVX512F__)
constexpr bool kMaskedLoads = true;
#else
constexpr bool kMaskedLoads = false;
#endif

// From so many products a sum on, the lines of C (of the addend, if it lies elsewhere) are fetched while they are made.
constexpr int64_t kFetchDepth = 128;

struct GemmTile {
  const float* const* a;  // row r of tap t: a[t·a_stride + r] + a_offset, k values, a_step apart
  int64_t a_stride, a_offset, a_step = 1, taps, k;
  const float* b;  // [taps·k][vectors·kLanes], rows ldb apart
  int64_t ldb;
  float* const* c;  // row r: c[r] + c_offset
  int64_t c_offset;
  int last;        // columns in the last vector, 1 … kLanes
  bool partial_b;  // no more than that of B's last vector may be read
  // C = min(high, max(low, scale·sum + shift + addend))
  const float *scale, *shift;  // at the first column; null: 1, 0
  bool adds;                   // what lies `addend` floats behind C: C itself, or a tensor of its shape
  int64_t addend = 0;
  float low = -INFINITY, high = INFINITY;
  // Of a gradient: bits of kept slopes (row r's: kept[r], the first column is `column` of the row) or null, and the
  // running sums of the columns, if any.
  const uint8_t* const* kept;
  int64_t column;
  RunningSums sums;
};

// The last step of a gradient: C = sum [+ addend] where the slope is 1, and the columns' running sums. Apart from
// gemm_tile, whose every size would hold a copy; `acc` is [rows][vectors].
__attribute__((noinline)) inline void finish_gradient_tile(const GemmTile& g, const VecF* acc, int rows, int vectors) {
  for (int v = 0; v < vectors; v++) {
    const int64_t left = v == vectors - 1 ? g.last : kLanes, column = g.column + v * kLanes;
    VecF total{};
    for (int r = 0; r < rows; r++) {
      float* c = g.c[r] + g.c_offset + v * kLanes;
      VecF z = acc[r * vectors + v];
      if (g.adds) z += load_upto(c + g.addend, left);
      if (g.kept) z = keep_lanes(kept_bits(g.kept[r], column, left), z);
      store_upto(c, z, left);
      total += z;
    }
    if (g.sums.sum) g.sums.add(column, total, left);
  }
}

// acc[r][v] += products of all taps. With kPartialB the last of B's vectors is read up to its last column.
template <bool kPartialB, int kRows, int kVectors>
inline __attribute__((always_inline)) void multiply(const GemmTile& g, VecF (&acc)[kRows][kVectors]) {
  const float* b = g.b;
  const int64_t ldb = g.ldb, step = g.a_step, end = g.k * step;
  for (int64_t t = 0; t < g.taps; t++) {
    const float* a[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) a[r] = g.a[t * g.a_stride + r] + g.a_offset;
    for (int64_t k = 0; k < end; k += step) {
      VecF bv[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++)
        bv[v] = kPartialB && v == kVectors - 1 ? load_partial(b + v * kLanes, g.last) : load(b + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) {
        VecF x = broadcast(a[r][k]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) acc[r][v] += x * bv[v];
      }
      b += ldb;
    }
  }
}

// kPartialB: B's last vector may be partial, which GemmTile::partial_b says.
template <int kRows, int kVectors, bool kPartialB>
void gemm_tile(const GemmTile& g) noexcept {
  VecF acc[kRows][kVectors];
  constexpr int kEnd = kVectors - 1;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) acc[r][v] = VecF{};
  if (g.taps * g.k >= kFetchDepth)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) __builtin_prefetch(g.c[r] + g.c_offset + g.addend + v * kLanes, 1, 3);
  if (kPartialB && g.partial_b)
    multiply<true>(g, acc);
  else
    multiply<false>(g, acc);
  const bool whole = !kMaskedLoads && g.last == kLanes;
  auto fetch = [&](const float* p, int v) {
    return v == kEnd && !whole ? load_partial(p + v * kLanes, g.last) : load(p + v * kLanes);
  };
  if (g.kept || g.sums.sum) {
    VecF copy[kRows * kVectors];  // the address of `acc` itself would keep it out of registers
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) copy[r * kVectors + v] = acc[r][v];
    return finish_gradient_tile(g, copy, kRows, kVectors);
  }
#define ER_EACH_ROW _Pragma("GCC unroll 8") for (int r = 0; r < kRows; r++)
#define ER_EACH_VECTOR _Pragma("GCC unroll 4") for (int v = 0; v < kVectors; v++)
  // Steps of their own, of which a product that needs none takes none: sums of few products end often.
  if (g.scale || g.shift) {
    ER_EACH_VECTOR {
      const VecF scale = g.scale ? fetch(g.scale, v) : broadcast(1.0f), shift = g.shift ? fetch(g.shift, v) : VecF{};
      ER_EACH_ROW acc[r][v] = acc[r][v] * scale + shift;
    }
  }
  if (g.adds) ER_EACH_ROW ER_EACH_VECTOR acc[r][v] += fetch(g.c[r] + g.c_offset + g.addend, v);
  if (g.low > -INFINITY || g.high < INFINITY) {
    const VecF low = broadcast(g.low), high = broadcast(g.high);
    ER_EACH_ROW ER_EACH_VECTOR acc[r][v] = min(high, max(low, acc[r][v]));
  }
  ER_EACH_ROW ER_EACH_VECTOR {
    float* c = g.c[r] + g.c_offset + v * kLanes;
    if (v == kEnd && !whole)
      store_partial(c, acc[r][v], g.last);
    else
      store(c, acc[r][v]);
  }
#undef ER_EACH_ROW
#undef ER_EACH_VECTOR
}

inline int gemm_tile_rows(int vectors) { return vectors == kTileVectors ? kTileRowsWide : kTileRowsNarrow; }

// rows: 1 … gemm_tile_rows(vectors). Where only part of B's last vector may be read, that is a tile of its own, unless
// the tile is narrow and has masked loads: the widest, which has most code, would have its loop twice.
inline void gemm_tile(const GemmTile& g, int rows, int vectors) {
  using Function = void (*)(const GemmTile&) noexcept;
  constexpr bool kMasked = kMaskedLoads;
#define ER_ROWS(v, p)                                                                                              \
  {                                                                                                                \
    gemm_tile<1, v, p>, gemm_tile<2, v, p>, gemm_tile<3, v, p>, gemm_tile<4, v, p>, gemm_tile<5, v, p>,            \
        gemm_tile<6, v, p>, gemm_tile<v == kTileVectors ? 6 : 7, v, p>, gemm_tile<v == kTileVectors ? 6 : 8, v, p> \
  }
#if defined(__AVX512F__) || defined(__aarch64__)
  static constexpr Function whole[kTileVectors][8] = {ER_ROWS(1, kMasked), ER_ROWS(2, kMasked), ER_ROWS(3, kMasked),
                                                      ER_ROWS(4, false)};
#else
  static constexpr Function whole[kTileVectors][8] = {ER_ROWS(1, kMasked), ER_ROWS(2, false)};
#endif
  static constexpr Function partial[8] = ER_ROWS(1, true);
#undef ER_ROWS
  if (g.partial_b && (!kMasked || vectors == kTileVectors)) {
    const int skip = vectors - 1;
    if (skip) {
      GemmTile most = g;
      most.last = kLanes, most.partial_b = false;
      whole[skip - 1][rows - 1](most);
    }
    GemmTile end = g;
    end.b += skip * kLanes, end.c_offset += skip * kLanes, end.column += skip * kLanes;
    if (end.scale) end.scale += skip * kLanes;
    if (end.shift) end.shift += skip * kLanes;
    return partial[rows - 1](end);
  }
  whole[vectors - 1][rows - 1](g);
}

}  // namespace er::ER_ISA
