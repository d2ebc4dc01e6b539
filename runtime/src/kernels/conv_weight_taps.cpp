// Weight gradient of a convolution with several taps, straight from the razor forms:
//
//   G[tap, c, :] = Σ over blocks of mean[block, c] · (Σ of dY over the rows that the tap reaches) + Σ over kept of
//   value · dY[row, :]
//
// Positions of X fall into classes (conv_weight_classes.h), whose positions meet dY through the same taps. For some
// blocks of X and a tile of output channels, the part of dY's map that any class meets is copied with zeros around it;
// there tap (r, c) of a position lies a constant distance before its first tap. So one walk over a column's kept
// values, whose mask words are decoded once for all tiles, serves up to nine taps, while the sums of these taps stay in
// registers for all the blocks.
//
// G is accumulated in scratch that fits the L2 cache, and written once. Each element is summed by one thread in the
// order of the blocks, so the result does not depend on the number of threads.
#include <atomic>

#include "conv_weight.h"
#include "conv_weight_classes.h"

namespace er::ER_ISA {
namespace {

// Sums in registers. A tile of one vector has room in the L1 cache for the dY that many blocks meet, so 9 are better
// than more; NEON's short vectors want two.
#if defined(__aarch64__)
constexpr int kSums = 18;
#else
constexpr int kSums = 9;
#endif
constexpr int kMaxVectors = 6;                                       // of output channels in a tile
constexpr int64_t kGradientFloats = (kLargeCache ? 160 : 64) << 10;  // of G in scratch: a part of the L2 cache
constexpr int64_t kSlabFloats = 10 << 10;  // of dY: a little more than an L1 cache of 32 KiB, since not all is used
constexpr int64_t kColumns = 64;           // of X at once
constexpr int64_t kLongRun = 24;           // from so many neighbours on, three taps share sums of dY
constexpr int kMostClasses = 4;            // whose lists are made at once
constexpr int kAtOnce = 4;                 // bits of a word that are decoded without a branch
constexpr int64_t kList = kMostPositions + 32;  // with what a vector writes beyond

constexpr int most_vectors(int taps) { return std::min(kMaxVectors, kSums / taps); }

// Everything that follows from the shape alone.
struct Tiling {
  int64_t vectors;                      // of output channels in a tile
  int64_t tiles;                        // of G at once
  int64_t columns;                      // of X at once
  int64_t classes;                      // at once
  int walk_rows = 1, walk_columns = 1;  // taps, of the largest walks
  int64_t slab, g;                      // floats

  __attribute__((cold, noinline)) explicit Tiling(const ConvShape& s) {
    const int64_t taps = s.taps();
    int most = 1;
    const bool together = meet_alike(s.sh, s.dh) && meet_alike(s.sw, s.dw);
    classes = 0;
    each_class(s, [&](const Class& c) {
      classes = std::min<int64_t>(together ? kMostClasses : 1, classes + 1);
      c.each_walk([&](int64_t, int64_t, int rows, int columns) {
        most = std::max(most, rows * columns);
        walk_rows = std::max(walk_rows, rows), walk_columns = std::max(walk_columns, columns);
      });
    });
    const bool wide = s.iw >= kWideMap;
    const int64_t lines = std::min(kBlockRows, 62 / s.iw + 2);  // that a block touches
    const int64_t across = (wide ? kBlockRows : s.iw) + walk_columns - 1;
    const int64_t down = wide ? lines * walk_rows : lines + walk_rows - 1;
    const int64_t all = (s.oc / s.group + kLanes - 1) / kLanes,
                  parts = (all + most_vectors(most) - 1) / most_vectors(most);
    vectors = (all + parts - 1) / parts;
    const int64_t floats = vectors * kLanes, group = taps * floats * kGroupColumns;  // of G of a column group
    columns = std::clamp(kGradientFloats / group * kGroupColumns, kGroupColumns, kColumns);
    tiles = std::clamp<int64_t>(kGradientFloats / (taps * columns * floats), 1, parts);
    slab = std::max(kSlabFloats, across * down * floats);  // one block always fits
    g = tiles * taps * columns * floats;
  }
  int64_t width() const { return vectors * kLanes; }
  int64_t value_floats() const { return classes * columns * kList; }
  int64_t place_floats() const { return (value_floats() / 2 + 15) / 16 * 16; }
  int64_t position_floats() const {
    return (classes * static_cast<int64_t>(sizeof(Positions)) + static_cast<int64_t>(sizeof(Map)) + 63) / 64 * 16;
  }
  // Of one thread's scratch, a multiple of a cache line.
  int64_t floats() const {
    return (slab + g + value_floats() + place_floats() + position_floats() + kGroupValues +
            kMostBlocks * kSums * kLanes + 15) /
           16 * 16;
  }
};

// For each row of a block: the class (kMostClasses: none) and slab row of the position; and the rows of class 0.
struct Places {
  uint8_t of_class[kBlockRows];
  uint16_t slab[kBlockRows];
  uint64_t rows;
};

// What one thread works in.
struct Workspace {
  float* slab;
  float* g;         // [tiles][columns][taps][vectors · kLanes]
  float* totals;    // [blocks][taps of a walk][vectors · kLanes]
  float* group;     // [kGroupValues]
  float* value;     // [classes][columns][kList]: kept values …
  uint16_t* place;  // … and the slab rows of their first taps, block after block
  Map* map;
  Positions* at;                           // [classes]
  int32_t count[kMostClasses * kColumns];  // of a class's and column's list

