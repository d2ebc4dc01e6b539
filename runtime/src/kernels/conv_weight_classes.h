// The positions of X, for the weight gradient of a convolution with several taps (conv_weight_taps.cpp): they fall into
// classes by their remainders modulo the strides. Those of one class meet dY through the same taps, and neighbours in X
// meet neighbours in dY, so that the part of dY's map that some blocks meet can be laid out in a slab, in which all
// taps of a position lie at constant distances.
#pragma once
#include <numeric>

#include "conv_weight.h"

namespace er::ER_ISA {

constexpr int64_t kMostBlocks = 16;                            // that are walked at once
constexpr int64_t kDenseBlocks = 8;                            // … where all positions are of one class
constexpr int64_t kMostPositions = kDenseBlocks * kBlockRows;  // of a class in these blocks
constexpr int64_t kWideMap = 2 * kBlockRows;  // from this width on, each line's part is copied for itself

// Kernel rows first, first + step, … (n of them; kernel columns alike) that positions of one remainder meet, the second
// one `distance` output lines before the first, and so on.
struct TapSet {
  int64_t first, step, n, distance;
  // How many of the set's rows, from row i on, one walk takes beside `columns` columns.
  int rows_at_once(int64_t i, int columns) const {
    if (distance != 1) return 1;
    if (columns == 3) return n - i >= 3 ? 3 : 1;
    return n - i >= 2 ? 2 : 1;
  }
  int columns_at_once(int64_t i) const { return distance == 1 ? static_cast<int>(std::min<int64_t>(n - i, 3)) : 1; }
};

// The taps t with t·dilation ≡ first·dilation (mod stride); n = 0 if `first` is not the first of them.
inline TapSet tap_set(int64_t first, int64_t taps, int64_t stride, int64_t dilation) {
  const int64_t common = std::gcd(stride, dilation), step = stride / common;
  return {first, step, first < step ? (taps - first + step - 1) / step : 0, dilation / common};
}

// Whether the first taps of classes meet nearly the same: position i's is i / stride for every one of them, or there is
// only one. (Otherwise they may lie far apart.)
inline bool meet_alike(int64_t stride, int64_t dilation) { return stride % dilation == 0 || dilation % stride == 0; }

struct Class {
  TapSet y, x;
  // each(i, j, rows, columns): walks that serve all taps, the first of each being the class's i-th, j-th.
  template <class Each>
  void each_walk(Each&& each) const {
    for (int64_t j = 0, columns; j < x.n; j += columns) {
      columns = x.columns_at_once(j);
      for (int64_t i = 0, rows; i < y.n; i += rows) {
        rows = y.rows_at_once(i, static_cast<int>(columns));
        each(i, j, static_cast<int>(rows), static_cast<int>(columns));
      }
    }
  }
};

// each(class) for every class of positions that meets dY.
template <class Each>
void each_class(const ConvShape& s, Each&& each) {
  for (int64_t ky = 0; ky < s.kh; ky++)
    for (int64_t kx = 0; kx < s.kw; kx++) {
      const Class c{tap_set(ky, s.kh, s.sh, s.dh), tap_set(kx, s.kw, s.sw, s.dw)};
      if (c.y.n && c.x.n) each(c);
    }
}

// Neighbouring positions of a class on one line of a block: row, row + stride, … of the block. The first meets line y
// and column x of dY through the class's first tap.
struct Run {
  int32_t row, count, y, x;
};

// The part of dY's map that the positions of some blocks meet, those of all classes that are walked together, and where
// the slab holds it.
struct Map {
  struct Piece {  // lines from y on, columns [x, end)
    int32_t sample, y, x, end, lines;
    int32_t slab;  // its first row there
  };
  static constexpr int64_t kMostPieces = kMostBlocks * kBlockRows;
  int rows, columns;  // of taps, of the largest walks
  int n_pieces;
  int64_t n_positions;  // of all classes
  int64_t pitch;        // slab rows of a line
  int64_t slab;         // … in all
  Piece pieces[kMostPieces];

