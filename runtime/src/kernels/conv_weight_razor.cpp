// Weight gradient straight from the razor forms; here of a linear layer or a 1×1 convolution,
//
//   G[c, :] = Σ over blocks of mean[block, c] · (Σ of the block's rows of dY) + Σ over kept of value · dY[row, :]
//
// (conv_weight_taps.cpp has the others). A block's kept values are decoded once for several tiles of up to kMaxVectors
// vectors of output channels. For each of these the sum of the block's dY rows is taken, which brings them to the
// first-level cache; where they would push each other out of it there, they are copied to a contiguous tile. Then, for
// each column of X, the tile of G stays in registers while the set bits of the column's mask word are walked. Columns
// are taken in the order of their number of set bits: the end of a loop over a few bits would be guessed wrong nearly
// every time, and costs as much as the bits.
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

// What one thread works in.
struct Workspace {
  float* dy;      // [kBlockRows][vectors · kLanes]
  float* values;  // [kValueFloats]
  float* g;       // of each tile at once: [columns][vectors · kLanes]
};

constexpr int64_t kDyFloats = kBlockRows * kMaxVectors * kLanes;
constexpr int64_t kValueFloats = 16 << 10;  // of the columns that are read at once: at least some groups
constexpr int64_t kFixedFloats = kDyFloats + kValueFloats;
constexpr int64_t kGradientFloats = kGradientBytes / 4;

// Adds up some vectors of the rows of dY, `pitch` apart, whose last vector has k − … lanes, and copies them to `tile`
// if there is one.
template <int kVectors, bool kCopy>
void gather(const float* dy, int64_t pitch, int64_t k, int64_t rows, float* tile, VecF* total) {
  VecF sum[kVectors] = {};
  for (int64_t i = 0; i < rows; i++, dy += pitch, tile += kVectors * kLanes)
    for (int v = 0; v < kVectors; v++) {
      const VecF d = v + 1 < kVectors || !kCopy ? load(dy + v * kLanes) : load_upto(dy + v * kLanes, k - v * kLanes);
      sum[v] += d;
      if (kCopy) store(tile + v * kLanes, d);
    }
  for (int v = 0; v < kVectors; v++) total[v] = sum[v];
}

// Columns [0, columns) of a block of X, in the order of the number of their kept values.
struct BlockColumns {
  int64_t rows, columns;
  uint64_t inside;       // the bits that are rows of the block
  const uint64_t* word;  // [columns]
  const uint16_t* mean;  // [columns] or null
  const float* values;
  struct Column {
    int32_t column, kept, value;  // … and where its values begin
  } order[kMostColumns];
};

// Reads columns of [first, end) from the first on, as many groups as `values` has room for. Returns the column behind
// them, or 0 if they point outside the sample's values.
int64_t read_block(const KeptReader& x, int64_t sample, int64_t block, int64_t first, int64_t end, float* values,
                   BlockColumns* out) {
  const uint64_t* words = x.mask(sample, block);
  out->rows = x.at.row_begin(block + 1) - x.at.row_begin(block);
  out->inside = out->rows == kBlockRows ? ~uint64_t{0} : (uint64_t{1} << out->rows) - 1;
  out->word = words + first;
  out->mean = x.at.form == kCentered ? x.mean(sample, block) + first : nullptr;
  out->values = values;
  BlockColumns::Column column[kMostColumns];
  int32_t next[kBlockRows + 1] = {};  // at first how many columns have so many values, then where the next one goes
  int64_t at = 0, c = first;
  while (c < end && at + kGroupValues <= kValueFloats) {
    if (!x.values(sample, block, c / kGroupColumns, values + at)) return 0;
    const int64_t group = c / kGroupColumns * kGroupColumns, group_end = std::min(end, group + kGroupColumns);
    for (int64_t before = group; before < c; before++) at += __builtin_popcountll(words[before]);
    for (; c < group_end; c++) {
      const auto kept = static_cast<int32_t>(__builtin_popcountll(words[c] & out->inside));
      column[c - first] = {static_cast<int32_t>(c - first), kept, static_cast<int32_t>(at)};
      next[kept]++;
      at += __builtin_popcountll(words[c]);
    }
  }
  out->columns = c - first;
  int32_t begin = 0;
  for (int32_t& n : next) {
    const int32_t count = n;
    n = begin, begin += count;
  }
  for (int64_t i = 0; i < out->columns; i++) out->order[next[column[i].kept]++] = column[i];
  return c;
}