  Workspace(const Tiling& t, float* base) {
    slab = base, base += t.slab;
    g = base, base += t.g;
    totals = base, base += kMostBlocks * kSums * kLanes;
    group = base, base += kGroupValues;
    value = base, base += t.value_floats();
    place = reinterpret_cast<uint16_t*>(base), base += t.place_floats();
    map = reinterpret_cast<Map*>(base);
    at = reinterpret_cast<Positions*>(map + 1);
  }
};

// One walk's taps, row r and column c of them: `tap` + r · tap_row + c · tap_column floats from the beginning of a
// column of G.
struct Walk {
  int64_t tap, tap_row, tap_column;
  bool begin;  // G, rather than add to it
};

// Copies the part of dY that walks meet whose first tap lies `up` lines and `left` columns before the classes' first
// one, output channels [k, k + channels) as kVectors vectors. Fetches what is copied next, `ahead` floats further on.
template <int kVectors>
__attribute__((noinline)) void copy_map(const ConvShape& s, const float* dy, int64_t k, int64_t channels, int64_t ahead,
                                        const Map& map, int64_t up, int64_t left, float* slab) {
  constexpr int64_t kWidth = kVectors * kLanes;
  for (int p = 0; p < map.n_pieces; p++) {
    const Map::Piece& piece = map.pieces[p];
    const int64_t x = piece.x - (map.columns - 1) - left;
    const int64_t before = std::clamp<int64_t>(-x, 0, map.pitch), inside = std::clamp(s.ow - x, before, map.pitch);
    float* to = slab + piece.slab * kWidth;
    for (int64_t line = 0; line < piece.lines + map.rows - 1; line++, to += map.pitch * kWidth) {
      const int64_t y = piece.y - (map.rows - 1) + line - up;
      if (y < 0 || y >= s.oh) {
        std::fill_n(to, map.pitch * kWidth, 0.f);
        continue;
      }
      std::fill_n(to, before * kWidth, 0.f);
      const float* from = dy + ((piece.sample * s.oh + y) * s.ow + x + before) * s.oc + k;
      for (int64_t i = before; i < inside; i++, from += s.oc) {
        float* out = to + i * kWidth;
        for (int v = 0; v < kVectors; v++) __builtin_prefetch(from + ahead + v * kLanes, 0, 2);
        if (channels >= kWidth)
          for (int v = 0; v < kVectors; v++) store(out + v * kLanes, load(from + v * kLanes));
        else  // the last tile may have fewer vectors
          for (int64_t v = 0; v < kVectors; v++)
            store(out + v * kLanes, load_upto(from + v * kLanes, std::max<int64_t>(0, channels - v * kLanes)));
      }
      std::fill_n(to + inside * kWidth, (map.pitch - inside) * kWidth, 0.f);
    }
  }
}

// The walk over columns [0, n), whose lists begin at `value`, `place` and `count`. mean[b] is the first column's mean
// in block b; null for the plain form.
// Hot: a function that always calls a cold one, as Tiling's constructor is, is taken for cold with all that it calls.
template <int kRows, int kColumns, int kVectors>
__attribute__((hot)) void walk_columns(const Positions& at, const Map& map, const Walk& walk, int64_t n,
                                       const float* value, const uint16_t* place, const int32_t* count,
                                       const float* mean, const float* slab, float* totals, float* g,
                                       int64_t g_column) {
#define ER_EACH_TAP                                                                                                  \
  _Pragma("GCC unroll 8") for (int r = 0; r < kRows; r++) _Pragma("GCC unroll 8") for (int c = 0; c < kColumns; c++) \
      _Pragma("GCC unroll 8") for (int v = 0; v < kVectors; v++)
  constexpr int64_t kWidth = kVectors * kLanes;
  const int64_t line = map.pitch * kWidth;
  VecF sum[kRows][kColumns][kVectors];
  auto in_totals = [&](int64_t b, int r, int c, int v) __attribute__((always_inline)) {
    return totals + (((b * kRows + r) * kColumns + c) * kVectors + v) * kLanes;
  };
  if (mean)
    for (int b = 0; b < at.n_blocks; b++) {
      ER_EACH_TAP sum[r][c][v] = VecF{};
      for (int q = b ? at.end[b - 1] : 0; q < at.end[b]; q++) {
        const float* d = slab + at.place(map, q) * kWidth;
        const int64_t n = at.runs[q].count;
        if (kRows == 3 && n >= kLongRun) {
          // What all taps of a line reach is added up once.
          constexpr int kEnds = kColumns - 1;
#pragma GCC unroll 8
          for (int r = 0; r < kRows; r++, d -= line)
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; v++) {
              const float* cell = d + v * kLanes;
              VecF inside{};
              for (int64_t i = 0; i < n - kEnds; i++) inside += load(cell + i * kWidth);
#pragma GCC unroll 8
              for (int c = 0; c < kColumns; c++) {
                VecF all = inside;
                for (int i = 0; i < kEnds; i++) all += load(cell + (i < c ? i - c : n - 1 - i) * kWidth);
                sum[r][c][v] += all;
              }
            }
          continue;
        }
        for (int64_t i = 0; i < n; i++, d += kWidth)
          ER_EACH_TAP sum[r][c][v] += load(d - r * line - c * kWidth + v * kLanes);
      }
      ER_EACH_TAP store(in_totals(b, r, c, v), sum[r][c][v]);
    }
  g += walk.tap;
  for (int64_t column = 0; column < n; column++, g += g_column, value += kList, place += kList) {
    if (walk.begin)
      ER_EACH_TAP sum[r][c][v] = VecF{};
    else
      ER_EACH_TAP sum[r][c][v] = load(g + r * walk.tap_row + c * walk.tap_column + v * kLanes);
    if (mean)
      for (int b = 0; b < at.n_blocks; b++) {
        const VecF m = broadcast(mean[column * kMostBlocks + b]);
        ER_EACH_TAP sum[r][c][v] += m * load(in_totals(b, r, c, v));
      }
    for (int32_t i = 0; i < count[column]; i++) {
      const VecF x = broadcast(value[i]);
      const float* d = slab + place[i] * kWidth;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++, d -= line) {
        asm("" : "+r"(d));  // one pointer and constant offsets, instead of one register for each tap
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; c++)
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; v++) sum[r][c][v] += x * load(d - c * kWidth + v * kLanes);
      }
    }
    ER_EACH_TAP store(g + r * walk.tap_row + c * walk.tap_column + v * kLanes, sum[r][c][v]);
  }
