// Weight gradient from float32 or bf16 by GEMM: G[taps · ic/g, oc/g] = Colᵀ·dY, where Col holds the input values that
// the output rows read.
//
// A 1×1 convolution on float32 multiplies X as it lies in memory. Of few channels (an image's), some lines are copied
// with zeros around them, where all taps of neighbouring outputs lie equally far apart. Everything else gathers (and
// widens) a tile of output rows and as many taps at once as give the GEMM enough columns. Small gradients are summed by
// each thread over its own rows, in partial sums that are added up in the order of the threads; for large ones the
// threads share the columns of Col, so that none gathers what another does, or groups, or, if there are more of them,
// output channels.
#include "conv_weight.h"
#include "product.h"

namespace er::ER_ISA {
namespace {

constexpr int64_t kTileFloats = 64 << 10;  // of gathered input a thread
constexpr int64_t kTileColumns = 512;      // wide enough for the GEMM
constexpr int64_t kMaxTileRows = 1024;
constexpr int64_t kPartialElements = 64 << 10;  // gradients up to this size are summed by rows

// Lines of X from which some lines of dY's map are met.
struct Lines {
  static constexpr int64_t kFloats = 4096;  // of them, if there is room for more than one of dY's
  int64_t count, pitch;                     // lines of dY at once; floats of a line of X

  explicit Lines(const ConvShape& s) : pitch(((s.ow - 1) * s.sw + s.kw) * s.ic) {
    count = std::clamp<int64_t>((kFloats / pitch - height(s, 1)) / s.sh + 1, 1, s.oh);
  }
  int64_t height(const ConvShape& s, int64_t lines) const { return (lines - 1) * s.sh + (s.kh - 1) * s.dh + 1; }
};

struct Shares {
  int64_t taps;       // at once: 1, or whole kernel rows
  int64_t tile_rows;  // output rows a tile
  bool direct;        // no tile: X as it lies
  bool by_rows;       // threads share output rows, else channels
  bool by_lines;      // whole lines of them

  Shares(const ConvShape& s, const PackedLayout& x) {
    const int64_t row_columns = s.kw * (s.ic / s.group);
    direct = x.form == kDense && s.pointwise();
    taps = row_columns > kTileColumns ? 1 : s.kw * std::min(s.kh, kTileColumns / row_columns);
    tile_rows = std::clamp<int64_t>(kTileFloats / (taps * (s.ic / s.group)), 16, kMaxTileRows);
    by_rows = s.w_elements() <= kPartialElements;
    by_lines = by_rows && x.form == kDense && s.joins_taps();
  }
  // Of columns [column, end) of [taps][ic/g], those that are gathered at once: whole kernel rows, or taps of one, or
  // part of a tap.
  int64_t columns_at_once(const ConvShape& s, int64_t column, int64_t end) const {
    const int64_t ic = s.ic / s.group, x = column / ic % s.kw, whole = (end - column) / ic;
    if (column % ic || !whole) return std::min(ic - column % ic, end - column);
    const int64_t most = std::min(taps, whole), rows = x ? 0 : most / s.kw;
    return ic * (rows ? rows * s.kw : std::min(most, s.kw - x));
  }
  int64_t gathered_floats(const ConvShape& s) const {
    if (by_lines) {
      const Lines lines(s);
      return (lines.height(s, lines.count) * lines.pitch + 15) / 16 * 16;
    }
    return direct ? 0 : (tile_rows * taps * (s.ic / s.group) + 15) / 16 * 16;
  }
  // Of each thread: gathered inputs, then the product's scratch.
  __attribute__((noinline)) int64_t thread_floats(const ConvShape& s) const {
    if (by_lines) return gathered_floats(s);
    const int64_t ic = s.ic / s.group, columns = direct ? ic : taps * ic;
    const int64_t rows = direct ? s.n * s.oh * s.ow : tile_rows;
    const TransposedProduct product(columns, s.oc / s.group, rows, columns, s.oc, s.oc);
    return gathered_floats(s) + (product.scratch_floats() + 15) / 16 * 16;
  }
};

inline void widen(const float* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kLanes) store_upto(out + i, load_upto(in + i, n - i), n - i);
}
inline void widen(const uint16_t* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i++) out[i] = from_bf16(in[i]);
}

