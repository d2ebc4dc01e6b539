// Convolutions as one GEMM over gathered rows (an "indirect convolution", Dukhan 2019): no column buffer, any stride,
// padding, dilation and group, forward and input gradient alike. A tile of rows keeps a table of row pointers, one per
// tap; padding points at zeros.
#include "conv_paths.h"
#include "gemm_tile.h"

namespace er::ER_ISA {
namespace {

// A sum is stored once for every depth, and a panel of B packed once for every tile: both are as long as the cache
// allows.
constexpr int64_t kMaxTileRows = kLargeCache ? 1152 : 576;
constexpr int64_t kTileBytes = kLargeCache ? 1536 << 10 : 512 << 10;  // a tile's inputs of one depth block
constexpr int64_t kTableBytes = 128 << 10;                            // row pointers of a tile
constexpr int64_t kDepth = kLargeCache ? 768 : 512;  // inner products per pass over B: 768 × 64 columns = 192 KB
constexpr int64_t kResidentBytes = 256 << 10;        // a packed B up to this size is packed once, not once a tile
constexpr int64_t kFewRowsDepth = 16;  // with few rows, all columns of so many weight rows: the weight is read in order
constexpr int64_t kAhead =
    32;  // weight rows fetched ahead while one is packed: each lies in another page, often of slow memory
constexpr int64_t kSmallRows = 32;  // with fewer rows a thread, packing B costs more than it gains

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the work is cut; the same for scratch and run.
struct Layout {
  int64_t rows, taps, tile_rows;
  int64_t vectors, panels;         // of one group
  int64_t chunks, taps_per_block;  // depth blocks: chunks of a tap, or several taps
  int64_t blocks;
  bool few_rows, pack, resident;

