// Weight gradient straight from the razor forms; here of a linear layer or a 1×1 convolution,
//
//   G[c, :] = Σ over blocks of mean[block, c] · (Σ of the block's rows of dY) + Σ over kept of value · dY[row, :]
//
// (conv_weight_taps.cpp has the others). For a tile of up to kMaxVectors vectors of output channels, a block's dY rows
// are copied to a contiguous tile (in L1 for what follows) while their sum is taken. Then, for each column of X, the
// tile of G stays in registers while the set bits of the column's mask word are walked. G is accumulated in scratch, as
// many columns at a time as fit the L2 cache, and written once. Threads share columns and output channels; or, where
// all of G fits and blocks are many, the blocks: then none reads or copies what another does, and the sums of all are
// added up in the end.
#include <atomic>
#include <iterator>

#include "conv_weight.h"

namespace er::ER_ISA {
namespace {

constexpr int kMaxVectors = 6;  // as in the prototype: with the broadcast value they leave registers free on every ISA
constexpr int64_t kGradientBytes = 256 << 10;  // of G in scratch: a quarter of the L2 cache of a small core or more

// What one thread works in.
struct Workspace {
  float* dy;      // [kBlockRows][vectors · kLanes]
  float* values;  // [kGroupValues]
  float* g;       // [columns of the chunk][vectors · kLanes]
};

constexpr int64_t kDyFloats = kBlockRows * kMaxVectors * kLanes;
constexpr int64_t kFixedFloats = kDyFloats + (kGroupValues + 15) / 16 * 16;

constexpr int64_t kGradientFloats = kGradientBytes / 4;

// Copies rows of dY and adds them up.
template <int kVectors>
void gather(const float* dy, int64_t stride, int64_t k, int64_t rows, float* tile, VecF* total) {
  VecF sum[kVectors] = {};
  for (int64_t i = 0; i < rows; i++, dy += stride, tile += kVectors * kLanes)
    for (int v = 0; v < kVectors; v++) {
      const VecF d = v + 1 < kVectors ? load(dy + v * kLanes) : load_upto(dy + v * kLanes, k - v * kLanes);
      sum[v] += d;
      store(tile + v * kLanes, d);
    }
  for (int v = 0; v < kVectors; v++) total[v] = sum[v];
}

// Adds columns [0, n) of one block to g: `word` their masks, `value` their values in packed order, `mean` or null.
// Bits outside `inside` are no rows of the block.
template <int kVectors>
void add_columns(int64_t n, const uint64_t* word, const float* value, const uint16_t* mean, uint64_t inside,
                 const float* tile, const VecF* total, float* g) {
  constexpr int64_t kWidth = kVectors * kLanes;
  for (int64_t c = 0; c < n; c++, g += kWidth) {
    VecF sum[kVectors];
    for (int v = 0; v < kVectors; v++) sum[v] = load(g + v * kLanes);
    if (mean) {
      const VecF m = broadcast(from_bf16(mean[c]));
      for (int v = 0; v < kVectors; v++) sum[v] += m * total[v];
    }
    const float* next = value + __builtin_popcountll(word[c]);
    for (uint64_t w = word[c] & inside; w; w &= w - 1) {
      const VecF x = broadcast(*value++);
      const float* d = tile + __builtin_ctzll(w) * kWidth;
      for (int v = 0; v < kVectors; v++) sum[v] += x * load(d + v * kLanes);
    }
    value = next;
    for (int v = 0; v < kVectors; v++) store(g + v * kLanes, sum[v]);
  }
}

// Blocks of X, counted over all samples.
struct Blocks {
  int64_t begin, end;
};

// Computes the share of `blocks` in G over `range`, whose columns fit the workspace, in work.g.
template <int kVectors>
bool tile_gradient(const WeightGradient& call, const KeptReader& x, const WeightRange& range, const Blocks& blocks,
                   const Workspace& work) {
  constexpr int64_t kWidth = kVectors * kLanes;
  const ConvShape& s = call.shape;
  const int64_t columns = range.c1 - range.c0, ic_group = s.ic / s.group, oc_group = s.oc / s.group;
  const int64_t first = range.group * ic_group + range.c0, end = first + columns,
                k_first = range.group * oc_group + range.k0;
  const int64_t k = range.k1 - range.k0;
  std::fill_n(work.g, columns * kWidth, 0.f);
  for (int64_t i = blocks.begin; i < blocks.end; i++) {
    const int64_t sample = i / x.at.blocks, block = i % x.at.blocks;
    const int64_t row = x.at.row_begin(block), rows = x.at.row_begin(block + 1) - row;
    VecF total[kVectors];
    gather<kVectors>(call.dy + (sample * x.at.rows + row) * s.oc + k_first, s.oc, k, rows, work.dy, total);
    const uint64_t inside = rows == kBlockRows ? ~uint64_t{0} : (uint64_t{1} << rows) - 1;
    const uint64_t* words = x.mask(sample, block);
    const uint16_t* means = x.at.form == kCentered ? x.mean(sample, block) : nullptr;
    for (int64_t c = first; c < end;) {
      const int64_t group_begin = c / kGroupColumns * kGroupColumns, c_end = std::min(end, group_begin + kGroupColumns);
      if (!x.values(sample, block, c / kGroupColumns, work.values)) return false;
      const float* value = work.values;
      for (int64_t before = group_begin; before < c; before++) value += __builtin_popcountll(words[before]);
      add_columns<kVectors>(c_end - c, words + c, value, means ? means + c : nullptr, inside, work.dy, total,
                            work.g + (c - first) * kWidth);
      c = c_end;
    }
  }
  return true;
}

// The tiles of `vectors` vectors of output channels: tile t is [begin(t), begin(t + 1)).
struct Tiles {
  int64_t vectors, count;
  explicit Tiles(int64_t outputs)
      : vectors((outputs + kLanes - 1) / kLanes), count((vectors + kMaxVectors - 1) / kMaxVectors) {}
  int64_t begin(int64_t t) const { return t * vectors / count; }
};

using TileGradient = bool (*)(const WeightGradient&, const KeptReader&, const WeightRange&, const Blocks&,
                              const Workspace&);
constexpr TileGradient kTileGradient[] = {tile_gradient<1>, tile_gradient<2>, tile_gradient<3>,
                                          tile_gradient<4>, tile_gradient<5>, tile_gradient<6>};
static_assert(std::size(kTileGradient) == kMaxVectors, "one function for each number of vectors");

// Input channels [c0, c1) and output channels [k0, k1) of a convolution group, in tiles and chunks.
bool range_gradient(const WeightGradient& call, const KeptReader& x, const WeightRange& range, const Workspace& work) {
  const ConvShape& s = call.shape;
  const Tiles tiles(range.k1 - range.k0);
  for (int64_t t = 0; t < tiles.count; t++) {
    const int64_t v0 = tiles.begin(t), v1 = tiles.begin(t + 1), width = (v1 - v0) * kLanes;
    const int64_t chunk = kGradientFloats / width / kGroupColumns * kGroupColumns;
    for (int64_t c = range.c0; c < range.c1; c += chunk) {
      const WeightRange tile{range.group, c, std::min(range.c1, c + chunk), range.k0 + v0 * kLanes,
                             std::min(range.k1, range.k0 + v1 * kLanes)};
      if (!kTileGradient[v1 - v0 - 1](call, x, tile, {0, x.at.samples * x.at.blocks}, work)) return false;
      float* g = call.g + range.group * (s.oc / s.group) + tile.k0;
      for (int64_t i = tile.c0; i < tile.c1; i++)
        std::memcpy(g + i * s.oc, work.g + (i - tile.c0) * width, (tile.k1 - tile.k0) * sizeof(float));
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

Workspace workspace(const WeightGradient& call, int thread) {
  float* base = static_cast<float*>(call.scratch) + thread * (kFixedFloats + kGradientFloats);
  return {base, base + kDyFloats, base + kFixedFloats};
}

// Whether the threads share the blocks. Adding up their sums should take little beside making them.
bool by_blocks(const ConvShape& s, const PackedLayout& x, int threads) {
  constexpr int64_t kFewest = 32;  // blocks a thread
  return threads > 1 && flat(s) && s.group == 1 && s.ic <= kGradientFloats / (Tiles(s.oc).vectors * kLanes) &&
         x.samples * x.blocks >= kFewest * threads;
}

bool blocks_gradient(const WeightGradient& call, const KeptReader& x) {
  const ConvShape& s = call.shape;
  const Tiles tiles(s.oc);
  const int threads = call.pool->threads();
  std::atomic<bool> valid{true};
  call.pool->split(x.at.samples * x.at.blocks, 1, [&](int64_t begin, int64_t end, int thread) {
    Workspace work = workspace(call, thread);
    for (int64_t t = 0; t < tiles.count; t++) {
      const int64_t v0 = tiles.begin(t), v1 = tiles.begin(t + 1);
      const WeightRange range{0, 0, s.ic, v0 * kLanes, std::min(s.oc, v1 * kLanes)};
      if (!kTileGradient[v1 - v0 - 1](call, x, range, {begin, end}, work))
        return valid.store(false, std::memory_order_relaxed);
      work.g += s.ic * (v1 - v0) * kLanes;
    }
  });
  call.pool->split(s.ic, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = 0; t < tiles.count; t++) {
      const int64_t k0 = tiles.begin(t) * kLanes, width = tiles.begin(t + 1) * kLanes - k0;
      for (int64_t c = begin; c < end; c++)
        for (int64_t k = 0; k < width; k += kLanes) {
          const int64_t at = s.ic * k0 + c * width + k;
          VecF sum = load(workspace(call, 0).g + at);
          for (int thread = 1; thread < threads; thread++) sum += load(workspace(call, thread).g + at);
          store_upto(call.g + c * s.oc + k0 + k, sum, s.oc - k0 - k);
        }
    }
  });
  return valid;
}

}  // namespace

uint64_t razor_weight_scratch(const ConvShape& shape, int threads) {
  if (!flat(shape)) return razor_taps_scratch(shape, threads);
  return static_cast<uint64_t>(threads) * (kFixedFloats + kGradientFloats) * sizeof(float);
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
