// Convolutions as one GEMM over gathered rows (an "indirect convolution", Dukhan 2019): no column buffer, any stride,
// padding, dilation and group, forward and input gradient alike. A tile of rows keeps a table of row pointers, one per
// tap; padding points at zeros. Where a tap joins several pixels, those that reach over the edge are copied.
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
// All of B is packed once, not once a tile, up to this size, if it is narrow or leaves the cache room for a tile.
constexpr int64_t kResidentBytes = kLargeCache ? 768 << 10 : 256 << 10, kNarrowBytes = 256 << 10;
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
  int64_t copies;  // of taps that reach over the edge, at most, in a tile

  __attribute__((noinline)) explicit Layout(const GatherGemm& g) {
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
    const int64_t bytes = packed_floats(g) * 4;
    resident = bytes <= kResidentBytes && (bytes <= kNarrowBytes || bytes + tile_rows * depth * 4 <= kTileBytes);
    int64_t first, last;
    whole_taps(g).position_range(0, &first, &last);
    const int64_t line = g.cols_axis.count, over = g.joined > 1 ? line - (last - first) : 0;
    copies = std::min(tile_rows, (tile_rows / line + 2) * over) * g.rows_axis.taps;
  }
  // Whose positions are those from which a tap reads only pixels that exist.
  static Axis whole_taps(const GatherGemm& g) {
    Axis axis = g.cols_axis;
    axis.source -= g.joined - 1;
    return axis;
  }
  // Whether the weight's rows can be rows of B.
  static bool as_it_lies(const GatherGemm& g) { return !g.gradient && g.weight.by_input(); }
  // In a row's part of the table: a source a tap, the output, the kept slopes.
  int64_t pointers() const { return taps + 2; }
  int64_t table_bytes(const GatherGemm& g) const {
    const int64_t floats = copies * g.k_tap * static_cast<int64_t>(sizeof(float));
    return (tile_rows * pointers() * static_cast<int64_t>(sizeof(float*)) + floats + 63) / 64 * 64;
  }
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

// How the threads share the work: in units of some rows of a panel. Groups do not start at whole bytes of kept bits, so
// their units are whole tiles. Few rows: each thread takes all rows of some panels.
struct Units {
  bool by_panels, whole;  // whole: a unit is all panels of its rows
  int64_t tiles, chunks;  // tiles of a thread, row chunks of a tile
  int64_t panels;         // units of a chunk

  Units(const GatherGemm& g, const Layout& l, int threads) {
    constexpr int64_t kUnits = 24, kFewestRows = 128;  // of a thread, of a chunk
    by_panels = l.rows < threads * kSmallRows && g.group == 1 && l.panels >= threads;
    const int64_t rows = ceil_div(l.rows, by_panels ? 1 : threads);
    tiles = std::max<int64_t>(1, ceil_div(rows, l.tile_rows));
    whole = g.group > 1 || (g.finish.second_pass() && (l.resident || !l.pack));
    panels = whole ? 1 : l.panels;
    // A panel that is packed in several depths would be packed again for every chunk.
    const bool cut = g.group == 1 && !by_panels && (l.blocks == 1 || l.resident || !l.pack);
    const bool hot = g.finish.second_pass() && !whole;  // the second pass finds in the cache what it reads
    const int64_t most = cut ? std::max<int64_t>(1, rows / tiles / kFewestRows) : 1;
    chunks = hot ? most : threads == 1 ? 1 : std::clamp<int64_t>(kUnits / (tiles * panels), 1, most);
  }
  int64_t a_thread() const { return tiles * chunks * panels; }
  // Rows that have running sums of their own.
  int64_t parts(int threads) const { return by_panels || threads == 1 ? threads : threads * tiles * chunks; }
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
  float* copies;          // [l.copies][k_tap]

  Table(const Layout& l, char* memory)
      : sources(reinterpret_cast<const float**>(memory)),
        outputs(reinterpret_cast<float**>(memory) + l.tile_rows * l.taps),
        kept(reinterpret_cast<const uint8_t**>(memory) + l.tile_rows * (l.taps + 1)),
        copies(reinterpret_cast<float*>(reinterpret_cast<float**>(memory) + l.tile_rows * l.pointers())) {}
};

// What a tap reads that joins the pixels of a line from x on, zeros where they do not exist.
void copy_tap(const GatherGemm& g, const float* line, int64_t x, float* out) {
  for (int64_t j = 0; j < g.joined; j++, x++, out += g.source_cols)
    if (x >= 0 && x < g.cols_axis.source)
      std::copy_n(line + x * g.source_cols, g.source_cols, out);
    else
      std::fill_n(out, g.source_cols, 0.0f);
}

