// Weight gradient straight from the razor forms; here of a linear layer or a convolution with one tap,
//
//   G[c, :] = Σ over blocks of mean[block, c] · (Σ of the block's rows of dY) + Σ over kept of value · dY[row, :]
//
// (conv_weight_taps.cpp has the others). With a stride or padding, only some rows of a block meet dY. A block's kept
// values are decoded once for several tiles of up to kMaxVectors vectors of output channels. For each of these the sum
// of the block's dY rows is taken, which brings them to the first-level cache; where they would push each other out of
// it there, they are copied to a contiguous tile. Then, for each column of X, the tile of G stays in registers while
// the set bits of the column's mask word are walked. Columns with equally many set bits are taken one after the other:
// the end of a loop over a few bits would be guessed wrong nearly every time, and costs as much as the bits.
//
// G is accumulated in scratch, as many columns and tiles at a time as fit the L2 cache, and written once. Threads share
// columns and output channels; or, where all of G fits and blocks are many, the blocks: then none reads or copies what
// another does, and the sums of all are added up in the end.
#include <atomic>
#include <iterator>
#include <numeric>

#include "conv_weight.h"

namespace er::ER_ISA {
namespace {

constexpr int kMaxVectors = 6;  // as in the prototype: with the broadcast value they leave registers free on every ISA
// Of G in scratch: a part of the second-level cache, of which small cores have 256 KB.
constexpr int64_t kGradientBytes = (kLargeCache ? 640 : 256) << 10;
constexpr int64_t kSharedBytes = 256 << 10;  // of G that every thread sums up
constexpr int64_t kMostColumns = 1024;       // of X at once
constexpr int kCounts = 16;                  // of columns with 0, 1, … kept values; the last has those with more, too

// A column of a block, counted from the first one that is read, and where its values begin.
struct Column {
  uint16_t column, value;
};
static_assert(sizeof(Column) == sizeof(float), "scratch counts them as floats");

// What one thread works in.
struct Workspace {
  float* dy;        // [kBlockRows][vectors · kLanes]
  float* values;    // [kValueFloats]
  Column* columns;  // [kCounts][pitch]
  int64_t pitch;
  float* g;  // of each tile at once: [columns][vectors · kLanes]
};

constexpr int64_t kDyFloats = kBlockRows * kMaxVectors * kLanes;
constexpr int64_t kValueFloats = 16 << 10;  // of the columns that are read at once: at least some groups
constexpr int64_t kGradientFloats = kGradientBytes / 4;

// The rows of a block that meet dY, and which of its rows, counted from the first one that they meet.
struct Rows {
  int64_t count;
  uint64_t bits;
  uint8_t of_x[kBlockRows];
  int64_t of_dy[kBlockRows];

  // All of them.
  void all(int64_t rows) {
    count = rows, bits = rows == kBlockRows ? ~uint64_t{0} : (uint64_t{1} << rows) - 1;
    for (int64_t i = 0; i < rows; i++) of_x[i] = static_cast<uint8_t>(i), of_dy[i] = i;
  }
  // Of rows [begin, end) of a sample. Returns the first row of dY.
  int64_t strided(const ConvShape& s, int64_t begin, int64_t end) {
    int64_t first = 0;
    count = 0, bits = 0;
    for (int64_t at = begin, next; at < end; at = next) {
      const int64_t y = at / s.iw + s.pt, x0 = at % s.iw + s.pl;
      next = std::min(end, (at / s.iw + 1) * s.iw);
      if (y % s.sh || y / s.sh >= s.oh) continue;
      for (int64_t x = (x0 + s.sw - 1) / s.sw; x < s.ow && x * s.sw - x0 < next - at; x++) {
        const int64_t row = y / s.sh * s.ow + x, i = at - begin + x * s.sw - x0;
        if (!count) first = row;
        of_x[count] = static_cast<uint8_t>(i), of_dy[count++] = row - first;
        bits |= uint64_t{1} << i;
      }
    }
    return first;
  }
};

// Adds up some vectors of the rows of dY, `pitch` apart, whose last vector has k − … lanes, and copies them to `tile`
// if there is one.
template <int kVectors, bool kCopy>
void gather(const float* dy, int64_t pitch, int64_t k, const Rows& rows, float* tile, VecF* total) {
  VecF sum[kVectors] = {};
  for (int64_t i = 0; i < rows.count; i++) {
    const float* from = dy + (kCopy ? rows.of_dy[i] : i) * pitch;
    float* to = tile + rows.of_x[i] * kVectors * kLanes;
    for (int v = 0; v < kVectors; v++) {
      const VecF d =
          v + 1 < kVectors || !kCopy ? load(from + v * kLanes) : load_upto(from + v * kLanes, k - v * kLanes);
      sum[v] += d;
      if (kCopy) store(to + v * kLanes, d);
    }
  }
  for (int v = 0; v < kVectors; v++) total[v] = sum[v];
}

// Some columns of a block of X, counted from the first one, by the number of their kept values.
struct BlockColumns {
  Rows rows;
  uint64_t read;  // the bits whose values are in `values`: rows.bits, or all
  const uint64_t* word;
  const uint16_t* mean;  // or null
  const float* values;
  const Column* list[kCounts];
  Column* end[kCounts];  // of list[]

