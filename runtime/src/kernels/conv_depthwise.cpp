// Depthwise convolution, forward and input gradient in gather form: vectors over channels, sums of a few neighbouring
// pixels in registers. Each written row sums its own taps, so threads split rows without races. Channels are the inner
// loop, so that memory is read in order: with pixels inside, each line of cache would be a stride of all channels from
// the next.
#include "conv_paths.h"

namespace er::ER_ISA {
namespace {

// Neighbouring sums that are in registers at once, beside the taps of one kernel row.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int64_t kMostPixels = 8;
#else
constexpr int64_t kMostPixels = 4;
#endif

constexpr int64_t kCacheBytes = 512 << 10;  // of the second level, with room for others

// The pixels of one written row that share their tap columns' phase, channels [begin, end).
struct Row {
  const float* source;             // first valid source row, pixel 0
  const float* weight;             // first valid kernel row, first tap column
  float* out;                      // first written pixel
  const Axis* axis;                // of the columns
  int64_t rows;                    // valid tap rows
  int64_t row_step;                // floats between the source rows of neighbouring tap rows
  int64_t weight_row, weight_tap;  // floats between tap rows, tap columns
  int64_t pixel, out_pixel;        // floats between source pixels, written pixels
  const uint8_t* kept;             // slopes of the first written pixel
  int64_t kept_pixel;              // bytes between the slopes of written pixels
  RunningSums sums;
  int64_t begin, end;  // channels
  bool far;            // source and output do not fit the second-level cache
  const Finish* finish;
};

// What the sums of kPixels pixels become; c is the channel of `out`.
struct Store {
  VecF scale, shift, low, high;
  int64_t left, addend;
  bool adds;

  Store(const Finish& f, int64_t c, int64_t end)
      : scale(f.scale ? load_upto(f.scale + c, end - c) : broadcast(1.0f)),
        shift(f.shift ? load_upto(f.shift + c, end - c) : VecF{}),
        low(broadcast(f.low())),
        high(broadcast(f.high())),
        left(end - c),
        addend(f.addend),
        adds(f.adds) {}
  VecF finished(const float* out, VecF sum) const {
    VecF z = sum * scale + shift;
    if (adds) z += load_upto(out + addend, left);
    return min(high, max(low, z));
  }
  // The sums of kPixels pixels from pixel j on at channel c. Only the most that some_pixels has in registers are
  // finished there; otherwise every number of taps would hold a copy.
  template <int kPixels>
  __attribute__((always_inline)) void pixels(const Row& row, int64_t j, int64_t c, const VecF* sum) const {
    if constexpr (kPixels == 8) {
      if (!row.finish->slopes_or_sums()) return plain_pixels<kPixels>(row, j, c, sum);
    }
    VecF copy[kPixels];  // the address of `sum` itself would keep it out of registers
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; i++) copy[i] = sum[i];
    finish_pixels<kPixels>(row, j, c, copy);
  }

 private:
  template <int kPixels>
  __attribute__((always_inline)) void plain_pixels(const Row& row, int64_t j, int64_t c, const VecF* sum) const {
    float* out = row.out + j * row.out_pixel + c;
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; i++)
      store_upto(out + i * row.out_pixel, finished(out + i * row.out_pixel, sum[i]), left);
  }
  template <int kPixels>
  __attribute__((noinline)) void finish_pixels(const Row& row, int64_t j, int64_t c, const VecF* sum) const {
    float* out = row.out + j * row.out_pixel + c;
    if (!row.finish->slopes_or_sums()) return plain_pixels<kPixels>(row, j, c, sum);
    // Copies: a store might change what `row` refers to, for all that the compiler knows.
    const SlopeKind kind = row.finish->slope.kind;
    const int64_t out_pixel = row.out_pixel, kept_pixel = row.kept_pixel;
    const uint8_t* kept = row.kept + j * kept_pixel;
    const RunningSums sums = row.sums;
    if (kind == SlopeKind::kTwo || kind == SlopeKind::kQ4) {
      float* rows[kPixels];
      const uint8_t* slopes[kPixels];
      for (int i = 0; i < kPixels; i++) {
        rows[i] = out + i * out_pixel - c;
        slopes[i] = kept + i * kept_pixel;
        store_upto(rows[i] + c, finished(rows[i] + c, sum[i]), left);
      }
      row.finish->finish_gradient(rows, slopes, kPixels, c, c + std::min<int64_t>(left, kLanes), sums);
      return;
    }
    VecF total{};
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; i++) {
      VecF z = finished(out + i * out_pixel, sum[i]);
      if (kind == SlopeKind::kMask) z = keep_lanes(kept_bits(kept + i * kept_pixel, c, left), z);
      store_upto(out + i * out_pixel, z, left);
      total += z;
    }
    if (sums.sum) sums.add(c, total, left);
  }
};

