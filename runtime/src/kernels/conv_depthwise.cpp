// Depthwise convolution, forward and input gradient in gather form: vectors over channels, sums of a few neighbouring
// pixels in registers. Each written row sums its own taps, so threads split rows without races.
#include "conv_paths.h"

namespace er::ER_ISA {
namespace {

// One row of output pixels, one vector of channels.
struct Line {
  const float* source;             // channel c of source row of the first valid tap row, pixel 0
  int64_t row_step;                // floats between the source rows of neighbouring tap rows
  const float* weight;             // channel c of the first valid tap row, tap column 0
  int64_t weight_row, weight_tap;  // floats between tap rows, tap columns
  int64_t rows;                    // valid tap rows
  float* out;                      // channel c of pixel 0
  int64_t out_pixel, pixel;        // floats between neighbouring written pixels, source pixels
  const Axis* axis;
  int last;  // channels in the vector
  VecF scale, shift, low, high;
  bool accumulate;

  VecF in(const float* p) const { return last == kLanes ? load(p) : load_partial(p, last); }
  void finish(int64_t j, VecF sum) const {
    float* o = out + j * out_pixel;
    VecF z = sum * scale + shift;
    if (accumulate) z += in(o);
    z = min(high, max(low, z));
    if (last == kLanes)
      store(o, z);
    else
      store_partial(o, z, last);
  }
};

// Pixels [begin, end), each with the taps that it has.
void any_pixels(const Line& l, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; j++) {
    int64_t first, last;
    l.axis->tap_range(j, &first, &last);
    const float* x = l.source + (l.axis->src_start + j * l.axis->src_step) * l.pixel;
    VecF sum{};
    for (int64_t r = 0; r < l.rows; r++)
      for (int64_t t = first; t < last; t++)
        sum += l.in(x + r * l.row_step + t * l.axis->tap_step * l.pixel) *
               l.in(l.weight + r * l.weight_row + t * l.weight_tap);
    l.finish(j, sum);
  }
}

// Pixels [begin, end) that have all kTaps taps, whole vectors, neighbouring taps one source pixel apart.
template <int kTaps, int kStep, int kPixels>
void whole_pixels(const Line& l, int64_t begin, int64_t end) {
  constexpr int kReach = (kPixels - 1) * kStep + kTaps;
  int64_t j = begin;
  for (; j + kPixels <= end; j += kPixels) {
    VecF sum[kPixels];
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; i++) sum[i] = VecF{};
    const float* x = l.source + (l.axis->src_start + j * kStep) * l.pixel;
    const float* w = l.weight;
    for (int64_t r = 0; r < l.rows; r++, x += l.row_step, w += l.weight_row) {
      VecF tap[kTaps];
#pragma GCC unroll 8
      for (int t = 0; t < kTaps; t++) tap[t] = load(w + t * l.weight_tap);
#pragma GCC unroll 16
      for (int p = 0; p < kReach; p++) {
        VecF v = load(x + p * l.pixel);
#pragma GCC unroll 8
        for (int i = 0; i < kPixels; i++)
          if (p - i * kStep >= 0 && p - i * kStep < kTaps) sum[i] += v * tap[p - i * kStep];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; i++) l.finish(j + i, sum[i]);
  }
  any_pixels(l, j, end);
}

using Pixels = void (*)(const Line&, int64_t, int64_t);
Pixels pixels_for(const Axis& a) {
  if (a.taps > 1 && a.tap_step != 1) return any_pixels;
  if (a.src_step == 1) switch (a.taps) {
      case 1:
        return whole_pixels<1, 1, 4>;
      case 2:
        return whole_pixels<2, 1, 4>;
      case 3:
        return whole_pixels<3, 1, 4>;
      case 4:
        return whole_pixels<4, 1, 4>;
      case 5:
        return whole_pixels<5, 1, 4>;
      case 7:
        return whole_pixels<7, 1, 4>;
    }
  if (a.src_step == 2) switch (a.taps) {
      case 3:
        return whole_pixels<3, 2, 4>;
      case 5:
        return whole_pixels<5, 2, 4>;
      case 7:
        return whole_pixels<7, 2, 4>;
    }
  return any_pixels;
}

}  // namespace

void depthwise(const Depthwise& d, int thread, int threads) {
  const Axis &ys = d.rows_axis, &xs = d.cols_axis;
  const Finish& f = d.finish;
  const int64_t lines = d.samples * ys.count, channels = d.channels;
  int64_t line_begin = 0, line_end = lines, begin = 0, end = channels;
  // Few rows: split channels, in multiples of 8 (whole bytes of kept bits) and of a vector.
  constexpr int64_t unit = kLanes < 8 ? 8 : kLanes;
  if (lines >= 16 * threads || channels < 2 * unit * threads) {
    line_begin = lines * thread / threads;
    line_end = lines * (thread + 1) / threads;
  } else {
    int64_t units = (channels + unit - 1) / unit;
    begin = units * thread / threads * unit;
    end = std::min(channels, units * (thread + 1) / threads * unit);
  }
  if (xs.count == 0 || begin >= end) return;

  // Pixels [first, last) have every tap column.
  int64_t first = 0, last = xs.count;
  for (int64_t t = 0; t < xs.taps; t++) {
    int64_t low, high;
    xs.position_range(t, &low, &high);
    first = std::max(first, low);
    last = std::min(last, high);
  }
  const Pixels whole = pixels_for(xs);
  for (int64_t line = line_begin; line < line_end; line++) {
    const int64_t s = line / ys.count, j = line % ys.count;
    int64_t row_first, row_last;
    ys.tap_range(j, &row_first, &row_last);
    const int64_t y = ys.src_start + j * ys.src_step + row_first * ys.tap_step;
    const int64_t ky = ys.kernel_start + row_first * ys.kernel_step;
    float* out = d.out + ((s * d.out_h + ys.out_start + j * ys.out_step) * d.out_w + xs.out_start) * channels;
    for (int64_t c = begin; c < end; c += kLanes) {
      Line l;
      l.rows = row_last - row_first;
      l.source = l.rows ? d.source + (s * ys.source + y) * xs.source * channels + c : nullptr;
      l.row_step = ys.tap_step * xs.source * channels;
      l.weight = l.rows ? d.weight + (ky * d.kernel_w + xs.kernel_start) * channels + c : nullptr;
      l.weight_row = ys.kernel_step * d.kernel_w * channels;
      l.weight_tap = xs.kernel_step * channels;
      l.out = out + c;
      l.out_pixel = xs.out_step * channels;
      l.pixel = channels;
      l.axis = &xs;
      l.last = static_cast<int>(std::min<int64_t>(kLanes, channels - c));
      l.scale = f.scale ? load_upto(f.scale + c, channels - c) : broadcast(1.0f);
      l.shift = f.shift ? load_upto(f.shift + c, channels - c) : VecF{};
      l.low = broadcast(f.low());
      l.high = broadcast(f.high());
      l.accumulate = f.accumulate;
      if (l.last < kLanes || first >= last) {
        any_pixels(l, 0, xs.count);
      } else {
        any_pixels(l, 0, first);
        whole(l, first, last);
        any_pixels(l, last, xs.count);
      }
    }
    if (f.second_pass()) f.run(d.out, channels, line * xs.count, xs.count, begin, end);
  }
}

}  // namespace er::ER_ISA
