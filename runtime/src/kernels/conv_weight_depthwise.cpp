// Weight gradient of a depthwise convolution: G[tap, c] = Σ X[row, c]·dY[row met through tap, c].
//
// Each column of X meets its own column of dY only, so set bits of neighbouring columns share no work: a block of at
// most 64 rows and 4 vectors of columns is decoded to a dense tile (in L1), and the taps run over it in vectors of
// columns, several taps at once unless they are dilated. (Walking the set bits was slower even where a twentieth of the
// values is kept, from a transposed copy of dY as from a padded one: the copy alone costs about as much as the
// multiply-adds here.) Threads share the blocks if they are many, since columns rarely split into strips of the same
// width, and the sums of all are added up in the end; else they share the columns.
#include <atomic>

#include "conv_weight.h"

namespace er::ER_ISA {
namespace {

constexpr int kStripVectors = 4;
constexpr int64_t kStrip = kStripVectors * kLanes;
static_assert(kStrip % kGroupColumns == 0, "a strip is whole column groups");

// Rows of an X block that meet dY through one kernel tap: rows row, row + step, … of the block (count of them, step =
// sw) meet the dY rows dy_row, dy_row + 1, …
struct TapRun {
  int64_t row, count, dy_row;
};

// n / step, n not negative. Steps are small, and a division costs as much as a few rows.
int64_t divide(int64_t n, int64_t step) { return step == 1 ? n : step == 2 ? n >> 1 : n / step; }

// The runs of tap (ky, kx) over rows [begin, end) of a sample's map, at most 64 rows, the first of which is on line iy.
// Returns their number.
int tap_runs(const ConvShape& s, int64_t sample, int64_t begin, int64_t end, int64_t iy, int64_t ky, int64_t kx,
             TapRun* runs) {
  int n = 0;
  for (int64_t row = begin, line_end; row < end; row = line_end, iy++) {
    line_end = std::min(end, (iy + 1) * s.iw);
    const int64_t y = iy + s.pt - ky * s.dh, x = row - iy * s.iw + s.pl - kx * s.dw;
    if (y < 0) continue;
    const int64_t oy = divide(y, s.sh);
    if (oy * s.sh != y || oy >= s.oh) continue;
    const int64_t ox = x < 0 ? 0 : divide(x + s.sw - 1, s.sw);  // the first that reads one of the rows
    const int64_t first = row + ox * s.sw - x;
    if (first >= line_end) continue;
    const int64_t count = std::min(divide(line_end - first + s.sw - 1, s.sw), s.ow - ox);
    if (count > 0) runs[n++] = {first - begin, count, (sample * s.oh + oy) * s.ow + ox};
  }
  return n;
}

// sum[count] += tile rows · dY rows, over the runs of one tap.
void add_tap(const TapRun* runs, int n, int64_t step, const float* tile, const float* dy, int64_t stride, int64_t count,
             float* sum) {
  for (int64_t c = 0; c < count; c += kLanes) {
    VecF part{};
    for (int r = 0; r < n; r++) {
      const float* x = tile + runs[r].row * kStrip + c;
      const float* d = dy + runs[r].dy_row * stride + c;
      for (int64_t i = 0; i < runs[r].count; i++, x += step * kStrip, d += stride)
        part += load(x) * load_upto(d, count - c);
    }
    store(sum + c, load(sum + c) + part);
  }
}

// How a line of X meets dY: its positions that meet neighbouring columns of dY through the same taps are `step` floats
// apart; those columns are `column` floats apart, and the lines of dY `line` floats.
struct LineSteps {
  int64_t step, column, line;
};

// Where the sums of tap `k` of `taps` are: the taps that meet neighbours in dY, k, k + stride, …, are neighbours.
int64_t tap_place(int64_t k, int64_t taps, int64_t stride) {
  int64_t place = divide(k, stride);
  for (int64_t other = k - place * stride; other-- > 0;) place += divide(taps - other + stride - 1, stride);
  return place;
}

// `positions` of a line, one step after the other, through kTaps taps of each of kRows kernel rows, all of which meet
// dY: their sums stay in registers. The first position meets dy[0] through the first tap, the output column before
// through the next tap, and the output line before through the next kernel row. Tap t of row r is summed at
// sum[(r · width + t) · kStrip].
template <int kRows, int kTaps>
void add_line(const float* tile, const float* dy, int64_t positions, const LineSteps& at, int64_t count, int64_t width,
              float* sum) {
  const int64_t step = at.step, column = at.column, line = at.line;
  auto run = [&](int64_t v, auto in) __attribute__((always_inline)) {
    VecF part[kRows][kTaps] = {};  // of this line: sums of sums lose less than one long sum
    const float* x = tile + v * kLanes;
    const float* d = dy + v * kLanes;
    for (int64_t i = 0; i < positions; i++, x += step, d += column) {
      const VecF value = load(x);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++)
#pragma GCC unroll 8
        for (int t = 0; t < kTaps; t++) part[r][t] += value * in(d - r * line - t * column);
    }
    for (int r = 0; r < kRows; r++)
      for (int t = 0; t < kTaps; t++) {
        float* total = sum + (r * width + t) * kStrip + v * kLanes;
        store(total, load(total) + part[r][t]);
      }
  };
  const int64_t full = count / kLanes;
  for (int64_t v = 0; v < full; v++) run(v, [](const float* p) { return load(p); });
  // Columns past the strip's end are not dY's: they would be read out of bounds, and their sums are dropped.
  const int tail = static_cast<int>(count % kLanes);
  if (tail) run(full, [tail](const float* p) { return load_partial(p, tail); });
}

constexpr int kMostTaps = 5;
constexpr int kMostSums = 10;  // that fit the registers of AVX-512 and NEON beside what they are made from
using AddLine = void (*)(const float*, const float*, int64_t, const LineSteps&, int64_t, int64_t, float*);
constexpr AddLine kAddLine[3][kMostTaps] = {
    {add_line<1, 1>, add_line<1, 2>, add_line<1, 3>, add_line<1, 4>, add_line<1, 5>},
    {add_line<2, 1>, add_line<2, 2>, add_line<2, 3>, add_line<2, 4>, add_line<2, 5>},
    {add_line<3, 1>, add_line<3, 2>, add_line<3, 3>, nullptr, nullptr},
};

// Whether add_block serves a convolution: neighbours in X that meet the same taps meet neighbours in dY.
bool has_lines(const ConvShape& s) { return s.dh == 1 && s.dw == 1 && s.kw > 1 && s.kw <= kMostTaps * s.sw; }

// All taps over the lines of a block, input positions [begin, end) of a sample. The positions of a line fall into
// classes by their remainder modulo the stride, and so do the taps that these meet. As many kernel rows at once as fit
// the registers, and for the positions at a line's ends only those taps that meet dY.
void add_block(const ConvShape& s, const float* tile, const float* dy, int64_t sample, int64_t begin, int64_t end,
               int64_t count, float* sum) {
  const LineSteps at{s.sw * kStrip, s.oc, s.ow * s.oc};
  int64_t iy = begin / s.iw;
  for (int64_t row = begin; row < end; iy++) {
    const int64_t x0 = row - iy * s.iw, x1 = std::min(s.iw, x0 + end - row);
    const float* x = tile + (row - begin - x0) * kStrip;
    row += x1 - x0;
    // Of the kernel rows ky, ky + sh, … those that meet dY.
    const int64_t oy = divide(iy + s.pt, s.sh), ky = iy + s.pt - oy * s.sh;
    const int64_t place = tap_place(ky, s.kh, s.sh), first_row = std::max<int64_t>(0, oy - s.oh + 1);
    const int64_t end_row = std::min(divide(s.kh - ky + s.sh - 1, s.sh), oy + 1);
    for (int64_t kx = 0; kx < std::min(s.sw, s.kw); kx++) {
      // Position ox·sw + kx − pl meets column ox of dY through tap kx, ox − 1 through tap kx + sw, …
      const int64_t taps = divide(s.kw - kx + s.sw - 1, s.sw), most = std::min<int64_t>(3, kMostSums / taps);
      const int64_t ox0 = divide(std::max<int64_t>(0, x0 + s.pl - kx + s.sw - 1), s.sw);
      const int64_t ox1 = divide(std::max<int64_t>(0, x1 + s.pl - kx + s.sw - 1), s.sw);
      const int64_t inner0 = std::clamp(taps - 1, ox0, ox1), inner1 = std::clamp(s.ow, inner0, ox1);
      for (int64_t j = first_row; j < end_row; j += most) {
        const AddLine* add = kAddLine[std::min(most, end_row - j) - 1];
        const float* d = dy + (sample * s.oh + oy - j) * at.line;
        float* sums = sum + ((place + j) * s.kw + tap_place(kx, s.kw, s.sw)) * kStrip;
        for (int64_t ox = ox0, next; ox < ox1; ox = next) {
          next = ox == inner0 && inner0 < inner1 ? inner1 : ox + 1;
          const int64_t first = std::max<int64_t>(0, ox - s.ow + 1), last = std::min(taps, ox + 1);
          if (first < last)
            add[last - first - 1](x + (ox * s.sw + kx - s.pl) * kStrip, d + (ox - first) * s.oc, next - ox, at, count,
                                  s.kw, sums + first * kStrip);
        }
      }
    }
  }
}

// Adds the share of a block, counted over all samples, in G of columns [begin, begin + count), at most a strip, to
// sum[taps][kStrip].
bool strip_gradient(const WeightGradient& call, const KeptReader& x, int64_t index, int64_t begin, int64_t count,
                    float* sum) {
  const ConvShape& s = call.shape;
  alignas(64) float tile[kBlockRows * kStrip], values[kGroupValues];
  const int64_t sample = index / x.at.blocks, block = index % x.at.blocks;
  for (int64_t c = 0; c < count; c += kGroupColumns)
    if (!x.tile(sample, block, begin + c, std::min(kGroupColumns, count - c), tile + c, kStrip, values)) return false;
  const int64_t row_begin = x.at.row_begin(block), row_end = x.at.row_begin(block + 1), line = row_begin / s.iw;
  if (has_lines(s)) {
    add_block(s, tile, call.dy + begin, sample, row_begin, row_end, count, sum);
    return true;
  }
  for (int64_t ky = 0; ky < s.kh; ky++)
    for (int64_t kx = 0; kx < s.kw; kx++) {
      TapRun runs[kBlockRows];
      const int n = tap_runs(s, sample, row_begin, row_end, line, ky, kx, runs);
      add_tap(runs, n, s.sw, tile, call.dy + begin, s.oc, count,
              sum + (tap_place(ky, s.kh, s.sh) * s.kw + tap_place(kx, s.kw, s.sw)) * kStrip);
    }
  return true;
}

}  // namespace