// tile[row − begin][taps][ic/g] = the inputs of taps [tap, tap + taps) of output rows [begin, end), one group's
// channels; 0 outside the map.
template <class T>
void gather(const ConvShape& s, const T* x, int64_t group, int64_t tap, int64_t taps, int64_t begin, int64_t end,
            float* tile) {
  const int64_t channels = s.ic / s.group;
  const int64_t kx0 = tap % s.kw, width = std::min(taps, s.kw - kx0);  // taps of one kernel row
  const int64_t ky0 = tap / s.kw, ky1 = ky0 + taps / width;
  const bool adjacent = s.group == 1 && s.dw == 1;  // a kernel row reads one piece of memory
  int64_t ox = begin % s.ow, oy = begin / s.ow % s.oh;
  const T* image = x + begin / (s.ow * s.oh) * s.ih * s.iw * s.ic + group * channels;
  for (int64_t row = begin; row < end; row++) {
    const int64_t ix = ox * s.sw - s.pl + kx0 * s.dw;
    for (int64_t ky = ky0; ky < ky1; ky++, tile += width * channels) {
      const int64_t iy = oy * s.sh - s.pt + ky * s.dh;
      const T* line = image + iy * s.iw * s.ic;
      const bool inside = iy >= 0 && iy < s.ih;
      if (inside && adjacent && ix >= 0 && ix + width <= s.iw) {
        widen(line + ix * s.ic, width * channels, tile);
        continue;
      }
      for (int64_t j = 0; j < width; j++) {
        const int64_t column = ix + j * s.dw;
        if (inside && column >= 0 && column < s.iw)
          widen(line + column * s.ic, channels, tile + j * channels);
        else
          std::fill_n(tile + j * channels, channels, 0.f);
      }
    }
    if (++ox == s.ow) {
      ox = 0;
      if (++oy == s.oh) oy = 0, image += s.ih * s.iw * s.ic;
    }
  }
}

// tile[height][pitch] = X's lines from `first` on and its columns from −pl on, 0 outside the map.
__attribute__((noinline)) void copy_lines(const ConvShape& s, const float* image, int64_t first, int64_t height,
                                          int64_t pitch, float* tile) {
  const int64_t left = std::min(pitch, s.pl * s.ic), width = std::min(pitch - left, s.iw * s.ic);
  for (int64_t y = first; y < first + height; y++, tile += pitch) {
    if (y < 0 || y >= s.ih) {
      std::fill_n(tile, pitch, 0.f);
      continue;
    }
    std::fill_n(tile, left, 0.f);
    std::copy_n(image + y * s.iw * s.ic, width, tile + left);
    std::fill_n(tile + left + width, pitch - left - width, 0.f);
  }
}

// G of the output lines [begin, end), counted over all samples.
void lines_gradient(const WeightGradient& call, int64_t begin, int64_t end, float* tile, float* g) {
  const ConvShape& s = call.shape;
  const Lines how(s);
  const int64_t row = s.kw * s.ic;  // of the kernel
  for (int64_t line = begin; line < end;) {
    const int64_t sample = line / s.oh, y = line % s.oh, count = std::min({how.count, end - line, s.oh - y});
    copy_lines(s, static_cast<const float*>(call.x) + sample * s.ih * s.iw * s.ic, y * s.sh - s.pt,
               how.height(s, count), how.pitch, tile);
    for (int64_t j = 0; j < count; j++, line++)
      for (int64_t ky = 0; ky < s.kh; ky++)
        product(row, s.oc, s.ow, tile + (j * s.sh + ky * s.dh) * how.pitch, 1, s.sw * s.ic,
                {call.dy + line * s.ow * s.oc, s.oc, 0}, line > begin, g + ky * row * s.oc, s.oc);
  }
}

// What one thread computes: G (or a partial sum of it) over output rows, convolution groups, input and output channels
// within the group.
struct Share {
  int64_t row_begin, row_end, group_begin, group_end, c_begin, c_end, k_begin, k_end;  // c: of [taps][ic/g]
};