#undef ER_EACH_TAP
}

// Adds up G of columns [c0, c1) (counted over all groups) and output channels [k0, k1).
class Accumulator {
 public:
  Accumulator(const WeightGradient& call, const Tiling& tiling, const KeptReader& x, Workspace* work, int64_t c0,
              int64_t c1, int64_t k0, int64_t k1)
      : t_(tiling), s_(call.shape), dy_(call.dy), x_(x), work_(*work), c0_(c0), c1_(c1), k0_(k0), k1_(k1) {}

  // False if X's mask words point outside its values.
  bool run() {
    bool valid = true;
    int n = 0;
    each_class(s_, [&](const Class& c) {
      work_.at[n++].c = c;
      if (n == t_.classes) valid = valid && add_classes(n), n = 0;
    });
    return valid && (!n || add_classes(n));
  }

 private:
  // All blocks of X for the first n_classes of work_.at, in chunks that fit the slab and the lists.
  __attribute__((noinline)) bool add_classes(int n_classes) {
    const int64_t blocks = s_.n * x_.at.blocks, most = s_.sh * s_.sw == 1 ? kDenseBlocks : kMostBlocks;
    std::fill_n(begun_, n_classes, false);
    work_.map->rows = t_.walk_rows, work_.map->columns = t_.walk_columns;
    for (int64_t first = 0, n = most; first < blocks; first += n) {
      n = std::min({blocks - first, most, n + 1});  // as many as before fit, as a rule
      while (!fits(first, n, n_classes) && n > 1) n--;
      if (!add_chunk(first, n, n_classes)) return false;
    }
    std::fill_n(work_.count, kMostClasses * kColumns, 0);
    bool unknown[kMostClasses];  // to any block
    for (int i = 0; i < n_classes; i++) unknown[i] = !begun_[i];
    walk_classes(n_classes, unknown, nullptr);
    return true;
  }