  explicit BlockColumns(const Workspace& work) {
    for (int k = 0; k < kCounts; k++) list[k] = work.columns + k * work.pitch;
    clear(work);
  }
  void clear(const Workspace& work) {
    for (int k = 0; k < kCounts; k++) end[k] = work.columns + k * work.pitch;
  }

  // Appends columns [c, c + n), whose values begin at `value`. Returns where they end.
  int64_t append(int64_t c, int64_t n, int64_t value) {
    for (const int64_t last = c + n; c < last; c++) {
      const auto kept = std::min(__builtin_popcountll(word[c] & rows.bits), kCounts - 1);
      *end[kept]++ = {static_cast<uint16_t>(c), static_cast<uint16_t>(value)};
      value += __builtin_popcountll(word[c] & read);
    }
    return value;
  }
#ifdef ER_BYTE_MASKS
  // The lower half of each of 16 lanes of 64 bits.
  static VecI halves(__m512i low, __m512i high) {
    return __builtin_shufflevector((VecI)low, (VecI)high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  }
  // Moves lanes up by kStep; the first ones become 0.
  template <int kStep>
  static VecI shift(VecI v) {
    return (VecI)_mm512_maskz_alignr_epi32(0xffff, (__m512i)v, (__m512i)VecI{}, 16 - kStep);
  }
  // append() of at most 16 columns at once: of each small number of kept values the columns that have it.
  ER_BYTE_MASKS int64_t append_at_once(int64_t c, int64_t n, int64_t value) {
    constexpr int kAtOnce = 8;  // numbers that most columns have fewer than
    const __m512i low = _mm512_maskz_loadu_epi64(static_cast<__mmask8>((1u << n) - 1), word + c);
    const __m512i high = _mm512_maskz_loadu_epi64(static_cast<__mmask8>(((1u << n) - 1) >> 8), word + c + 8);
    const __m512i in = _mm512_set1_epi64(static_cast<int64_t>(rows.bits));
    const __m512i there = _mm512_set1_epi64(static_cast<int64_t>(read));
    const VecI all = halves(_mm512_popcnt_epi64(low & there), _mm512_popcnt_epi64(high & there));
    const VecI kept = halves(_mm512_popcnt_epi64(low & in), _mm512_popcnt_epi64(high & in));
    VecI ends = all;  // of a column's values, behind those before it
    ends += shift<1>(ends);
    ends += shift<2>(ends);
    ends += shift<4>(ends);
    ends += shift<8>(ends);
    const VecI begins = ends - all + static_cast<int32_t>(value);
    const __m512i entries = (__m512i)(lane_index() + static_cast<int32_t>(c) + (begins << 16));
    const auto lanes = static_cast<__mmask16>((1u << n) - 1);
#pragma GCC unroll 8
    for (int k = 0; k < kAtOnce; k++) {
      const __mmask16 same = _mm512_mask_cmpeq_epi32_mask(lanes, (__m512i)kept, _mm512_set1_epi32(k));
      _mm512_storeu_si512(end[k], _mm512_maskz_compress_epi32(same, entries));
      end[k] += __builtin_popcount(same);
    }
    for (uint32_t more = _mm512_mask_cmpge_epi32_mask(lanes, (__m512i)kept, _mm512_set1_epi32(kAtOnce)); more;
         more &= more - 1) {
      const int j = __builtin_ctz(more);
      const int k = std::min<int>(kept[j], kCounts - 1);
      *end[k]++ = {static_cast<uint16_t>(c + j), static_cast<uint16_t>(begins[j])};
    }
    return value + ends[kLanes - 1];
  }
#endif
};

// Whether the set bits of `word`, lowest first, are among `bits`.
inline uint64_t which_of(uint64_t bits, uint64_t word) {
#if defined(__BMI2__)
  return _pext_u64(bits, word);
#else
  uint64_t out = 0;
  for (uint64_t one = 1; word; word &= word - 1, one <<= 1)
    if (bits & word & -word) out |= one;
  return out;
#endif
}

// Leaves of the values of word[columns] those in the rows of `bits`, moved from `values` to `out`, which may lie before
// it.
__attribute__((noinline)) void leave_rows(const uint64_t* word, int64_t columns, uint64_t bits, const float* values,
                                          float* out) {
  for (int64_t c = 0; c < columns; c++) {
    const int64_t n = __builtin_popcountll(word[c]);
    uint64_t keep = which_of(bits, word[c]);
    for (int64_t i = 0; i < n; i += kLanes, keep >>= kLanes)
      out += compress(load(values + i), static_cast<uint32_t>(keep) & ((1u << kLanes) - 1), out);
    values += n;
  }
}

// Reads columns of [first, end) from the first on, as many groups as `values` has room for. Returns the column behind
// them, or 0 if they point outside the sample's values.
int64_t read_block(const KeptReader& x, int64_t sample, int64_t block, int64_t first, int64_t end,
                   const Workspace& work, BlockColumns* out) {
  float* values = work.values;
  const uint64_t* words = x.mask(sample, block);
  out->word = words + first;
  out->mean = x.at.form == kCentered ? x.mean(sample, block) + first : nullptr;
  out->values = values;
  out->clear(work);
  int64_t at = 0, c = first;
  while (c < end && at + kGroupValues <= kValueFloats) {
    if (!x.values(sample, block, c / kGroupColumns, values + at)) return 0;
    const int64_t group = c / kGroupColumns * kGroupColumns, group_end = std::min(end, group + kGroupColumns);
    int64_t before = 0;
    for (int64_t i = group; i < c; i++) before += __builtin_popcountll(words[i]);
    if (out->read != ~uint64_t{0})
      leave_rows(words + c, group_end - c, out->read, values + at + before, values + at);
    else
      at += before;
#ifdef ER_BYTE_MASKS
    at = byte_masks ? out->append_at_once(c - first, group_end - c, at) : out->append(c - first, group_end - c, at);
#else
    at = out->append(c - first, group_end - c, at);
#endif
    c = group_end;
  }
  return c;
}

// Adds the columns of one block to g[columns][kVectors · kLanes], or begins these with them. `dy` is the block's first
// row of dY, at the first of `k` output channels.
template <int kVectors, bool kCopy>
void block_gradient(const BlockColumns& x, const float* dy, int64_t stride, int64_t k, float* tile, float* g,
                    bool begin) {
  constexpr int64_t kWidth = kVectors * kLanes;
  VecF total[kVectors];
  gather<kVectors, kCopy>(dy, stride, k, x.rows, tile, total);
  const float* rows = kCopy ? tile : dy;
  const int64_t pitch = kCopy ? kWidth : stride;
  auto add = [&](const Column& column, int64_t n) __attribute__((always_inline)) {
    const int64_t c = column.column;
    const float* value = x.values + column.value;
    float* out = g + c * kWidth;
    VecF sum[kVectors] = {};
    if (!begin)
      for (int v = 0; v < kVectors; v++) sum[v] = load(out + v * kLanes);
    if (x.mean) {
      const VecF m = broadcast(from_bf16(x.mean[c]));
      for (int v = 0; v < kVectors; v++) sum[v] += m * total[v];
    }
    uint64_t w = x.word[c] & x.rows.bits;
    for (int64_t j = 0; j < n; j++, w &= w - 1) {
      const VecF r = broadcast(value[j]);
      const float* d = rows + __builtin_ctzll(w) * pitch;
      for (int v = 0; v < kVectors; v++) sum[v] += r * load(d + v * kLanes);
    }
    for (int v = 0; v < kVectors; v++) store(out + v * kLanes, sum[v]);
  };
  for (int64_t n = 0; n < kCounts; n++) {
    const bool more = n + 1 == kCounts;
    const Column* const end = x.end[n];
    for (const Column* c = x.list[n]; c < end; c++)
      add(*c, more ? __builtin_popcountll(x.word[c->column] & x.rows.bits) : n);
  }
}

// Whether a block's rows of `width` floats, `pitch` apart, are read where they are: whole vectors in whole lines of a
// cache, that leave each other in a first-level cache of 64 sets or more. Rows begin at multiples of the greatest
// common divisor of the pitch and the bytes that the sets span: if that is larger than a row, many of them meet in few
// sets.
bool read_in_place(int64_t pitch, int64_t width) {
  constexpr int64_t kSpan = 64 * 64, kFewMeet = 256;
  return pitch % 16 == 0 && std::gcd(pitch * 4, kSpan) <= std::max(kFewMeet, width * 4);
}

// The tiles of `vectors` vectors of output channels: tile t is [begin(t), begin(t + 1)).
struct Tiles {
  int64_t vectors, count;
  explicit Tiles(int64_t outputs)
      : vectors((outputs + kLanes - 1) / kLanes), count((vectors + kMaxVectors - 1) / kMaxVectors) {}
  int64_t begin(int64_t t) const { return t * vectors / count; }
};

using BlockGradient = void (*)(const BlockColumns&, const float*, int64_t, int64_t, float*, float*, bool);
constexpr BlockGradient kBlockGradient[] = {block_gradient<1, true>, block_gradient<2, true>, block_gradient<3, true>,
                                            block_gradient<4, true>, block_gradient<5, true>, block_gradient<6, true>};
static_assert(std::size(kBlockGradient) == kMaxVectors, "one function for each number of vectors");
// Without a copy, of at least kInPlace vectors: with fewer, columns are many beside them and the copy costs little.
#if ER_VECTOR_BYTES == 64
constexpr int64_t kInPlace = 5;
constexpr BlockGradient kInPlaceGradient[] = {block_gradient<5, false>, block_gradient<6, false>};
#else  // not worth another copy of the loops
constexpr int64_t kInPlace = kMaxVectors + 1;
constexpr BlockGradient kInPlaceGradient[] = {nullptr};
#endif

// Of a convolution with one tap: whether dY has a row for each of X.
bool flat(const ConvShape& s) { return s.sh == 1 && s.sw == 1 && !s.pt && !s.pl && s.oh == s.ih && s.ow == s.iw; }

// Blocks of X, counted over all samples.
struct Blocks {
  int64_t begin, end;
};

// Computes the share of `blocks` in G over `range`, at most kMostColumns columns, for its tiles [first, last). That of
// a tile lies at work.g + `columns` · (its first vector − that of the first tile).
bool tiles_gradient(const WeightGradient& call, const KeptReader& x, const WeightRange& range, const Tiles& tiles,
                    int64_t first, int64_t last, const Blocks& blocks, int64_t columns, const Workspace& work) {
  const ConvShape& s = call.shape;
  const int64_t column = range.group * (s.ic / s.group) + range.c0, output = range.group * (s.oc / s.group) + range.k0;
  const bool in_place = flat(s) && output % kLanes == 0 && (range.k1 - range.k0) % kLanes == 0;
  BlockColumns read(work);
  read.read = ~uint64_t{0};
  for (int64_t i = blocks.begin; i < blocks.end; i++) {
    const int64_t sample = i / x.at.blocks, block = i % x.at.blocks;
    const int64_t begin = x.at.row_begin(block), end = x.at.row_begin(block + 1);
    int64_t dy_row = begin;
    if (!flat(s))
      dy_row = read.rows.strided(s, begin, end), read.read = read.rows.bits;
    else if (i == blocks.begin || read.rows.count != end - begin)
      read.rows.all(end - begin);
    const float* dy = call.dy + (sample * s.oh * s.ow + dy_row) * s.oc + output;
    for (int64_t c = column, next; c < column + range.c1 - range.c0; c = next) {
      next = read_block(x, sample, block, c, column + range.c1 - range.c0, work, &read);
      if (!next) return false;
      for (int64_t t = first; t < last; t++) {
        const int64_t v0 = tiles.begin(t), v1 = tiles.begin(t + 1), k0 = v0 * kLanes, width = (v1 - v0) * kLanes;
        const bool copy = !in_place || v1 - v0 < kInPlace || !read_in_place(s.oc, width);
        const BlockGradient add = copy ? kBlockGradient[v1 - v0 - 1] : kInPlaceGradient[v1 - v0 - kInPlace];
        add(read, dy + k0, s.oc, std::min(k0 + width, range.k1 - range.k0) - k0, work.dy,
            work.g + columns * (v0 - tiles.begin(first)) * kLanes + (c - column) * width, i == blocks.begin);
      }
    }
  }
  return true;
}

// n columns in as few parts of whole column groups as `most` allows, as even as these: the begin of part i.
struct ColumnParts {
  int64_t columns, groups, count;
  ColumnParts(int64_t n, int64_t most)
      : columns(n), groups((n + kGroupColumns - 1) / kGroupColumns), count((n + most - 1) / most) {}
  int64_t begin(int64_t i) const { return std::min(columns, groups * i / count * kGroupColumns); }
};

// Input channels [c0, c1) and output channels [k0, k1) of a convolution group.
bool range_gradient(const WeightGradient& call, const KeptReader& x, const WeightRange& range, const Workspace& work) {
  const ConvShape& s = call.shape;
  const Tiles tiles(range.k1 - range.k0);
  const int64_t widest = std::min<int64_t>(kMaxVectors, tiles.vectors) * kLanes;
  const ColumnParts parts(range.c1 - range.c0,
                          std::min(kMostColumns, kGradientFloats / widest / kGroupColumns * kGroupColumns));
  for (int64_t part = 0; part < parts.count; part++) {
    const WeightRange r{range.group, range.c0 + parts.begin(part), range.c0 + parts.begin(part + 1), range.k0,
                        range.k1};
    const int64_t columns = r.c1 - r.c0;
    const int64_t fit = std::max<int64_t>(1, kGradientFloats / (columns * widest));
    const int64_t rounds = (tiles.count + fit - 1) / fit;
    for (int64_t round = 0; round < rounds; round++) {
      const int64_t first = tiles.count * round / rounds, last = tiles.count * (round + 1) / rounds;
      float* g = call.g + r.c0 * s.oc + r.group * (s.oc / s.group) + r.k0;
      if (!tiles_gradient(call, x, r, tiles, first, last, {0, x.at.samples * x.at.blocks}, columns, work)) return false;
      for (int64_t t = first; t < last; t++) {
        const int64_t k0 = tiles.begin(t) * kLanes, width = tiles.begin(t + 1) * kLanes - k0;
        const float* from = work.g + columns * (k0 - tiles.begin(first) * kLanes);
        for (int64_t c = 0; c < columns; c++)
          std::memcpy(g + k0 + c * s.oc, from + c * width, std::min(width, r.k1 - r.k0 - k0) * sizeof(float));
      }
    }
  }
  return true;
}

bool one_tap(const ConvShape& s) { return s.taps() == 1; }

// How the threads share a convolution without groups: column groups into `columns` parts, output channels into
// `outputs` parts.
struct Grid {
  int64_t columns, outputs;
};

Grid choose_grid(int64_t groups, int64_t vectors, int threads) {
  Grid best{1, 1};
  double least = 1e300;
  for (int64_t c = 1; c <= threads; c++) {
    const int64_t k = threads / c;
    const double g = static_cast<double>((groups + c - 1) / c), v = static_cast<double>((vectors + k - 1) / k);
    // A mask word costs about as much as 2 vectors, and 2 more for each tile; copying dY about as much as a tenth of a
    // column group.
    const double tiles = static_cast<double>((static_cast<int64_t>(v) + kMaxVectors - 1) / kMaxVectors);
    const double cost = g * (2 + 2 * tiles + v) + 0.6 * v;
    if (cost < least) least = cost, best = {c, k};
  }
  return best;
}

// Of the lists of columns: a vector is stored behind the last one.
int64_t list_pitch(const ConvShape& s) {
  return (std::min(kMostColumns, s.ic / s.group) + 2 * kLanes - 1) / kLanes * kLanes;
}

// Of a thread.
int64_t scratch_floats(const ConvShape& s) {
  const int64_t width = Tiles(s.oc / s.group).vectors * kLanes, columns = s.ic / s.group;
  return kDyFloats + kValueFloats + kCounts * list_pitch(s) +
         (columns < kGradientFloats / width ? columns * width : kGradientFloats);
}

Workspace workspace(const WeightGradient& call, int thread) {
  float* dy = static_cast<float*>(call.scratch) + thread * scratch_floats(call.shape);
  float *values = dy + kDyFloats, *columns = values + kValueFloats;
  const int64_t pitch = list_pitch(call.shape);
  return {dy, values, reinterpret_cast<Column*>(columns), pitch, columns + kCounts * pitch};
}

// Whether the threads share the blocks. Adding up their sums should take little beside making them.
bool by_blocks(const ConvShape& s, const PackedLayout& x, int threads) {
  constexpr int64_t kFewest = 32;  // blocks a thread
  return threads > 1 && one_tap(s) && s.group == 1 && s.ic <= kSharedBytes / 4 / (Tiles(s.oc).vectors * kLanes) &&
         x.samples * x.blocks >= kFewest * threads;
}

bool blocks_gradient(const WeightGradient& call, const KeptReader& x) {
  const ConvShape& s = call.shape;
  const Tiles tiles(s.oc);
  const int threads = call.pool->threads();
  const ColumnParts parts(s.ic, kMostColumns);
  std::atomic<bool> valid{true};
  call.pool->split(x.at.samples * x.at.blocks, 1, [&](int64_t begin, int64_t end, int thread) {
    Workspace work = workspace(call, thread);
    for (int64_t part = 0; part < parts.count; part++) {
      const WeightRange range{0, parts.begin(part), parts.begin(part + 1), 0, s.oc};
      if (!tiles_gradient(call, x, range, tiles, 0, tiles.count, {begin, end}, range.c1 - range.c0, work))
        return valid.store(false, std::memory_order_relaxed);
      work.g += (range.c1 - range.c0) * tiles.vectors * kLanes;
    }
  });
  for (int64_t part = 0; part < parts.count; part++) {
    const int64_t first = parts.begin(part), columns = parts.begin(part + 1) - first;
    call.pool->share(columns, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t t = 0; t < tiles.count; t++) {
        const int64_t k0 = tiles.begin(t) * kLanes, width = tiles.begin(t + 1) * kLanes - k0;
        for (int64_t c = begin; c < end; c++)
          for (int64_t k = 0; k < width; k += kLanes) {
            const int64_t at = first * tiles.vectors * kLanes + columns * k0 + c * width + k;
            VecF sum = load(workspace(call, 0).g + at);
            for (int thread = 1; thread < threads; thread++) sum += load(workspace(call, thread).g + at);
            store_upto(call.g + (first + c) * s.oc + k0 + k, sum, s.oc - k0 - k);
          }
      }
    });
  }
  return valid;
}

}  // namespace