void share_gradient(const WeightGradient& call, const Shares& how, const Share& share, float* tile, float* g) {
  const ConvShape& s = call.shape;
  const int64_t ic = s.ic / s.group, oc = s.oc / s.group, k = share.k_end - share.k_begin;
  float* scratch = tile + how.gathered_floats(s);
  if (how.direct) {
    TransposedProduct(share.c_end - share.c_begin, k, share.row_end - share.row_begin, s.ic, s.oc, s.oc)
        .run(static_cast<const float*>(call.x) + share.row_begin * s.ic + share.c_begin,
             call.dy + share.row_begin * s.oc + share.k_begin, false, g + share.c_begin * s.oc + share.k_begin,
             scratch);
    return;
  }
  for (int64_t group = share.group_begin; group < share.group_end; group++)
    for (int64_t column = share.c_begin, columns; column < share.c_end; column += columns) {
      columns = how.columns_at_once(s, column, share.c_end);
      const int64_t tap = column / ic, c = column % ic, taps = (c + columns + ic - 1) / ic;
      for (int64_t row = share.row_begin; row < share.row_end; row += how.tile_rows) {
        const int64_t end = std::min(share.row_end, row + how.tile_rows);
        if (call.x_layout.form == kDense)
          gather(s, static_cast<const float*>(call.x), group, tap, taps, row, end, tile);
        else
          gather(s, KeptReader(call.x_layout, call.x).half_row(0), group, tap, taps, row, end, tile);
        const int64_t first = group * oc + share.k_begin;
        TransposedProduct(columns, k, end - row, taps * ic, s.oc, s.oc)
            .run(tile + c, call.dy + row * s.oc + first, row > share.row_begin, g + column * s.oc + first, scratch);
      }
    }
}

}  // namespace

void add_partials(const WeightGradient& call, float* g, const float* partials, int count) {
  const int64_t elements = call.shape.w_elements();
  call.pool->share(elements, 256, [&](int64_t begin, int64_t end, int) {
    for (int t = 0; t < count; t++)
      for (int64_t i = begin; i < end; i++) g[i] += partials[t * elements + i];
  });
}

uint64_t dense_weight_scratch(const ConvShape& s, const PackedLayout& x, int threads) {
  const Shares how(s, x);
  const int64_t partials = how.by_rows ? (threads - 1) * s.w_elements() : 0;
  return static_cast<uint64_t>(threads * how.thread_floats(s) + partials) * sizeof(float);
}

bool dense_weight_run(const WeightGradient& call) {
  const ConvShape& s = call.shape;
  const Shares how(s, call.x_layout);
  const int threads = call.pool->threads();
  const int64_t rows = s.n * s.oh * s.ow, ic = s.ic / s.group, oc = s.oc / s.group;
  float* tiles = static_cast<float*>(call.scratch);
  float* partials = tiles + threads * how.thread_floats(s);
  call.pool->run([&](int thread) {
    float* tile = tiles + thread * how.thread_floats(s);
    auto part = [&](int64_t items, int64_t grain, int64_t* begin, int64_t* end) {
      const int64_t chunks = (items + grain - 1) / grain;
      *begin = std::min(items, chunks * thread / threads * grain);
      *end = std::min(items, chunks * (thread + 1) / threads * grain);
      return *begin < *end;
    };
    Share share{0, rows, 0, s.group, 0, s.taps() * ic, 0, oc};
    if (how.by_rows) {
      float* g = thread ? partials + (thread - 1) * s.w_elements() : call.g;
      if (!part(how.by_lines ? s.n * s.oh : rows, 1, &share.row_begin, &share.row_end))
        std::fill_n(g, s.w_elements(), 0.f);
      else if (how.by_lines)
        lines_gradient(call, share.row_begin, share.row_end, tile, g);
      else
        share_gradient(call, how, share, tile, g);
      return;
    }
    const bool work = s.group > 1          ? part(s.group, 1, &share.group_begin, &share.group_end)
                      : s.taps() * ic > oc ? part(s.taps() * ic, 16, &share.c_begin, &share.c_end)
                                           : part(oc, 16, &share.k_begin, &share.k_end);
    if (work) share_gradient(call, how, share, tile, call.g);
  });
  if (how.by_rows && threads > 1) add_partials(call, call.g, partials, threads - 1);
  return true;
}

}  // namespace er::ER_ISA