// Any kernel: pixels [begin, end), each with the taps that it has.
void any_pixels(const Row& row, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; j++) {
    int64_t first, last;
    row.axis->tap_range(j, &first, &last);
    const float* source = row.source + (row.axis->src_start + j * row.axis->src_step) * row.pixel;
    for (int64_t c = row.begin; c < row.end; c += kLanes) {
      const int64_t left = row.end - c;
      VecF sum{};
      for (int64_t r = 0; r < row.rows; r++)
        for (int64_t t = first; t < last; t++)
          sum += load_upto(source + r * row.row_step + t * row.axis->tap_step * row.pixel + c, left) *
                 load_upto(row.weight + r * row.weight_row + t * row.weight_tap + c, left);
      Store(*row.finish, c, row.end).pixels<1>(row, j, c, &sum);
    }
  }
}

// kPixels pixels from j on, taps one source pixel apart. With kEdge some source pixels may lie outside and count as
// zeros.
template <int kTaps, int kStep, int kPixels, bool kEdge>
void some_pixels(const Row& row, int64_t j) {
  constexpr int kReach = (kPixels - 1) * kStep + kTaps;
  const int64_t x = row.axis->src_start + j * kStep;
  const int64_t low = -x, high = row.axis->source - x;  // reached pixels that exist
  auto block = [&](int64_t c, auto in) __attribute__((always_inline)) {
    VecF sum[kPixels];
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; i++) sum[i] = VecF{};
    const float* source = row.source + x * row.pixel + c;
    const float* weight = row.weight + c;
    for (int64_t r = 0; r < row.rows; r++, source += row.row_step, weight += row.weight_row) {
      VecF tap[kTaps];
#pragma GCC unroll 8
      for (int t = 0; t < kTaps; t++) tap[t] = in(weight + t * row.weight_tap);
#pragma GCC unroll 32
      for (int p = 0; p < kReach; p++) {
        if (kEdge && (p < low || p >= high)) continue;
        VecF v = in(source + p * row.pixel);
#pragma GCC unroll 8
        for (int i = 0; i < kPixels; i++)
          if (p - i * kStep >= 0 && p - i * kStep < kTaps) sum[i] += v * tap[p - i * kStep];
      }
    }
    if (row.far) {
      // The next group's new pixels of the last row, which nothing has read yet, and what it writes. Left alone, the
      // processor loses track of so many streams.
      const float* ahead = source - row.row_step + kReach * row.pixel;
      const float* out = row.out + j * row.out_pixel + c;
#pragma GCC unroll 16
      for (int i = 0; i < kPixels * kStep; i++) __builtin_prefetch(ahead + i * row.pixel);
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; i++) __builtin_prefetch(out + (kPixels + i) * row.out_pixel, 1);
    }
    Store(*row.finish, c, row.end).pixels<kPixels>(row, j, c, sum);
  };
  int64_t c = row.begin;
#if defined(__AVX512F__)  // a masked load costs what a whole one does: one code for both
  for (; c < row.end; c += kLanes) {
    const int left = static_cast<int>(std::min<int64_t>(kLanes, row.end - c));
    block(c, [left](const float* p) { return load_partial(p, left); });
  }
#else
  for (; c + kLanes <= row.end; c += kLanes) block(c, [](const float* p) { return load(p); });
  if (c <
      row.end) {  // networks have multiples of 8 channels: another unrolled copy would be code that hardly ever runs
    Row tail = row;
    tail.begin = c;
    any_pixels(tail, j, j + kPixels);
  }
#endif
}

template <int kTaps, int kStep, int kPixels>
int64_t pixels_while(const Row& row, int64_t j) {
  const int64_t reach = (kPixels - 1) * kStep + kTaps;
  for (; j + kPixels <= row.axis->count; j += kPixels) {
    const int64_t x = row.axis->src_start + j * kStep;
    // One or two are what is left at the end of a row, which mostly is an edge.
    if constexpr (kPixels > 2) {
      if (x >= 0 && x + reach <= row.axis->source) {
        some_pixels<kTaps, kStep, kPixels, false>(row, j);
        continue;
      }
    }
    some_pixels<kTaps, kStep, kPixels, true>(row, j);
  }
  return j;
}

template <int kTaps, int kStep>
void fixed_pixels(const Row& row) {
  constexpr int64_t kMost = kStep == 1 ? kMostPixels : std::min<int64_t>(kMostPixels, 4);
  int64_t j = pixels_while<kTaps, kStep, kMost>(row, 0);
  if constexpr (kMost > 4) j = pixels_while<kTaps, kStep, 4>(row, j);
  j = pixels_while<kTaps, kStep, 2>(row, j);
  pixels_while<kTaps, kStep, 1>(row, j);
}

