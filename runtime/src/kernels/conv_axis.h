// One spatial axis of a convolution, or of its input gradient, seen from the side that is written. Both directions then
// are one loop: written position j reads source positions src_start + j·src_step + t·tap_step for taps t, where they
// exist.
#pragma once
#include <algorithm>
#include <cstdint>
#include <numeric>

namespace er::ER_ISA {

struct Axis {
  int64_t count;  // written positions: out_start + j·out_step, j < count
  int64_t out_start, out_step;
  int64_t source;  // source positions
  int64_t src_start, src_step, tap_step;
  int64_t taps, kernel_start, kernel_step;  // tap t is kernel index kernel_start + t·kernel_step

  // Taps [first, last) read inside the source for position j.
  void tap_range(int64_t j, int64_t* first, int64_t* last) const {
    range(src_start + j * src_step, tap_step, taps, first, last);
  }
  // Positions [first, last) for which tap t reads inside the source.
  void position_range(int64_t t, int64_t* first, int64_t* last) const {
    range(src_start + t * tap_step, src_step, count, first, last);
  }

 private:
  // i in [0, limit) with 0 <= start + i·step < source.
  void range(int64_t start, int64_t step, int64_t limit, int64_t* first, int64_t* last) const {
    int64_t low = start >= 0 ? 0 : (-start + step - 1) / step;
    int64_t high = start >= source ? 0 : (source - 1 - start) / step + 1;
    *first = std::min(low, limit);
    *last = std::max(*first, std::min(high, limit));
  }
};

// Y from X.
inline Axis forward_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  return {out, 0, 1, in, -pad, stride, dilation, kernel, 0, 1};
}

// dX from dY, for the input positions phase, phase + stride, … Only taps k with (phase + pad − k·dilation) divisible by
// the stride reach them; they are an arithmetic progression, taken backwards so that the source position grows with t.
// Each tap belongs to one phase.
inline Axis gradient_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation,
                          int64_t phase) {
  Axis axis{(in - phase + stride - 1) / stride, phase, stride, out, 0, 1, 1, 0, 0, -1};
  int64_t common = std::gcd(stride, dilation), period = stride / common;
  for (int64_t k = 0; k < std::min(kernel, period); k++) {
    if ((phase + pad - k * dilation) % stride) continue;
    axis.taps = (kernel - 1 - k) / period + 1;
    axis.kernel_start = k + (axis.taps - 1) * period;
    axis.kernel_step = -period;
    axis.tap_step = dilation / common;
    axis.src_start = (phase + pad - axis.kernel_start * dilation) / stride;
    break;
  }
  return axis;
}

}  // namespace er::ER_ISA