  explicit Layout(const GatherGemm& g) {
    rows = g.samples * g.rows_axis.count * g.cols_axis.count;
    taps = g.rows_axis.taps * g.cols_axis.taps;
    int64_t fit = kTableBytes / static_cast<int64_t>(sizeof(float*)) / pointers();
    vectors = ceil_div(g.n, kLanes);
    panels = ceil_div(vectors, kTileVectors);
    few_rows = as_it_lies(g) && g.group == 1 && rows <= kSmallRows;
    const int64_t most = few_rows ? kFewRowsDepth : kDepth;
    chunks = ceil_div(g.k_tap, most);
    taps_per_block = std::max<int64_t>(1, most / g.k_tap);
    blocks = chunks > 1 ? taps * chunks : ceil_div(taps, taps_per_block);
    const int64_t depth = std::min(most, taps * g.k_tap);
    const int64_t cached = kTileBytes / static_cast<int64_t>(sizeof(float)) / std::max<int64_t>(1, depth);
    tile_rows = std::max<int64_t>(kTileRowsNarrow, std::min({fit, kMaxTileRows, cached, rows}));
    pack = !as_it_lies(g) || (!few_rows && (panels > 1 || g.n % kLanes));
    resident = packed_floats(g) * 4 <= kResidentBytes;
  }
  // Whether the weight's rows can be rows of B.
  static bool as_it_lies(const GatherGemm& g) { return !g.gradient && g.weight.by_input(); }
  // In a row's part of the table: a source a tap, the output, the kept slopes.
  int64_t pointers() const { return taps + 2; }
  int64_t table_bytes() const { return (tile_rows * pointers() * static_cast<int64_t>(sizeof(float*)) + 63) / 64 * 64; }
  int64_t packed_floats(const GatherGemm& g) const {
    int64_t cols = vectors * kLanes;
    if (g.group > kResidentBytes / cols || taps * g.k_tap > kResidentBytes / cols / g.group) return kResidentBytes;
    return g.group * taps * g.k_tap * cols;
  }
  int64_t buffer_floats(const GatherGemm& g) const {
    if (!pack) return 0;
    if (resident) return packed_floats(g);
    int64_t depth = chunks > 1 ? ceil_div(g.k_tap, chunks) : std::min(taps, taps_per_block) * g.k_tap;
    return depth * std::min<int64_t>(vectors, kTileVectors) * kLanes;
  }
  // First vector of panel p of a group. Panels are even in width; with 4 lanes they start at multiples of two vectors,
  // so that kept bits of two panels never share a byte.
  int64_t panel_start(int64_t p) const {
    constexpr int64_t unit = kLanes < 8 ? 2 : 1;
    return std::min(vectors, ceil_div(vectors, unit) * p / panels * unit);
  }
};

struct DepthBlock {
  int64_t tap, taps, begin, depth;  // `taps` taps from `tap` on, channels [begin, begin + depth) of each
};
DepthBlock depth_block(const Layout& l, int64_t k_tap, int64_t b) {
  if (l.chunks == 1) {
    int64_t tap = b * l.taps_per_block;
    return {tap, std::min(l.taps_per_block, l.taps - tap), 0, k_tap};
  }
  int64_t chunk = b % l.chunks, begin = k_tap * chunk / l.chunks;
  return {b / l.chunks, 1, begin, k_tap * (chunk + 1) / l.chunks - begin};
}

// The weight's tap for tap t of the walk.
int64_t weight_tap(const GatherGemm& g, int64_t t) {
  int64_t ty = t / g.cols_axis.taps, tx = t % g.cols_axis.taps;
  int64_t ky = g.rows_axis.kernel_start + ty * g.rows_axis.kernel_step;
  int64_t kx = g.cols_axis.kernel_start + tx * g.cols_axis.kernel_step;
  return ky * g.kernel_w + kx;
}

// Columns [column, column + vectors·kLanes) of B's depth block, zeros past column n: [taps·depth][vectors·kLanes].
template <int64_t kForm>
void pack(const GatherGemm& g, int64_t group, const DepthBlock& block, int64_t column, int64_t vectors, float* out) {
  const int64_t ld = vectors * kLanes;
  // Of the weight; groups count output channels.
  const int64_t first_k = block.begin + (g.gradient ? group * g.k_tap : 0);
  const int64_t first_n = column + (g.gradient ? 0 : group * g.n);
  for (int64_t t = block.tap; t < block.tap + block.taps; t++, out += block.depth * ld) {
    const int64_t tap = weight_tap(g, t);
    if (g.weight.by_input() != g.gradient) {  // rows of the weight are rows of B
      for (int64_t k = 0; k < block.depth; k++) {
        const VecF scale = broadcast(g.weight_scale ? g.weight_scale[first_k + k] : 1.0f);
        for (int64_t v = 0; v < vectors; v++) {
          const int64_t c = v * kLanes;
          if (kForm == kHwio && k + kAhead < block.depth)
            __builtin_prefetch(g.weight.hwio(tap, first_k + k + kAhead, first_n + c), 0, 2);
          const VecF w = g.weight.load<kForm>(tap, first_k + k, first_n + c, g.n - column - c);
          store(out + k * ld + c, g.weight_scale ? w * scale : w);
        }
      }
      continue;
    }
    for (int64_t v = 0; v < vectors; v++) {  // outside: reads few rows of the weight at once, each in order
      for (int64_t k = 0; k < block.depth; k += kLanes) {
        const int64_t left = block.depth - k;
        VecF scale = g.weight_scale ? load_upto(g.weight_scale + first_k + k, left) : broadcast(1.0f);
        VecF square[kLanes];
        for (int i = 0; i < kLanes; i++) {
          const int64_t c = v * kLanes + i;
          square[i] = column + c < g.n ? g.weight.load<kForm>(tap, first_n + c, first_k + k, left) * scale : VecF{};
        }
        transpose(square);
        for (int i = 0; i < kLanes && i < left; i++) store(out + (k + i) * ld + v * kLanes, square[i]);
      }
    }
  }
}

// Row pointers of a tile.
struct Table {
  const float** sources;  // [t·tile_rows + r]
  float** outputs;        // [r]
  const uint8_t** kept;   // [r]