  void clear() { n_pieces = 0, n_positions = 0; }
  // The piece that holds columns [x, x_end) of line y. A line that follows another, or goes on where a block ended,
  // shares its piece; on a wide map only what classes meet through the same line of X, whose piece is `mine`, does.
  int add(bool wide, int mine, int32_t sample, int32_t y, int32_t x, int32_t x_end) {
    const int at = wide ? mine : n_pieces - 1;
    if (at >= 0 && pieces[at].sample == sample && y - (pieces[at].y + pieces[at].lines - 1) <= !wide) {
      Piece& p = pieces[at];
      p.lines = y - p.y + 1, p.x = std::min(p.x, x), p.end = std::max(p.end, x_end);
      return at;
    }
    pieces[n_pieces] = {sample, y, x, x_end, 1, 0};
    return n_pieces++;
  }
  void lay_out(bool wide) {
    int32_t left = INT32_MAX, right = INT32_MIN, longest = 0;
    for (int p = 0; p < n_pieces; p++) {
      left = std::min(left, pieces[p].x), right = std::max(right, pieces[p].end);
      longest = std::max(longest, pieces[p].end - pieces[p].x);
    }
    pitch = n_pieces ? (wide ? longest : right - left) + columns - 1 : 0;
    slab = 0;
    for (int p = 0; p < n_pieces; p++) {
      if (!wide) pieces[p].x = left;
      pieces[p].slab = static_cast<int32_t>(slab);
      slab += (pieces[p].lines + rows - 1) * pitch;
    }
  }
};

// The positions of one class in some blocks.
struct Positions {
  Class c;
  int n_blocks, n_runs, n_positions;
  int end[kMostBlocks];                                              // of a block's runs
  static constexpr int64_t kMostRuns = kMostPositions + kBlockRows;  // with a block that turns out to be too many
  Run runs[kMostRuns];
  uint16_t piece_of[kMostRuns];  // of a run

  void clear() { n_blocks = n_runs = n_positions = 0; }
  // Slab row of a run's first position and first tap.
  int64_t place(const Map& map, int run) const {
    const Map::Piece& piece = map.pieces[piece_of[run]];
    return piece.slab + (runs[run].y - piece.y + map.rows - 1) * map.pitch + runs[run].x - piece.x + map.columns - 1;
  }
};

// Appends the positions of n_classes classes in rows [begin, row_end) of a sample.
inline void add_block(const ConvShape& s, int n_classes, int32_t sample, int64_t begin, int64_t row_end,
                      Positions* classes, Map* map) {
  const bool wide = s.iw >= kWideMap;
  for (int64_t row = begin, next; row < row_end; row = next) {
    const int64_t iy = row / s.iw, ix = row - iy * s.iw;
    next = std::min(row_end, (iy + 1) * s.iw);
    int piece = -1;
    for (int i = 0; i < n_classes; i++) {
      Positions& at = classes[i];
      const int64_t y = iy + s.pt - at.c.y.first * s.dh, x0 = ix + s.pl - at.c.x.first * s.dw;
      const int64_t skip = ((-x0) % s.sw + s.sw) % s.sw;
      if (y % s.sh || row + skip >= next) continue;
      const auto count = static_cast<int32_t>((next - row - skip + s.sw - 1) / s.sw);
      const auto line = static_cast<int32_t>(y / s.sh), x = static_cast<int32_t>((x0 + skip) / s.sw);
      piece = map->add(wide, piece, sample, line, x, x + count);
      at.runs[at.n_runs] = {static_cast<int32_t>(row + skip - begin), count, line, x};
      at.piece_of[at.n_runs++] = static_cast<uint16_t>(piece);
      at.n_positions += count, map->n_positions += count;
    }
  }
  for (int i = 0; i < n_classes; i++) classes[i].end[classes[i].n_blocks++] = classes[i].n_runs;
}

}  // namespace er::ER_ISA
