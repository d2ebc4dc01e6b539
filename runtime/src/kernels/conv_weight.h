// The ways to a convolution's weight gradient G[kh,kw,ic/g,oc] = Σ over positions of X·dY. Each has the bytes of
// scratch that it needs (for valid shapes) and a run that returns false if X's mask words point outside its values.
#pragma once
#include <algorithm>
#include <cstdint>

#include "conv_shape.h"
#include "packed_read.h"

namespace er::ER_ISA {

struct WeightGradient {
  ConvShape shape;
  PackedLayout x_layout;  // [n, ih·iw, ic]
  const void* x;
  const float* dy;  // [n, oh, ow, oc]
  float* g;
  void* scratch;
  ThreadPool* pool;
};

// X in form 0 or 1, by GEMM.
uint64_t dense_weight_scratch(const ConvShape& shape, const PackedLayout& x, int threads);
bool dense_weight_run(const WeightGradient& call);
// X in form 0, by Winograd's tiles, where that saves time.
bool winograd_weight_wins(const ConvShape& shape, const PackedLayout& x, int threads);
uint64_t winograd_weight_scratch(const ConvShape& shape, int threads);
void winograd_weight_run(const WeightGradient& call);
// X in form 2 or 3, from bitmask, values and means.
uint64_t razor_weight_scratch(const ConvShape& shape, int threads);
bool razor_weight_run(const WeightGradient& call);
// The part of G that one thread computes of that: input channels [c0, c1), c0 a multiple of kGroupColumns in its group,
// and output channels [k0, k1) of one convolution group.
struct WeightRange {
  int64_t group, c0, c1, k0, k1;
};
// The way of convolutions with several taps, a stride or padding.
uint64_t razor_taps_scratch(const ConvShape& shape, int threads);
bool razor_taps_range(const WeightGradient& call, const KeptReader& x, const WeightRange& range, int thread);
// One input and one output channel a group, X in any form.
uint64_t depthwise_weight_scratch(const ConvShape& shape, int threads);
bool depthwise_weight_run(const WeightGradient& call);

// Rows of an X block that meet dY through one kernel tap: rows row, row + step, … of the block (count of them, step =
// sw) meet the dY rows dy_row, dy_row + 1, …
struct TapRun {
  int64_t row, count, dy_row;
};

// The runs of tap (ky, kx) over rows [begin, end) of a sample's map, at most 64 rows. Returns their number.
inline int tap_runs(const ConvShape& s, int64_t sample, int64_t begin, int64_t end, int64_t ky, int64_t kx,
                    TapRun* runs) {
  if (s.kh == 1 && s.kw == 1 && s.sh == 1 && s.sw == 1 && !s.pt && !s.pl && s.oh == s.ih && s.ow == s.iw) {
    runs[0] = {0, end - begin, sample * s.oh * s.ow + begin};
    return 1;
  }
  int n = 0;
  for (int64_t row = begin, line_end; row < end; row = line_end) {
    const int64_t iy = row / s.iw, y = iy + s.pt - ky * s.dh, oy = y / s.sh;
    line_end = std::min(end, (iy + 1) * s.iw);
    if (y < 0 || oy * s.sh != y || oy >= s.oh) continue;
    const int64_t x = row - iy * s.iw + s.pl - kx * s.dw;
    const int64_t skip = x < 0 ? -x : (s.sw - x % s.sw) % s.sw;  // to the first column that an output column reads
    const int64_t ox = (x + skip) / s.sw, first = row + skip;
    const int64_t count = std::min((line_end - first + s.sw - 1) / s.sw, s.ow - ox);
    if (first < line_end && count > 0) runs[n++] = {first - begin, count, (sample * s.oh + oy) * s.ow + ox};
  }
  return n;
}

}  // namespace er::ER_ISA