  Table(const Layout& l, char* memory)
      : sources(reinterpret_cast<const float**>(memory)),
        outputs(reinterpret_cast<float**>(memory) + l.tile_rows * l.taps),
        kept(reinterpret_cast<const uint8_t**>(memory) + l.tile_rows * (l.taps + 1)) {}
};

// The table of rows [row, row + count).
void gather(const GatherGemm& g, const Layout& l, int64_t row, int64_t count, const Table& table, const float* zeros) {
  const Axis &ys = g.rows_axis, &xs = g.cols_axis;
  for (int64_t done = 0; done < count;) {
    int64_t i = (row + done) % xs.count, line = (row + done) / xs.count;
    int64_t j = line % ys.count, s = line / ys.count, length = std::min(count - done, xs.count - i);
    const int64_t first_out = (s * g.out_h + ys.out_start + j * ys.out_step) * g.out_w + xs.out_start + i * xs.out_step;
    for (int64_t r = 0; r < length; r++) {
      table.outputs[done + r] = g.out + (first_out + r * xs.out_step) * g.out_cols;
      table.kept[done + r] = g.finish.slope.row(first_out + r * xs.out_step);
    }
    for (int64_t ty = 0; ty < ys.taps; ty++) {
      int64_t y = ys.src_start + j * ys.src_step + ty * ys.tap_step;
      for (int64_t tx = 0; tx < xs.taps; tx++) {
        const float** sources = table.sources + (ty * xs.taps + tx) * l.tile_rows + done;
        int64_t first = 0, last = 0;
        if (y >= 0 && y < ys.source) xs.position_range(tx, &first, &last);
        first = std::clamp(first - i, int64_t{0}, length);
        last = std::clamp(last - i, first, length);
        int64_t r = 0;
        for (; r < first; r++) sources[r] = zeros;
        if (first < last) {
          int64_t x = xs.src_start + tx * xs.tap_step + i * xs.src_step;
          const int64_t base = ((s * ys.source + y) * xs.source + x) * g.source_cols,
                        step = xs.src_step * g.source_cols;
          for (; r < last; r++) sources[r] = g.source + (base + r * step);
        }
        for (; r < length; r++) sources[r] = zeros;
      }
    }
    done += length;
  }
}

// The last step of a gradient for the table's rows, a few at a time: sums stay short.
void finish_rows(const Finish& f, const Table& table, int64_t count, int64_t begin, int64_t end,
                 const RunningSums& sums) {
  for (int64_t r = 0; r < count; r += kTileRowsNarrow)
    f.finish_gradient(table.outputs + r, table.kept + r, std::min<int64_t>(kTileRowsNarrow, count - r), begin, end,
                      sums);
}

}  // namespace

uint64_t gather_gemm_scratch(const GatherGemm& g) {
  Layout l(g);
  return static_cast<uint64_t>(l.table_bytes()) + static_cast<uint64_t>(l.buffer_floats(g)) * 4;
}

void gather_gemm(const GatherGemm& g, int thread, int threads, char* scratch, const float* zeros) {
  const Layout l(g);
  const Finish& f = g.finish;
  const Table table(l, scratch);
  float* buffer = reinterpret_cast<float*>(scratch + l.table_bytes());
  const RunningSums sums = f.running_sums(thread);

  // Few rows: each thread takes all rows of some panels. Groups do not start at whole bytes of kept bits, so they split
  // by rows.
  int64_t row_begin = 0, row_end = l.rows, panel_begin = 0, panel_end = g.group * l.panels;
  if (l.rows >= threads * kSmallRows || g.group > 1 || l.panels < threads) {
    row_begin = l.rows * thread / threads;
    row_end = l.rows * (thread + 1) / threads;
  } else {
    panel_begin = l.panels * thread / threads;
    panel_end = l.panels * (thread + 1) / threads;
  }
  if (row_begin == row_end || panel_begin == panel_end) return;
  const bool all = panel_begin == 0 && panel_end == g.group * l.panels;
  const int64_t col_begin = all ? 0 : l.panel_start(panel_begin) * kLanes;
  const int64_t col_end = all ? g.out_cols : std::min(g.n, l.panel_start(panel_end) * kLanes);
  // Masks and sums are made in registers, except where the columns of a group need not start at a vector or a byte of
  // bits: then, and with other slopes, the rows of a tile get them when they are done.
  const bool masks = f.slope.kind == SlopeKind::kMask;
  const bool later = f.slopes_or_sums() && (g.group > 1 || l.taps == 0 || !(masks || f.slope.kind == SlopeKind::kOne));

  const int64_t tiles = ceil_div(row_end - row_begin, l.tile_rows);
  for (int64_t tile = 0; tile < tiles; tile++) {
    const int64_t row = row_begin + (row_end - row_begin) * tile / tiles;
    const int64_t count = row_begin + (row_end - row_begin) * (tile + 1) / tiles - row;
    gather(g, l, row, count, table, zeros);
    if (l.taps == 0) {  // no output position reads these inputs
      for (int64_t r = 0; r < count && !f.accumulate; r++)
        std::fill(table.outputs[r] + col_begin, table.outputs[r] + col_end, 0.0f);
      if (later && f.accumulate) finish_rows(f, table, count, col_begin, col_end, sums);
      continue;
    }
    auto multiply = [&](int64_t p, int64_t b) {
      const int64_t group = p / l.panels, start = l.panel_start(p % l.panels);
      const int64_t vectors = l.panel_start(p % l.panels + 1) - start;
      if (vectors == 0) return;
      const int64_t column = start * kLanes, left = g.n - column - (vectors - 1) * kLanes, to = group * g.n + column;
      const DepthBlock block = depth_block(l, g.k_tap, b);
      GemmTile t{};
      if (l.pack) {
        t.ldb = vectors * kLanes;
        float* panel = buffer;
        if (l.resident)
          panel += ((group * l.vectors + start) * l.taps + vectors * block.tap) * g.k_tap * kLanes +
                   vectors * block.begin * kLanes;
        if (!l.resident || tile == 0)
          g.weight.with_form([&](auto form) { pack<form>(g, group, block, column, vectors, panel); });
        t.b = panel;
      } else {
        t.ldb = g.weight.out;
        t.b = g.weight.hwio(weight_tap(g, block.tap), block.begin, to);
      }
      t.a_stride = l.tile_rows;
      t.a_offset = group * g.k_tap + block.begin;
      t.taps = block.taps;
      t.k = block.depth;
      t.c_offset = to;
      t.last = static_cast<int>(std::min<int64_t>(left, kLanes));
      t.partial_b = !l.pack && t.last < kLanes;
      t.load_c = b > 0 || f.accumulate;
      t.finish = b == l.blocks - 1;
      t.scale = f.scale ? f.scale + to : nullptr;
      t.shift = f.shift ? f.shift + to : nullptr;
      t.low = f.low();
      t.high = f.high();
      t.column = column;
      if (!later) t.sums = sums;
      const int64_t pieces = ceil_div(count, gemm_tile_rows(static_cast<int>(vectors)));
      for (int64_t i = 0; i < pieces; i++) {
        const int64_t r = count * i / pieces;
        const int64_t rows = count * (i + 1) / pieces - r;
        t.a = table.sources + block.tap * l.tile_rows + r;
        t.c = table.outputs + r;
        if (!later && masks) t.kept = table.kept + r;
        gemm_tile(t, static_cast<int>(rows), static_cast<int>(vectors));
      }
    };
    if (l.few_rows)
      for (int64_t b = 0; b < l.blocks; b++)
        for (int64_t p = panel_begin; p < panel_end; p++) multiply(p, b);
    else
      for (int64_t p = panel_begin; p < panel_end; p++)
        for (int64_t b = 0; b < l.blocks; b++) multiply(p, b);
    if (f.second_pass()) f.run(g.out, g.out_cols, row, count, col_begin, col_end);
    if (later) finish_rows(f, table, count, col_begin, col_end, sums);
  }
}

}  // namespace er::ER_ISA