uint64_t razor_weight_scratch(const ConvShape& shape, int threads) {
  if (!one_tap(shape)) return razor_taps_scratch(shape, threads);
  return static_cast<uint64_t>(threads * scratch_floats(shape)) * sizeof(float);
}

bool razor_weight_run(const WeightGradient& call) {
  const ConvShape& s = call.shape;
  const KeptReader x(call.x_layout, call.x);
  const int threads = call.pool->threads();
  if (by_blocks(s, x.at, threads)) return blocks_gradient(call, x);
  const int64_t ic_group = s.ic / s.group, oc_group = s.oc / s.group;
  const Grid grid =
      choose_grid((ic_group + kGroupColumns - 1) / kGroupColumns, (oc_group + kLanes - 1) / kLanes, threads);
  std::atomic<bool> valid{true};
  call.pool->run([&](int thread) {
    auto gradient = [&](const WeightRange& range) {
      if (!one_tap(s)) return razor_taps_range(call, x, range, thread);
      return range_gradient(call, x, range, workspace(call, thread));
    };
    bool ok = true;
    if (s.group > 1) {
      for (int64_t g = s.group * thread / threads; g < s.group * (thread + 1) / threads; g++)
        ok = ok && gradient({g, 0, ic_group, 0, oc_group});
    } else if (thread < grid.columns * grid.outputs) {
      const int64_t i = thread / grid.outputs, j = thread % grid.outputs;
      const int64_t groups = (s.ic + kGroupColumns - 1) / kGroupColumns, vectors = (s.oc + kLanes - 1) / kLanes;
      const WeightRange range{
          0, groups * i / grid.columns * kGroupColumns, std::min(s.ic, groups * (i + 1) / grid.columns * kGroupColumns),
          vectors * j / grid.outputs * kLanes, std::min(s.oc, vectors * (j + 1) / grid.outputs * kLanes)};
      ok = range.c0 >= range.c1 || range.k0 >= range.k1 || gradient(range);
    }
    if (!ok) valid.store(false, std::memory_order_relaxed);
  });
  return valid;
}

}  // namespace er::ER_ISA