  // Finds the positions of a chunk of blocks; whether the slab holds what they meet, and the lists all that is kept.
  bool fits(int64_t first, int64_t n, int n_classes) {
    Map& map = *work_.map;
    map.clear();
    for (int i = 0; i < n_classes; i++) work_.at[i].clear();
    bool fits = true;
    for (int64_t b = first; b < first + n && fits; b++) {
      const int64_t block = b % x_.at.blocks;
      add_block(s_, n_classes, static_cast<int32_t>(b / x_.at.blocks), x_.at.row_begin(block),
                x_.at.row_begin(block + 1), work_.at, &map);
      for (int i = 0; i < n_classes; i++) fits = fits && work_.at[i].n_positions <= kMostPositions;
    }
    map.lay_out(s_.iw >= kWideMap);
    return fits && map.slab * t_.width() <= t_.slab;
  }

  bool add_chunk(int64_t first, int64_t n, int n_classes) {
    std::fill_n(work_.count, kMostClasses * kColumns, 0);
    float mean[kColumns * kMostBlocks];
    for (int64_t b = 0; b < n; b++) {
      const int64_t sample = (first + b) / x_.at.blocks, block = (first + b) % x_.at.blocks;
      Places places;
      find_places(static_cast<int>(b), n_classes, &places);
      if (!decode_block(sample, block, n_classes, places)) return false;
      if (x_.at.form == kCentered)
        for (int64_t c = c0_; c < c1_; c++) mean[(c - c0_) * kMostBlocks + b] = from_bf16(x_.mean(sample, block)[c]);
    }
    bool walked[kMostClasses];
    for (int i = 0; i < n_classes; i++) walked[i] = work_.at[i].n_runs;
    walk_classes(n_classes, walked, x_.at.form == kCentered ? mean : nullptr);
    return true;
  }

  // Walks the classes of which walked[i] is true, one tile of output channels after the other.
  void walk_classes(int n_classes, const bool* walked, const float* mean) {
    const int64_t width = t_.width();
    float* g = work_.g;
    for (int64_t k = k0_; k < k1_; k += width, g += (c1_ - c0_) * s_.taps() * width) {
      const int64_t ahead = k + width < k1_ ? width : work_.map->n_positions / (s_.sh * s_.sw) * s_.oc - (k - k0_);
      int64_t up = -1, left = -1;  // of what the slab holds
      for (int i = 0; i < n_classes; i++) {
        if (!walked[i]) continue;
        const Class& c = work_.at[i].c;
        c.each_walk([&](int64_t y, int64_t x, int rows, int columns) {
          if (up != y * c.y.distance || left != x * c.x.distance) {
            up = y * c.y.distance, left = x * c.x.distance;
            copy(k, ahead, up, left);
          }
          const int64_t tap = (c.y.first + y * c.y.step) * s_.kw + c.x.first + x * c.x.step;
          const Walk walk{tap * width, c.y.step * s_.kw * width, c.x.step * width, !begun_[i]};
          dispatch(rows, columns, i, walk, mean, g);
        });
      }
    }
    for (int i = 0; i < n_classes; i++) begun_[i] |= walked[i];
  }