void row_pixels(const Row& row) {
  const Axis& a = *row.axis;
  const bool adjacent = a.taps == 1 || a.tap_step == 1;
  if (adjacent && a.src_step == 1) switch (a.taps) {
      case 3:
        return fixed_pixels<3, 1>(row);
      case 5:
        return fixed_pixels<5, 1>(row);
      case 1:
        return fixed_pixels<1, 1>(row);
      case 2:
        return fixed_pixels<2, 1>(row);
#if !defined(ER_SMALL)
      case 4:
        return fixed_pixels<4, 1>(row);
      case 7:
        return fixed_pixels<7, 1>(row);
#endif
    }
  if (adjacent && a.src_step == 2) switch (a.taps) {
      case 3:
        return fixed_pixels<3, 2>(row);
      case 5:
        return fixed_pixels<5, 2>(row);
#if !defined(ER_SMALL)
      case 7:
        return fixed_pixels<7, 2>(row);
#endif
    }
  any_pixels(row, 0, a.count);
}

}  // namespace

namespace {

// Lines [line_begin, line_end) of channels [begin, end).
void some_lines(const Depthwise& d, int64_t line_begin, int64_t line_end, int64_t begin, int64_t end,
                const RunningSums& sums) {
  const ConvShape& s = d.shape;
  const Finish& f = d.finish;
  const int64_t channels = s.ic, out_h = d.gradient ? s.ih : s.oh, out_w = d.gradient ? s.iw : s.ow;
  const bool far = (s.ih * s.iw + s.oh * s.ow) * channels * int64_t{sizeof(float)} > kCacheBytes;
  // The gradient's rows and columns fall into phases of the stride, each with its own taps; the forward pass has one
  // phase.
  const int64_t row_phases = d.gradient ? s.sh : 1, column_phases = d.gradient ? std::min(s.sw, s.iw) : 1;
  for (int64_t line = line_begin; line < line_end; line++) {
    const int64_t sample = line / out_h, y = line % out_h, j = y / row_phases;
    const Axis ys = d.gradient ? gradient_axis(s.ih, s.oh, s.kh, s.sh, s.pt, s.dh, y % row_phases)
                               : forward_axis(s.ih, s.oh, s.kh, s.sh, s.pt, s.dh);
    int64_t first, last;
    ys.tap_range(j, &first, &last);
    for (int64_t phase = 0; phase < column_phases; phase++) {
      const Axis xs = d.gradient ? gradient_axis(s.iw, s.ow, s.kw, s.sw, s.pl, s.dw, phase)
                                 : forward_axis(s.iw, s.ow, s.kw, s.sw, s.pl, s.dw);
      Row row{};
      row.axis = &xs;
      row.rows = last - first;
      row.source = d.source;
      row.weight = d.weight;
      if (row.rows) {
        const int64_t source = sample * ys.source + ys.src_start + j * ys.src_step + first * ys.tap_step;
        const int64_t ky = ys.kernel_start + first * ys.kernel_step;
        row.source = d.source + source * xs.source * channels;
        row.weight = d.weight + (ky * s.kw + xs.kernel_start) * channels;
      }
      row.out = d.out + (line * out_w + xs.out_start) * channels;
      row.row_step = ys.tap_step * xs.source * channels;
      row.weight_row = ys.kernel_step * s.kw * channels;
      row.weight_tap = xs.kernel_step * channels;
      row.pixel = channels;
      row.out_pixel = xs.out_step * channels;
      row.kept = f.slope.row(line * out_w + xs.out_start);
      row.kept_pixel = xs.out_step * f.slope.row_bytes;
      row.sums = sums;
      row.begin = begin;
      row.end = end;
      row.far = far;
      row.finish = &f;
      row_pixels(row);
    }
    if (f.second_pass()) f.run(d.out, channels, line * out_w, out_w, begin, end);
  }
}

constexpr int64_t kChannelUnit = kLanes < 8 ? 8 : kLanes;  // whole bytes of kept bits, and vectors

int64_t output_lines(const ConvShape& s, bool gradient) { return s.n * (gradient ? s.ih : s.oh); }

// With few lines the threads split the channels.
bool by_lines(const ConvShape& s, bool gradient, int threads) {
  return output_lines(s, gradient) >= 16 * threads || s.ic < 2 * kChannelUnit * threads;
}

int64_t line_units(const ConvShape& s, bool gradient, int threads) {
  return std::min<int64_t>(output_lines(s, gradient), threads == 1 ? 1 : 16 * threads);
}

}  // namespace

int64_t depthwise_parts(const ConvShape& s, int threads) {
  return by_lines(s, true, threads) ? line_units(s, true, threads) : 1;
}

void depthwise(const Depthwise& d, ThreadPool* pool) {
  const ConvShape& s = d.shape;
  const int threads = pool->threads();
  const int64_t lines = output_lines(s, d.gradient), units = line_units(s, d.gradient, threads);
  if (by_lines(s, d.gradient, threads)) {
    pool->share(units, 1, [&](int64_t first, int64_t last, int) {
      for (int64_t u = first; u < last; u++)
        some_lines(d, lines * u / units, lines * (u + 1) / units, 0, s.ic, d.finish.running_sums(u));
    });
  } else {
    pool->split(s.ic, kChannelUnit, [&](int64_t begin, int64_t end, int) {
      some_lines(d, 0, lines, begin, end, d.finish.running_sums(0));
    });
  }
}

}  // namespace er::ER_ISA