// The table of rows [row, row + count).
void gather(const GatherGemm& g, const Layout& l, int64_t row, int64_t count, const Table& table, const float* zeros) {
  const Axis &ys = g.rows_axis, &xs = g.cols_axis, whole = Layout::whole_taps(g);
  float* copy = table.copies;
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
        const bool exists = y >= 0 && y < ys.source;
        int64_t first = 0, last = 0;
        if (exists) whole.position_range(tx, &first, &last);
        first = std::clamp(first - i, int64_t{0}, length);
        last = std::clamp(last - i, first, length);
        const int64_t x = xs.src_start + tx * xs.tap_step + i * xs.src_step;
        auto over_the_edge = [&](int64_t r) -> const float* {
          if (!exists || g.joined == 1) return zeros;
          float* to = copy;
          copy += g.k_tap;
          copy_tap(g, g.source + (s * ys.source + y) * xs.source * g.source_cols, x + r * xs.src_step, to);
          return to;
        };
        int64_t r = 0;
        for (; r < first; r++) sources[r] = over_the_edge(r);
        if (first < last) {
          const int64_t base = ((s * ys.source + y) * xs.source + x) * g.source_cols,
                        step = xs.src_step * g.source_cols;
          for (; r < last; r++) sources[r] = g.source + (base + r * step);
        }
        for (; r < length; r++) sources[r] = over_the_edge(r);
      }
    }
    done += length;
  }
}

// The last step of a gradient for some of the table's rows, a few at a time: sums stay short.
void finish_rows(const Finish& f, const Table& table, int64_t first, int64_t last, int64_t begin, int64_t end,
                 const RunningSums& sums) {
  for (int64_t r = first; r < last; r += kTileRowsNarrow)
    f.finish_gradient(table.outputs + r, table.kept + r, std::min<int64_t>(kTileRowsNarrow, last - r), begin, end,
                      sums);
}

// One thread's part in the product.
class Multiplier {
 public:
  Multiplier(const GatherGemm& g, int thread, int threads, char* scratch, const float* zeros)
      : l(g),
        units(g, l, threads),
        g_(g),
        f_(g.finish),
        threads_(threads),
        table_(l, scratch),
        buffer_(reinterpret_cast<float*>(scratch + l.table_bytes(g))),
        zeros_(zeros),
        sums_(f_.running_sums(thread)) {
    masks_ = f_.slope.kind == SlopeKind::kMask;
    later_ = f_.slopes_or_sums() && (g.group > 1 || l.taps == 0 || !(masks_ || f_.slope.kind == SlopeKind::kOne));
  }

  // All rows of panels [first, last).
  void panels(int64_t first, int64_t last) {
    for (int64_t t = 0; t < units.tiles; t++) {
      take_rows(l.rows * t / units.tiles, l.rows * (t + 1) / units.tiles);
      run(0, count_, first, last, !l.resident || t == 0);
    }
  }

  // Unit u of all threads. `own_sums`: its rows have running sums of their own.
  void unit(int64_t u, bool own_sums) {
    const int64_t chunk = u % units.chunks, p = u / units.chunks % units.panels, t = u / units.chunks / units.panels;
    const int64_t all = g_.group * l.panels;
    if (l.resident && tile_ < 0)
      for (int64_t i = 0; i < all; i++)
        for (int64_t b = 0; b < l.blocks; b++) pack_panel(i, b);
    if (t != tile_) {
      const int64_t owner = t / units.tiles, i = t % units.tiles;
      const int64_t begin = l.rows * owner / threads_, rows = l.rows * (owner + 1) / threads_ - begin;
      take_rows(begin + rows * i / units.tiles, begin + rows * (i + 1) / units.tiles);
      tile_ = t;
    }
    if (own_sums) sums_ = f_.running_sums(t * units.chunks + chunk);
    const bool pack_panels = !l.resident && (units.whole || l.blocks > 1 || p != panel_);
    panel_ = p;
    run(count_ * chunk / units.chunks, count_ * (chunk + 1) / units.chunks, units.whole ? 0 : p,
        units.whole ? all : p + 1, pack_panels);
  }

  const Layout l;
  const Units units;

 private:
  struct Panel {
    int64_t group, start, vectors;  // start: first vector
  };
  Panel panel(int64_t p) const {
    const int64_t start = l.panel_start(p % l.panels);
    return {p / l.panels, start, l.panel_start(p % l.panels + 1) - start};
  }
  float* packed(const Panel& at, const DepthBlock& block) const {
    if (!l.resident) return buffer_;
    return buffer_ + ((at.group * l.vectors + at.start) * l.taps + at.vectors * block.tap) * g_.k_tap * kLanes +
           at.vectors * block.begin * kLanes;
  }

  void take_rows(int64_t begin, int64_t end) {
    row_ = begin, count_ = end - begin;
    gather(g_, l, row_, count_, table_, zeros_);
  }

  __attribute__((noinline)) void pack_panel(int64_t p, int64_t b) const {
    const Panel at = panel(p);
    if (!l.pack || at.vectors == 0) return;
    const DepthBlock block = depth_block(l, g_.k_tap, b);
    g_.weight.with_form(
        [&](auto form) { pack<form>(g_, at.group, block, at.start * kLanes, at.vectors, packed(at, block)); });
  }