  void find_places(int block, int n_classes, Places* places) const {
    std::fill_n(places->of_class, kBlockRows, static_cast<uint8_t>(kMostClasses));
    std::fill_n(places->slab, kBlockRows, uint16_t{0});
    places->rows = 0;
    for (int i = 0; i < n_classes; i++)
      for (int q = block ? work_.at[i].end[block - 1] : 0; q < work_.at[i].end[block]; q++) {
        const int64_t place = work_.at[i].place(*work_.map, q);
        for (int64_t p = 0; p < work_.at[i].runs[q].count; p++) {
          const int64_t row = work_.at[i].runs[q].row + p * s_.sw;
          places->of_class[row] = static_cast<uint8_t>(i), places->slab[row] = static_cast<uint16_t>(place + p);
          if (i == 0) places->rows |= uint64_t{1} << row;
        }
      }
  }

  bool decode_block(int64_t sample, int64_t block, [[maybe_unused]] int n_classes, const Places& places) {
#ifdef ER_BYTE_MASKS
    if (n_classes == 1 && byte_masks) return decode_class(sample, block, places);
#endif
    const bool all = s_.sh == 1 && s_.sw == 1;
    return all ? decode<true>(sample, block, places) : decode<false>(sample, block, places);
  }

#ifdef ER_BYTE_MASKS
  // decode() of a single class without a branch on any value: places, and values, that belong to it are moved together
  // by the vector. (With more classes the lists that are touched for nothing cost more than the branches.)
  ER_BYTE_MASKS bool decode_class(int64_t sample, int64_t block, const Places& places) {
    const uint64_t* words = x_.mask(sample, block);
    const __m512i low = _mm512_loadu_si512(places.slab), high = _mm512_loadu_si512(places.slab + 32);
    for (int64_t begin = c0_ / kGroupColumns * kGroupColumns; begin < c1_; begin += kGroupColumns) {
      if (!x_.values(sample, block, begin / kGroupColumns, work_.group)) return false;
      const float* group = work_.group;
      for (int64_t c = begin; c < std::min(c1_, begin + kGroupColumns); group += __builtin_popcountll(words[c++])) {
        if (c < c0_) continue;
        const uint64_t word = words[c] & places.rows;
        int32_t& count = work_.count[c - c0_];
        uint16_t* place = work_.place + (c - c0_) * kList + count;
        float* value = work_.value + (c - c0_) * kList + count;
        count += __builtin_popcountll(word);
        _mm512_storeu_si512(place, _mm512_maskz_compress_epi16(static_cast<uint32_t>(word), low));
        place += __builtin_popcount(static_cast<uint32_t>(word));
        _mm512_storeu_si512(place, _mm512_maskz_compress_epi16(word >> 32, high));
        const float* from = group;
        for (uint64_t keep = _pext_u64(word, words[c]); keep; keep >>= kLanes, from += kLanes) {
          const auto lanes = static_cast<__mmask16>(keep);
          _mm512_storeu_ps(value, _mm512_maskz_compress_ps(lanes, (__m512)load(from)));
          value += __builtin_popcount(lanes);
        }
      }
    }
    return true;
  }
#endif

  // Appends the values of a block to the lists. kAll: the stride is 1, so that there is one class, with every row.
  template <bool kAll>
  bool decode(int64_t sample, int64_t block, const Places& places) {
    const uint64_t* words = x_.mask(sample, block);
    const int64_t rows = x_.at.row_begin(block + 1) - x_.at.row_begin(block);
    const uint64_t last = uint64_t{1} << (rows - 1),
                   inside = last | (last - 1);  // keeps an empty word inside the block
    for (int64_t begin = c0_ / kGroupColumns * kGroupColumns; begin < c1_; begin += kGroupColumns) {
      if (!x_.values(sample, block, begin / kGroupColumns, work_.group)) return false;
      const float* group = work_.group;
      for (int64_t c = begin; c < std::min(c1_, begin + kGroupColumns); c++) {
        const int many = __builtin_popcountll(words[c]);
        if (c >= c0_) {
          uint64_t w = words[c] & inside;  // bits outside come last: no value inside is behind them
          const int64_t n = __builtin_popcountll(w), column = c - c0_;
          if (kAll) {
            float* value = work_.value + column * kList + work_.count[column];
            uint16_t* place = work_.place + column * kList + work_.count[column];
            work_.count[column] += static_cast<int32_t>(n);
            // Always kAtOnce at a time: most words have fewer bits, and a branch on their number is guessed wrong too
            // often. What is written beyond them is overwritten.
            for (int64_t i = 0; i < n; i += kAtOnce)
              for (int o = 0; o < kAtOnce; o++, w &= w - 1) {
                value[i + o] = group[i + o];
                place[i + o] = places.slab[__builtin_ctzll(w | last)];
              }
          } else {
            for (int64_t i = 0; i < n; i++, w &= w - 1) {
              const int row = __builtin_ctzll(w);
              if (places.of_class[row] == kMostClasses) continue;
              const int64_t list = places.of_class[row] * t_.columns + column;
              const int64_t at = list * kList + work_.count[list]++;
              work_.value[at] = group[i];
              work_.place[at] = places.slab[row];
            }
          }
        }
        group += many;
      }
    }
    return true;
  }

