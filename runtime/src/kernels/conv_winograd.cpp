// 3×3 convolutions of stride 1 by Winograd's minimal filtering F(2×2, 3×3) (Lavin and Gray 2016, "Fast Algorithms for
// Convolutional Neural Networks"): four results from a 4×4 window with 16 products a channel instead of 36.
//   Y = Aᵀ [(G w Gᵀ) ⊙ (Bᵀ x B)] A
// The transforms have only 0, ±1 and ±1/2, so float32 loses little; larger tiles would lose much more. The elementwise
// products over all channels are 16 matrix products, one for each point of the window.
#include "conv_paths.h"
#include "gemm_tile.h"
#include "winograd_window.h"

namespace er::ER_ISA {
namespace {

constexpr int kPoints = 16;
// Arrays a power of two apart share a set of the cache; a line between them puts an end to that.
constexpr int64_t kLine = 16;                              // floats
constexpr int64_t kWeightBytes = (2 << 20) + (128 << 10);  // of transformed weight at a time, shared by the threads
constexpr int64_t kWindowBytes = 768 << 10;                // of transformed windows at a time, a thread
constexpr int64_t kMostTiles = 48, kFewestTiles = 24;      // in a block
constexpr int64_t kFewestChannels = 32, kMostChannels = 1024;
constexpr int64_t kFewestTilesPerThread = 12;  // two register tiles

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the work is cut; the same for scratch and run. A tile is 2×2 results. The columns are cut into panels (as wide as
// the register tile), panels make chunks, whose transformed weight is in scratch at one time. A thread goes through its
// tiles in blocks, for every chunk anew: transforming a window again costs about 2% of its products with 128 columns.
struct Layout {
  int64_t tiles_x, tiles;
  int64_t vectors, panels, chunk_panels;
  int64_t k_stride, block, point_stride;  // floats, tiles, floats
  int64_t panel_width;                    // the widest, in vectors

  __attribute__((noinline)) Layout(const Winograd& w, int threads) {
    tiles_x = ceil_div(w.out_w, 2);
    tiles = w.samples * ceil_div(w.out_h, 2) * tiles_x;
    vectors = ceil_div(w.n, kLanes);
    int64_t widest = kTileVectors;
    while (widest > 1 && weight_floats(w, widest) * 4 > kWeightBytes) widest /= 2;
    panels = ceil_div(vectors, widest);
    panel_width = 0;
    for (int64_t p = 0; p < panels; p++) panel_width = std::max(panel_width, panel_start(p + 1) - panel_start(p));
    chunk_panels = std::clamp<int64_t>(kWeightBytes / (weight_floats(w, panel_width) * 4), 1, panels);
    k_stride = ceil_div(w.k, kLanes) * kLanes;
    block = std::clamp(kWindowBytes / (kPoints * k_stride * 4), kFewestTiles, kMostTiles);
    block = std::min(block, ceil_div(tiles, threads));
    point_stride = block * k_stride + kLine;
  }
  // Transformed weight of a panel of `width` vectors: [16 points][k][width·kLanes], and a cache line between the
  // points.
  static int64_t weight_stride(const Winograd& w, int64_t width) { return w.k * width * kLanes + kLine; }
  static int64_t weight_floats(const Winograd& w, int64_t width) { return kPoints * weight_stride(w, width); }
  // First vector of panel p. Panels are even in width, none is empty, and they start at multiples of 8 columns, whole
  // bytes of kept bits.
  int64_t panel_start(int64_t p) const {
    constexpr int64_t unit = kLanes < 8 ? 2 : 1;
    return std::min(vectors, ceil_div(vectors, unit) * p / panels * unit);
  }
  // Where panel `p` begins in the transformed weight of the panels from `first` on.
  int64_t weight_start(const Winograd& w, int64_t first, int64_t p) const {
    return (panel_start(p) - panel_start(first)) * kPoints * w.k * kLanes + (p - first) * kPoints * kLine;
  }
  // Products of a tile, all points of a panel.
  int64_t product_stride() const { return kPoints * panel_width * kLanes + kLine; }

  // Scratch: a row of zeros, the transformed weight, then each thread's windows, products and row pointers.
  int64_t zeros_floats() const { return ceil_div(k_stride, kLine) * kLine; }
  int64_t weight_part(const Winograd& w) const {
    int64_t most = 0;
    for (int64_t p = 0; p < panels; p += chunk_panels)
      most = std::max(most, weight_start(w, p, std::min(p + chunk_panels, panels)));
    return ceil_div(most, kLine) * kLine;
  }
  int64_t window_part() const { return ceil_div(kPoints * point_stride, kLine) * kLine; }
  int64_t product_part() const { return ceil_div(block * product_stride(), kLine) * kLine; }
  int64_t thread_bytes() const {
    return (window_part() + product_part()) * 4 + ceil_div(2 * block * int64_t{sizeof(float*)}, 64) * 64;
  }
};

// out[p·stride] = (G w Gᵀ)[p] with G = [1 0 0; ½ ½ ½; ½ −½ ½; 0 0 1].
inline void transform_weight(const VecF w[9], float* out, int64_t stride) {
  VecF t[4][3];
  for (int x = 0; x < 3; x++) {
    VecF even = 0.5f * (w[x] + w[6 + x]), odd = 0.5f * w[3 + x];
    t[0][x] = w[x];
    t[1][x] = even + odd;
    t[2][x] = even - odd;
    t[3][x] = w[6 + x];
  }
  for (int y = 0; y < 4; y++) {
    VecF even = 0.5f * (t[y][0] + t[y][2]), odd = 0.5f * t[y][1];
    store(out + (4 * y) * stride, t[y][0]);
    store(out + (4 * y + 1) * stride, even + odd);
    store(out + (4 * y + 2) * stride, even - odd);
    store(out + (4 * y + 3) * stride, t[y][2]);
  }
}

// This thread's part of the transformed weight of panels [first, last): a panel after the other, each
// [16 points][k][panel's columns], zeros past column n.
template <int64_t kForm>
void transform_weights(const Winograd& w, const Layout& l, int64_t first, int64_t last, int thread, int threads,
                       float* out) {
  const int64_t from = l.panel_start(first);
  auto place = [&](int64_t panel, int64_t vector, int64_t k, int64_t* stride) {
    const int64_t start = l.panel_start(panel), width = (l.panel_start(panel + 1) - start) * kLanes;
    *stride = w.k * width + kLine;
    return out + l.weight_start(w, first, panel) + k * width + (vector - start) * kLanes;
  };
  VecF taps9[9];
  int64_t stride;
  auto tap = [&](int t) { return w.gradient ? 8 - t : t; };  // the gradient's kernel is turned by half a turn
  if (w.weight.by_input() != w.gradient) {                   // rows of the weight are rows of B
    for (int64_t k = w.k * thread / threads; k < w.k * (thread + 1) / threads; k++) {
      const VecF scale = broadcast(w.weight_scale ? w.weight_scale[k] : 1.0f);
      for (int64_t p = first; p < last; p++)
        for (int64_t v = l.panel_start(p); v < l.panel_start(p + 1); v++) {
          const int64_t column = v * kLanes;
          for (int t = 0; t < 9; t++) {
            taps9[t] = w.weight.load<kForm>(tap(t), k, column, w.n - column);
            if (w.weight_scale) taps9[t] *= scale;
          }
          float* to = place(p, v, k, &stride);
          transform_weight(taps9, to, stride);
        }
    }
    return;
  }
  // Squares of kLanes × kLanes, those that lie behind one another in the weight's rows first.
  const int64_t deep = ceil_div(w.k, kLanes), squares = (l.panel_start(last) - from) * deep;
  int64_t panel = first;
  for (int64_t i = squares * thread / threads; i < squares * (thread + 1) / threads; i++) {
    const int64_t v = from + i / deep, k = i % deep * kLanes, left = w.k - k;
    while (v >= l.panel_start(panel + 1)) panel++;
    const VecF scale = w.weight_scale ? load_upto(w.weight_scale + k, left) : broadcast(1.0f);
    VecF square[9][kLanes];
#pragma GCC unroll 1
    for (int t = 0; t < 9; t++) {
      for (int c = 0; c < kLanes; c++) {
        const int64_t column = v * kLanes + c;
        square[t][c] = column < w.n ? w.weight.load<kForm>(tap(t), column, k, left) * scale : VecF{};
      }
      transpose(square[t]);
    }
    for (int64_t r = 0; r < std::min<int64_t>(left, kLanes); r++) {
      for (int t = 0; t < 9; t++) taps9[t] = square[t][r];
      float* to = place(panel, v, k + r, &stride);
      transform_weight(taps9, to, stride);
    }
  }
}

struct Tile {
  int64_t sample, y, x;  // of the first result
  Tile(const Winograd& w, const Layout& l, int64_t tile) {
    const int64_t tiles_y = ceil_div(w.out_h, 2);
    sample = tile / l.tiles_x / tiles_y;
    y = tile / l.tiles_x % tiles_y * 2;
    x = tile % l.tiles_x * 2;
  }
};

// out[p·point_stride + t·k_stride + k] = (Bᵀ x B)[p] with Bᵀ = [1 0 −1 0; 0 1 1 0; 0 −1 1 0; 0 1 0 −1] for `count`
// tiles.
void transform_windows(const Winograd& w, const Layout& l, int64_t tile, int64_t count, const float* zeros,
                       float* out) {
  for (int64_t i = 0; i < count; i++, out += l.k_stride) {
    const Tile at(w, l, tile + i);
    const float* rows[4][4];
    for (int64_t r = 0; r < 4; r++)
      for (int64_t c = 0; c < 4; c++) {
        const int64_t y = at.y - w.pad_y + r, x = at.x - w.pad_x + c;
        const bool inside = y >= 0 && y < w.source_h && x >= 0 && x < w.source_w;
        rows[r][c] = inside ? w.source + ((at.sample * w.source_h + y) * w.source_w + x) * w.k : zeros;
      }
    transform_window(rows, w.k, out, l.point_stride);
  }
}

// The one place where results leave: columns [column, column + kLanes) of row (pixel) `row`, `left` of them exist.
inline void write_result(const Winograd& w, VecF z, VecF scale, VecF shift, int64_t row, int64_t column, int64_t left) {
  float* y = w.out + row * w.n + column;
  z = z * scale + shift;
  if (w.finish.adds) z += load_upto(y + w.finish.addend, left);
  store_upto(y, min(broadcast(w.finish.high()), max(broadcast(w.finish.low()), z)), left);
}

// Columns of a panel of `count` tiles: Aᵀ m A with Aᵀ = [1 1 1 0; 0 1 −1 −1], then Finish.
void transform_products(const Winograd& w, const Layout& l, int64_t tile, int64_t count, int64_t start, int64_t width,
                        const float* products, const RunningSums& sums) {
  const Finish& f = w.finish;
  for (int64_t i = 0; i < count; i++, products += l.product_stride()) {
    const Tile at(w, l, tile + i);
    const int64_t row = (at.sample * w.out_h + at.y) * w.out_w + at.x;
    const bool right = at.x + 1 < w.out_w, below = at.y + 1 < w.out_h;
    for (int64_t v = 0; v < width; v++) {
      const int64_t column = (start + v) * kLanes, left = w.n - column;
      VecF t[2][4];
#pragma GCC unroll 4
      for (int c = 0; c < 4; c++) {
        const float* m = products + (c * width + v) * kLanes;
        const int64_t down = 4 * width * kLanes;
        VecF m1 = load(m + down), m2 = load(m + 2 * down);
        t[0][c] = load(m) + m1 + m2;
        t[1][c] = m1 - m2 - load(m + 3 * down);
      }
      const VecF scale = f.scale ? load_upto(f.scale + column, left) : broadcast(1.0f);
      const VecF shift = f.shift ? load_upto(f.shift + column, left) : VecF{};
      write_result(w, t[0][0] + t[0][1] + t[0][2], scale, shift, row, column, left);
      if (right) write_result(w, t[0][1] - t[0][2] - t[0][3], scale, shift, row + 1, column, left);
      if (!below) continue;
      write_result(w, t[1][0] + t[1][1] + t[1][2], scale, shift, row + w.out_w, column, left);
      if (right) write_result(w, t[1][1] - t[1][2] - t[1][3], scale, shift, row + w.out_w + 1, column, left);
    }
    if (f.slopes_or_sums()) {
      float* rows[4];
      const uint8_t* kept[4];
      int64_t n = 0;
      for (int64_t pixel = row; pixel <= row + (below ? w.out_w : 0); pixel += w.out_w)
        for (int64_t x = 0; x <= (right ? 1 : 0); x++) {
          rows[n] = w.out + (pixel + x) * w.n;
          kept[n++] = f.slope.row(pixel + x);
        }
      f.finish_gradient(rows, kept, n, start * kLanes, std::min(w.n, (start + width) * kLanes), sums);
    }
  }
  if (!f.second_pass()) return;
  for (int64_t i = 0; i < count;) {  // tiles side by side: up to two rows of results
    const Tile at(w, l, tile + i);
    const int64_t run = std::min(count - i, l.tiles_x - at.x / 2), pixels = std::min(2 * run, w.out_w - at.x);
    const int64_t row = (at.sample * w.out_h + at.y) * w.out_w + at.x;
    const int64_t begin = start * kLanes, end = std::min(w.n, (start + width) * kLanes);
    f.run(w.out, w.n, row, pixels, begin, end);
    if (at.y + 1 < w.out_h) f.run(w.out, w.n, row + w.out_w, pixels, begin, end);
    i += run;
  }
}

// A unit of tiles for threads to share: one block. Where a thread has an only block, it keeps its windows from chunk to
// chunk, and is not relieved of it.
int64_t thread_blocks(const Layout& l, int threads) { return ceil_div(ceil_div(l.tiles, threads), l.block); }

// This thread's blocks of tiles, columns of panels [first, last).
void multiply(const Winograd& w, const Layout& l, int64_t first, int64_t last, int thread, ThreadPool* pool,
              const float* weight, const float* zeros, char* scratch) {
  float* windows = reinterpret_cast<float*>(scratch);
  float* products = windows + l.window_part();
  float** results = reinterpret_cast<float**>(products + l.product_part());
  const float** sources = const_cast<const float**>(results + l.block);
  for (int64_t i = 0; i < l.block; i++) {
    sources[i] = windows + i * l.k_stride;
    results[i] = products + i * l.product_stride();
  }
  const int threads = pool->threads();
  const int64_t blocks = thread_blocks(l, threads);
  auto block = [&](int64_t unit) {
    const int64_t owner = unit / blocks, b = unit % blocks;
    const int64_t begin = l.tiles * owner / threads, end = l.tiles * (owner + 1) / threads;
    const int64_t tile = begin + (end - begin) * b / blocks, count = begin + (end - begin) * (b + 1) / blocks - tile;
    const RunningSums sums = w.finish.running_sums(threads == 1 ? 0 : unit);
    if (first == 0 || blocks > 1) transform_windows(w, l, tile, count, zeros, windows);
    for (int64_t p = first; p < last; p++) {
      const int64_t start = l.panel_start(p), width = l.panel_start(p + 1) - start;
      const float* panel = weight + l.weight_start(w, first, p);
      GemmTile t{};
      t.taps = 1;
      t.k = w.k;
      t.ldb = width * kLanes;
      t.last = kLanes;
      const int64_t pieces = ceil_div(count, gemm_tile_rows(static_cast<int>(width)));
      for (int64_t point = 0; point < kPoints; point++) {
        t.b = panel + point * l.weight_stride(w, width);
        t.a_offset = point * l.point_stride;
        t.c_offset = point * t.ldb;
        for (int64_t i = 0; i < pieces; i++) {
          const int64_t r = count * i / pieces;
          t.a = sources + r;
          t.c = results + r;
          gemm_tile(t, static_cast<int>(count * (i + 1) / pieces - r), static_cast<int>(width));
        }
      }
      transform_products(w, l, tile, count, start, width, products, sums);
    }
  };
  for (int64_t u, end; pool->next(thread, &u, &end, blocks == 1);)
    for (; u < end; u++) block(u);
}

}  // namespace

bool winograd_wins(const ConvShape& s, bool gradient, int threads) {
  if (s.kh != 3 || s.kw != 3 || s.sh != 1 || s.sw != 1 || s.dh != 1 || s.dw != 1 || s.group != 1) return false;
  if (s.pt > 2 || s.pl > 2 || std::min(s.ic, s.oc) < kFewestChannels || std::max(s.ic, s.oc) > kMostChannels)
    return false;
  const int64_t h = gradient ? s.ih : s.oh, w = gradient ? s.iw : s.ow;
  const int64_t tiles = s.n * ceil_div(h, 2) * ceil_div(w, 2), direct = 9 * s.n * h * w, products = kPoints * tiles;
  if (tiles < threads * kFewestTilesPerThread || 2 * direct < 3 * products) return false;  // odd maps waste results
  // Transforming an element of the weight costs about as much as so many products with it.
  return direct - products >= (gradient ? 400 : 160);
}

uint64_t winograd_scratch(const Winograd& w, int threads) {
  const Layout l(w, threads);
  return static_cast<uint64_t>((l.zeros_floats() + l.weight_part(w)) * 4 + l.thread_bytes() * threads);
}

int64_t winograd_parts(const Winograd& w, int threads) {
  return threads == 1 ? 1 : thread_blocks(Layout(w, threads), threads) * threads;
}

void winograd(const Winograd& w, ThreadPool* pool, char* scratch) {
  const int threads = pool->threads();
  const Layout l(w, threads);
  float* zeros = reinterpret_cast<float*>(scratch);
  float* weight = zeros + l.zeros_floats();
  char* parts = reinterpret_cast<char*>(weight + l.weight_part(w));
  std::fill_n(zeros, l.zeros_floats(), 0.0f);
  for (int64_t first = 0; first < l.panels; first += l.chunk_panels) {
    const int64_t last = std::min(first + l.chunk_panels, l.panels);
    w.weight.with_form([&](auto form) {
      pool->run([&](int thread) { transform_weights<form>(w, l, first, last, thread, threads, weight); });
    });
    pool->cut(thread_blocks(l, threads) * threads);
    pool->run([&](int thread) {
      multiply(w, l, first, last, thread, pool, weight, zeros, parts + l.thread_bytes() * thread);
    });
  }
}

}  // namespace er::ER_ISA