  // Rows [begin, end) of the table by panel p, depth block b.
  __attribute__((noinline)) void multiply(int64_t begin, int64_t end, int64_t p, int64_t b) const {
    const Panel at = panel(p);
    if (at.vectors == 0) return;
    const int64_t column = at.start * kLanes, left = g_.n - column - (at.vectors - 1) * kLanes;
    const int64_t to = at.group * g_.n + column;
    const DepthBlock block = depth_block(l, g_.k_tap, b);
    GemmTile t{};
    t.ldb = l.pack ? at.vectors * kLanes : g_.weight.out;
    t.b = l.pack ? packed(at, block) : g_.weight.hwio(weight_tap(g_, block.tap), block.begin, to);
    t.a_stride = l.tile_rows;
    t.a_offset = at.group * g_.k_tap + block.begin;
    t.taps = block.taps;
    t.k = block.depth;
    t.c_offset = to;
    t.last = static_cast<int>(std::min<int64_t>(left, kLanes));
    t.partial_b = !l.pack && t.last < kLanes;
    // Every block is scaled, so that the first can add the addend, which its own sum overwrites if it is C.
    t.scale = f_.scale ? f_.scale + to : nullptr;
    t.adds = b > 0 || f_.adds;
    t.addend = b > 0 ? 0 : f_.addend;
    const bool last = b == l.blocks - 1;
    if (last) {
      t.shift = f_.shift ? f_.shift + to : nullptr;
      t.low = f_.low();
      t.high = f_.high();
      t.column = column;
      if (!later_) t.sums = sums_;
    }
    const int64_t count = end - begin, pieces = ceil_div(count, gemm_tile_rows(static_cast<int>(at.vectors)));
    for (int64_t i = 0; i < pieces; i++) {
      const int64_t r = begin + count * i / pieces;
      t.a = table_.sources + block.tap * l.tile_rows + r;
      t.c = table_.outputs + r;
      if (last && !later_ && masks_) t.kept = table_.kept + r;
      gemm_tile(t, static_cast<int>(begin + count * (i + 1) / pieces - r), static_cast<int>(at.vectors));
    }
  }

  // Rows [begin, end) of the table by panels [first, last) of all groups.
  __attribute__((noinline)) void run(int64_t begin, int64_t end, int64_t first, int64_t last, bool pack_panels) const {
    const bool all = first == 0 && last == g_.group * l.panels;
    const int64_t col_begin = all ? 0 : l.panel_start(first) * kLanes;
    const int64_t col_end = all ? g_.out_cols : std::min(g_.n, l.panel_start(last) * kLanes);
    if (l.taps == 0) {  // no output position reads these inputs
      for (int64_t r = begin; r < end && !f_.adds; r++)
        std::fill(table_.outputs[r] + col_begin, table_.outputs[r] + col_end, 0.0f);
      if (later_ && f_.adds) finish_rows(f_, table_, begin, end, col_begin, col_end, sums_);
      return;
    }
    auto block = [&](int64_t p, int64_t b) {
      if (pack_panels) pack_panel(p, b);
      multiply(begin, end, p, b);
    };
    if (l.few_rows)
      for (int64_t b = 0; b < l.blocks; b++)
        for (int64_t p = first; p < last; p++) block(p, b);
    else
      for (int64_t p = first; p < last; p++)
        for (int64_t b = 0; b < l.blocks; b++) block(p, b);
    if (f_.second_pass()) f_.run(g_.out, g_.out_cols, row_ + begin, end - begin, col_begin, col_end);
    if (later_) finish_rows(f_, table_, begin, end, col_begin, col_end, sums_);
  }

  const GatherGemm& g_;
  const Finish& f_;
  const int threads_;
  const Table table_;
  float* const buffer_;
  const float* const zeros_;
  RunningSums sums_;
  // Masks and sums are made in registers, except where the columns of a group need not start at a vector or a byte of
  // bits: then, and with other slopes, the rows get them when they are done.
  bool masks_, later_;
  int64_t tile_ = -1, row_ = 0, count_ = 0;  // what is in the table
  int64_t panel_ = -1;                       // what is in the buffer
};

}  // namespace

uint64_t gather_gemm_scratch(const GatherGemm& g) {
  Layout l(g);
  return static_cast<uint64_t>(l.table_bytes(g)) + static_cast<uint64_t>(l.buffer_floats(g)) * 4;
}

int64_t gather_gemm_units(const GatherGemm& g, int threads) {
  return Units(g, Layout(g), threads).a_thread() * threads;
}

int64_t gather_gemm_parts(const GatherGemm& g, int threads) { return Units(g, Layout(g), threads).parts(threads); }

void gather_gemm(const GatherGemm& g, ThreadPool* pool, int thread, bool shared, char* scratch, const float* zeros) {
  const int threads = pool->threads();
  Multiplier multiplier(g, thread, threads, scratch, zeros);
  const Units& units = multiplier.units;
  if (units.by_panels) {
    const int64_t panels = multiplier.l.panels, first = panels * thread / threads,
                  last = panels * (thread + 1) / threads;
    if (first < last) multiplier.panels(first, last);
    return;
  }
  int64_t u = units.a_thread() * thread, end = u + units.a_thread();
  for (bool more = !shared || pool->next(thread, &u, &end); more; more = shared && pool->next(thread, &u, &end))
    for (; u < end; u++) multiplier.unit(u, shared && threads > 1);
}

}  // namespace er::ER_ISA