  template <int kVectors = kMaxVectors>
  void copy(int64_t k, int64_t ahead, int64_t up, int64_t left) {
    if constexpr (kVectors > 1)
      if (t_.vectors < kVectors) return copy<kVectors - 1>(k, ahead, up, left);
    copy_map<kVectors>(s_, dy_, k, k1_ - k, ahead, *work_.map, up, left, work_.slab);
  }

  __attribute__((noinline)) void dispatch(int rows, int columns, int i, const Walk& walk, const float* mean, float* g) {
    if (rows == 3) return vectors<3, 3>(i, walk, mean, g);
    if (rows == 2 && columns == 2) return vectors<2, 2>(i, walk, mean, g);
    if (rows == 2) return vectors<2, 1>(i, walk, mean, g);
    if (columns == 3) return vectors<1, 3>(i, walk, mean, g);
    if (columns == 2) return vectors<1, 2>(i, walk, mean, g);
    vectors<1, 1>(i, walk, mean, g);
  }
  template <int kRows, int kCols, int kVectors = most_vectors(kRows * kCols)>
  void vectors(int i, const Walk& walk, const float* mean, float* g) {
    if constexpr (kVectors > 1)
      if (t_.vectors < kVectors) return vectors<kRows, kCols, kVectors - 1>(i, walk, mean, g);
    const int64_t list = i * t_.columns;
    walk_columns<kRows, kCols, kVectors>(work_.at[i], *work_.map, walk, c1_ - c0_, work_.value + list * kList,
                                         work_.place + list * kList, work_.count + list, mean, work_.slab, work_.totals,
                                         g, s_.taps() * kVectors * kLanes);
  }

  const Tiling& t_;
  const ConvShape& s_;
  const float* dy_;
  const KeptReader& x_;
  Workspace& work_;
  const int64_t c0_, c1_, k0_, k1_;
  bool begun_[kMostClasses];  // whether G holds sums of a class
};

}  // namespace

uint64_t razor_taps_scratch(const ConvShape& shape, int threads) {
  return static_cast<uint64_t>(threads) * Tiling(shape).floats() * sizeof(float);
}

bool razor_taps_range(const WeightGradient& call, const KeptReader& x, const WeightRange& range, int thread) {
  const ConvShape& s = call.shape;
  const Tiling t(s);
  Workspace work(t, static_cast<float*>(call.scratch) + thread * t.floats());
  const int64_t ic_group = s.ic / s.group, oc_group = s.oc / s.group, width = t.width(), taps = s.taps();
  for (int64_t k0 = range.k0; k0 < range.k1; k0 += t.tiles * width)
    for (int64_t c0 = range.c0; c0 < range.c1; c0 += t.columns) {
      const int64_t k1 = std::min(range.k1, k0 + t.tiles * width), n = std::min(t.columns, range.c1 - c0);
      const int64_t column = range.group * ic_group + c0, k = range.group * oc_group + k0;
      const int64_t tiles = (k1 - k0 + width - 1) / width;
      Accumulator accumulator(call, t, x, &work, column, column + n, k, k + k1 - k0);
      if (!accumulator.run()) return false;
      for (int64_t tap = 0; tap < taps; tap++)
        for (int64_t c = 0; c < n; c++) {
          float* out = call.g + (tap * ic_group + c0 + c) * s.oc + k;
          // A store waits for its line: those of a few columns further on are fetched.
          for (int64_t at = 0; at < k1 - k0; at += 16) __builtin_prefetch(out + 4 * s.oc + at, 1);
          for (int64_t i = 0; i < tiles; i++) {
            const float* tile = work.g + ((i * n + c) * taps + tap) * width;
            for (int64_t at = i * width, v = 0; v < width && at < k1 - k0; v += kLanes, at += kLanes)
              store_upto(out + at, load(tile + v), k1 - k0 - at);
          }
        }
    }
  return true;
}

}  // namespace er::ER_ISA