// A thread has sums of all columns: [strips][taps][kStrip].
uint64_t depthwise_weight_scratch(const ConvShape& shape, int threads) {
  const int64_t strips = (shape.ic + kStrip - 1) / kStrip;
  return static_cast<uint64_t>(threads) * static_cast<uint64_t>(strips * shape.taps() * kStrip) * sizeof(float);
}

bool depthwise_weight_run(const WeightGradient& call) {
  const KeptReader x(call.x_layout, call.x);
  const ConvShape& s = call.shape;
  const int threads = call.pool->threads();
  const int64_t strip = s.taps() * kStrip, strips = (s.ic + kStrip - 1) / kStrip, blocks = s.n * x.at.blocks;
  std::atomic<bool> valid{true};
  auto sums = [&](int thread) { return static_cast<float*>(call.scratch) + thread * strips * strip; };
  // Strip after strip of a block, so that rows of dY are read whole.
  auto gradient = [&](int64_t first, int64_t last, int64_t begin, int64_t end, int thread) {
    std::fill_n(sums(thread), (end - begin + kStrip - 1) / kStrip * strip, 0.f);
    for (int64_t i = first; i < last; i++)
      for (int64_t c = begin; c < end; c += kStrip)
        if (!strip_gradient(call, x, i, c, std::min(kStrip, end - c), sums(thread) + (c - begin) / kStrip * strip))
          return valid.store(false, std::memory_order_relaxed);
  };
  // G of columns [begin, end): the sums of `threads` threads from `thread` on.
  auto write = [&](int64_t begin, int64_t end, int thread, int threads) {
    for (int64_t c = begin; c < end; c += kStrip)
      for (int64_t tap = 0; tap < s.taps(); tap++) {
        const int64_t place = tap_place(tap / s.kw, s.kh, s.sh) * s.kw + tap_place(tap % s.kw, s.kw, s.sw);
        for (int64_t v = 0; v < std::min(kStrip, end - c); v += kLanes) {
          const int64_t at = (c - begin) / kStrip * strip + place * kStrip + v;
          VecF sum = load(sums(thread) + at);
          for (int t = thread + 1; t < thread + threads; t++) sum += load(sums(t) + at);
          store_upto(call.g + tap * s.oc + c + v, sum, end - c - v);
        }
      }
  };
  constexpr int64_t kFewest = 8;  // blocks a thread
  if (threads > 1 && blocks >= kFewest * threads) {
    call.pool->split(blocks, 1,
                     [&](int64_t first, int64_t last, int thread) { gradient(first, last, 0, s.ic, thread); });
    write(0, s.ic, 0, threads);
  } else {
    call.pool->share(s.ic, kGroupColumns, [&](int64_t begin, int64_t end, int thread) {
      gradient(0, blocks, begin, end, thread);
      write(begin, end, thread, 1);
    });
  }
  return valid;
}

}  // namespace er::ER_ISA
