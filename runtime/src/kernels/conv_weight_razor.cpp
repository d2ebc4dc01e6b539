// Weight gradient straight from the razor forms:
//
//   G[tap, c, :] = Σ over blocks of mean[block, c] · (Σ of dY over the rows that the tap reaches) + Σ over kept of
//   value · dY[row, :]
//
// For a tile of up to kMaxVectors vectors of output channels, the dY rows that a block of X meets through a tap are
// copied to a contiguous tile (in L1 for what follows) while their sum is taken. Then, for each column of X, the tile
// of G stays in registers while the set bits of the column's mask word are walked. G is accumulated in scratch, as many
// columns at a time as fit the L2 cache, and written once. Each element is summed by one thread in the order of the
// blocks, so the result does not depend on the number of threads.
#include <atomic>

#include "conv_weight.h"

namespace er::ER_ISA {
namespace {

constexpr int kMaxVectors = 6;  // as in the prototype: with the broadcast value they leave registers free on every ISA
constexpr int64_t kGradientBytes = 256 << 10;  // of G in scratch: a quarter of the L2 cache of a small core or more

// What one thread works in.
struct Workspace {
  float* dy;      // [kBlockRows][vectors · kLanes]
  float* values;  // [kGroupValues]
  float* g;       // [taps][columns of the chunk][vectors · kLanes]
};

constexpr int64_t kDyFloats = kBlockRows * kMaxVectors * kLanes;
constexpr int64_t kFixedFloats = kDyFloats + (kGroupValues + 15) / 16 * 16;

int64_t gradient_floats(int64_t taps) {
  return std::max<int64_t>(kGradientBytes / 4, taps * kGroupColumns * kMaxVectors * kLanes);
}

// The part of G that one call of `tile_gradient` computes: input channels [c0, c1) and output channels [k0, k1) of one
// convolution group.
struct Range {
  int64_t group, c0, c1, k0, k1;
};

// Copies the dY rows of the runs to where their X rows are in the block, and adds them up. Returns which rows were met.
template <int kVectors>
uint64_t gather(const float* dy, int64_t stride, int64_t k, int64_t step, const TapRun* runs, int n, float* tile,
                VecF* total) {
  uint64_t met = 0;
  VecF sum[kVectors] = {};
  for (int r = 0; r < n; r++) {
    const float* row = dy + runs[r].dy_row * stride;
    for (int64_t i = 0, at = runs[r].row; i < runs[r].count; i++, at += step, row += stride) {
      met |= uint64_t{1} << at;
      float* out = tile + at * kVectors * kLanes;
      for (int v = 0; v < kVectors; v++) {
        const VecF d = v + 1 < kVectors ? load(row + v * kLanes) : load_upto(row + v * kLanes, k - v * kLanes);
        sum[v] += d;
        store(out + v * kLanes, d);
      }
    }
  }
  for (int v = 0; v < kVectors; v++) total[v] = sum[v];
  return met;
}

// Adds columns [0, n) of one block and tap to g: `word` their masks, `value` their values in packed order, `mean` or
// null.
template <int kVectors>
void add_columns(int64_t n, const uint64_t* word, const float* value, const uint16_t* mean, uint64_t met,
                 const float* tile, const VecF* total, float* g) {
  constexpr int64_t kWidth = kVectors * kLanes;
  for (int64_t c = 0; c < n; c++, g += kWidth) {
    VecF sum[kVectors];
    for (int v = 0; v < kVectors; v++) sum[v] = load(g + v * kLanes);
    if (mean) {
      const VecF m = broadcast(from_bf16(mean[c]));
      for (int v = 0; v < kVectors; v++) sum[v] += m * total[v];
    }
    const uint64_t all = word[c];
    if (all & ~met) {  // values of rows that the tap does not reach are passed over
      for (uint64_t w = all & met; w; w &= w - 1) {
        const uint64_t before = (w & -w) - 1;
        const VecF x = broadcast(value[__builtin_popcountll(all & before)]);
        const float* d = tile + __builtin_ctzll(w) * kWidth;
        for (int v = 0; v < kVectors; v++) sum[v] += x * load(d + v * kLanes);
      }
      value += __builtin_popcountll(all);
    } else {
      for (uint64_t w = all; w; w &= w - 1) {
        const VecF x = broadcast(*value++);
        const float* d = tile + __builtin_ctzll(w) * kWidth;
        for (int v = 0; v < kVectors; v++) sum[v] += x * load(d + v * kLanes);
      }
    }
    for (int v = 0; v < kVectors; v++) store(g + v * kLanes, sum[v]);
  }
}

// Computes G over `range`, whose columns fit the workspace.
template <int kVectors>
bool tile_gradient(const WeightGradient& call, const KeptReader& x, const Range& range, const Workspace& work) {
  constexpr int64_t kWidth = kVectors * kLanes;
  const ConvShape& s = call.shape;
  const int64_t columns = range.c1 - range.c0, ic_group = s.ic / s.group, oc_group = s.oc / s.group;
  const int64_t first = range.group * ic_group + range.c0, end = first + columns,
                k_first = range.group * oc_group + range.k0;
  const int64_t k = range.k1 - range.k0;
  std::fill_n(work.g, s.taps() * columns * kWidth, 0.f);
  for (int64_t sample = 0; sample < s.n; sample++)
    for (int64_t block = 0; block < x.at.blocks; block++)
      for (int64_t tap = 0; tap < s.taps(); tap++) {
        TapRun runs[kBlockRows];
        const int n =
            tap_runs(s, sample, x.at.row_begin(block), x.at.row_begin(block + 1), tap / s.kw, tap % s.kw, runs);
        if (!n) continue;
        VecF total[kVectors];
        const uint64_t met = gather<kVectors>(call.dy + k_first, s.oc, k, s.sw, runs, n, work.dy, total);
        const uint64_t* words = x.mask(sample, block);
        const uint16_t* means = x.at.form == kCentered ? x.mean(sample, block) : nullptr;
        for (int64_t c = first; c < end;) {
          const int64_t group_begin = c / kGroupColumns * kGroupColumns,
                        c_end = std::min(end, group_begin + kGroupColumns);
          if (!x.values(sample, block, c / kGroupColumns, work.values)) return false;
          const float* value = work.values;
          for (int64_t before = group_begin; before < c; before++) value += __builtin_popcountll(words[before]);
          add_columns<kVectors>(c_end - c, words + c, value, means ? means + c : nullptr, met, work.dy, total,
                                work.g + (tap * columns + c - first) * kWidth);
          c = c_end;
        }
      }
  for (int64_t tap = 0; tap < s.taps(); tap++)
    for (int64_t c = 0; c < columns; c++) {
      float* out = call.g + (tap * ic_group + range.c0 + c) * s.oc + k_first;
      std::memcpy(out, work.g + (tap * columns + c) * kWidth, k * sizeof(float));
    }
  return true;
}

// Input channels [c0, c1) and output channels [k0, k1) of a convolution group, in tiles and chunks.
bool range_gradient(const WeightGradient& call, const KeptReader& x, const Range& range, const Workspace& work) {
  static constexpr auto kTiles = {tile_gradient<1>, tile_gradient<2>, tile_gradient<3>,
                                  tile_gradient<4>, tile_gradient<5>, tile_gradient<6>};
  static_assert(kTiles.size() == kMaxVectors, "one function for each number of vectors");
  const int64_t vectors = (range.k1 - range.k0 + kLanes - 1) / kLanes;
  const int64_t tiles = (vectors + kMaxVectors - 1) / kMaxVectors;
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t v0 = t * vectors / tiles, v1 = (t + 1) * vectors / tiles;
    const int64_t fit = gradient_floats(call.shape.taps()) / (call.shape.taps() * (v1 - v0) * kLanes);
    const int64_t chunk = fit / kGroupColumns * kGroupColumns;
    for (int64_t c = range.c0; c < range.c1; c += chunk) {
      const Range tile{range.group, c, std::min(range.c1, c + chunk), range.k0 + v0 * kLanes,
                       std::min(range.k1, range.k0 + v1 * kLanes)};
      if (!kTiles.begin()[v1 - v0 - 1](call, x, tile, work)) return false;
    }
  }
  return true;
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

}  // namespace

uint64_t razor_weight_scratch(const ConvShape& shape, int threads) {
  return static_cast<uint64_t>(threads) * (kFixedFloats + gradient_floats(shape.taps())) * sizeof(float);
}

bool razor_weight_run(const WeightGradient& call) {
  const ConvShape& s = call.shape;
  const KeptReader x(call.x_layout, call.x);
  const int threads = call.pool->threads();
  const int64_t ic_group = s.ic / s.group, oc_group = s.oc / s.group;
  const Grid grid =
      choose_grid((ic_group + kGroupColumns - 1) / kGroupColumns, (oc_group + kLanes - 1) / kLanes, threads);
  std::atomic<bool> valid{true};
  call.pool->run([&](int thread) {
    float* base = static_cast<float*>(call.scratch) + thread * (kFixedFloats + gradient_floats(s.taps()));
    const Workspace work{base, base + kDyFloats, base + kFixedFloats};
    bool ok = true;
    if (s.group > 1) {
      for (int64_t g = s.group * thread / threads; g < s.group * (thread + 1) / threads; g++)
        ok = ok && range_gradient(call, x, {g, 0, ic_group, 0, oc_group}, work);
    } else if (thread < grid.columns * grid.outputs) {
      const int64_t i = thread / grid.outputs, j = thread % grid.outputs;
      const int64_t groups = (s.ic + kGroupColumns - 1) / kGroupColumns, vectors = (s.oc + kLanes - 1) / kLanes;
      const Range range{0, groups * i / grid.columns * kGroupColumns,
                        std::min(s.ic, groups * (i + 1) / grid.columns * kGroupColumns),
                        vectors * j / grid.outputs * kLanes, std::min(s.oc, vectors * (j + 1) / grid.outputs * kLanes)};
      ok = range.c0 >= range.c1 || range.k0 >= range.k1 || range_gradient(call, x, range, work);
    }
    if (!ok) valid.store(false, std::memory_order_relaxed);
  });
  return valid;
}

}  // namespace er::ER_ISA