// Adds the columns of one block to g[columns][kVectors · kLanes]. `dy` is the block's first row of dY, at the first of
// `k` output channels.
template <int kVectors, bool kCopy>
void block_gradient(const BlockColumns& x, const float* dy, int64_t stride, int64_t k, float* tile, float* g) {
  constexpr int64_t kWidth = kVectors * kLanes;
  VecF total[kVectors];
  gather<kVectors, kCopy>(dy, stride, k, x.rows, tile, total);
  const float* rows = kCopy ? tile : dy;
  const int64_t pitch = kCopy ? kWidth : stride;
  for (int64_t i = 0; i < x.columns; i++) {
    const int64_t c = x.order[i].column, n = x.order[i].kept;
    const float* value = x.values + x.order[i].value;
    float* out = g + c * kWidth;
    VecF sum[kVectors];
    for (int v = 0; v < kVectors; v++) sum[v] = load(out + v * kLanes);
    if (x.mean) {
      const VecF m = broadcast(from_bf16(x.mean[c]));
      for (int v = 0; v < kVectors; v++) sum[v] += m * total[v];
    }
    uint64_t w = x.word[c] & x.inside;
    for (int64_t j = 0; j < n; j++, w &= w - 1) {
      const VecF r = broadcast(value[j]);
      const float* d = rows + __builtin_ctzll(w) * pitch;
      for (int v = 0; v < kVectors; v++) sum[v] += r * load(d + v * kLanes);
    }
    for (int v = 0; v < kVectors; v++) store(out + v * kLanes, sum[v]);
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

using BlockGradient = void (*)(const BlockColumns&, const float*, int64_t, int64_t, float*, float*);
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
  const bool in_place = output % kLanes == 0 && (range.k1 - range.k0) % kLanes == 0;
  for (int64_t i = blocks.begin; i < blocks.end; i++) {
    const int64_t sample = i / x.at.blocks, block = i % x.at.blocks;
    const float* dy = call.dy + (sample * x.at.rows + x.at.row_begin(block)) * s.oc + output;
    BlockColumns read;
    for (int64_t c = column, next; c < column + range.c1 - range.c0; c = next) {
      next = read_block(x, sample, block, c, column + range.c1 - range.c0, work.values, &read);
      if (!next) return false;
      for (int64_t t = first; t < last; t++) {
        const int64_t v0 = tiles.begin(t), v1 = tiles.begin(t + 1), k0 = v0 * kLanes, width = (v1 - v0) * kLanes;
        const bool copy = !in_place || v1 - v0 < kInPlace || !read_in_place(s.oc, width);
        const BlockGradient add = copy ? kBlockGradient[v1 - v0 - 1] : kInPlaceGradient[v1 - v0 - kInPlace];
        add(read, dy + k0, s.oc, std::min(k0 + width, range.k1 - range.k0) - k0, work.dy,
            work.g + columns * (v0 - tiles.begin(first)) * kLanes + (c - column) * width);
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
      std::fill_n(work.g, columns * (tiles.begin(last) - tiles.begin(first)) * kLanes, 0.f);
      if (!tiles_gradient(call, x, r, tiles, first, last, {0, x.at.samples * x.at.blocks}, columns, work)) return false;
      for (int64_t t = first; t < last; t++) {
        const int64_t k0 = tiles.begin(t) * kLanes, width = tiles.begin(t + 1) * kLanes - k0;
        const float* from = work.g + columns * (k0 - tiles.begin(first) * kLanes);
        float* g = call.g + r.c0 * s.oc + r.group * (s.oc / s.group) + r.k0 + k0;
        for (int64_t c = 0; c < columns; c++)
          std::memcpy(g + c * s.oc, from + c * width, std::min(width, r.k1 - r.k0 - k0) * sizeof(float));
      }
    }
  }
  return true;
}

// Whether dY has a row for each of X, the only one that it meets.
bool flat(const ConvShape& s) {
  return s.kh == 1 && s.kw == 1 && s.sh == 1 && s.sw == 1 && !s.pt && !s.pl && s.oh == s.ih && s.ow == s.iw;
}

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
    // A mask word costs about as much as 4 vectors beside its own; copying dY about as much as a tenth of a column
    // group.
    const double tiles = static_cast<double>((static_cast<int64_t>(v) + kMaxVectors - 1) / kMaxVectors);
    const double cost = g * (4 * tiles + v) + 0.6 * v;
    if (cost < least) least = cost, best = {c, k};
  }
  return best;
}

// Of a thread.
int64_t scratch_floats(const ConvShape& s) {
  const int64_t width = Tiles(s.oc / s.group).vectors * kLanes, columns = s.ic / s.group;
  return kFixedFloats + (columns < kGradientFloats / width ? columns * width : kGradientFloats);
}

Workspace workspace(const WeightGradient& call, int thread) {
  float* base = static_cast<float*>(call.scratch) + thread * scratch_floats(call.shape);
  return {base, base + kDyFloats, base + kFixedFloats};
}

// Whether the threads share the blocks. Adding up their sums should take little beside making them.
bool by_blocks(const ConvShape& s, const PackedLayout& x, int threads) {
  constexpr int64_t kFewest = 32;  // blocks a thread
  return threads > 1 && flat(s) && s.group == 1 && s.ic <= kSharedBytes / 4 / (Tiles(s.oc).vectors * kLanes) &&
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
    std::fill_n(work.g, s.ic * tiles.vectors * kLanes, 0.f);
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
  if (!flat(shape)) return razor_taps_scratch(shape, threads);
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
      if (!flat(s)) return razor_taps_range(call, x, range, thread);
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
