// Weight gradient of a depthwise convolution: G[tap, c] = Σ X[row, c]·dY[row met through tap, c].
//
// Each column of X meets its own column of dY only, so set bits of neighbouring columns share no work: a block of at
// most 64 rows and 4 vectors of columns is decoded to a dense tile (in L1), and the taps run over it in vectors of
// columns. A strip of columns is summed by one thread in the order of the blocks.
#include <atomic>

#include "conv_weight.h"

namespace er::ER_ISA {
namespace {

constexpr int kStripVectors = 4;
constexpr int64_t kStrip = kStripVectors * kLanes;
static_assert(kStrip % kGroupColumns == 0, "a strip is whole column groups");

// sum[tap][kVectors·kLanes] += tile rows · dY rows, over the runs of one tap. `left` columns are real.
template <int kVectors>
void add_tap(const TapRun* runs, int n, int64_t step, const float* tile, const float* dy, int64_t stride, int64_t left,
             float* sum) {
  constexpr int kChains =
      kVectors > 2 ? 1 : 4 / kVectors;  // independent sums that hide the latency of the multiply-add
  VecF part[kChains][kVectors] = {};
  auto add = [&](VecF* to, const float* x, const float* d) {
    for (int v = 0; v + 1 < kVectors; v++) to[v] += load(x + v * kLanes) * load(d + v * kLanes);
    constexpr int kLast = (kVectors - 1) * kLanes;
    to[kVectors - 1] += load_upto(x + kLast, left - kLast) * load_upto(d + kLast, left - kLast);
  };
  for (int r = 0; r < n; r++) {
    const float* x = tile + runs[r].row * kStrip;
    const float* d = dy + runs[r].dy_row * stride;
    int64_t i = 0;
    for (; i + kChains <= runs[r].count; i += kChains)
      for (int chain = 0; chain < kChains; chain++, x += step * kStrip, d += stride) add(part[chain], x, d);
    for (; i < runs[r].count; i++, x += step * kStrip, d += stride) add(part[0], x, d);
  }
  for (int v = 0; v < kVectors; v++) {
    VecF total = load(sum + v * kLanes);
    for (int chain = 0; chain < kChains; chain++) total += part[chain][v];
    store(sum + v * kLanes, total);
  }
}

// G of columns [begin, begin + count), at most a strip. `sum` holds taps · kStrip floats.
bool strip_gradient(const WeightGradient& call, const KeptReader& x, int64_t begin, int64_t count, float* sum) {
  static constexpr auto kTaps = {add_tap<1>, add_tap<2>, add_tap<3>, add_tap<4>};
  static_assert(kTaps.size() == kStripVectors, "one function for each number of vectors");
  const ConvShape& s = call.shape;
  const auto add = kTaps.begin()[(count + kLanes - 1) / kLanes - 1];
  alignas(64) float tile[kBlockRows * kStrip], values[kGroupValues];
  std::fill_n(sum, s.taps() * kStrip, 0.f);
  for (int64_t sample = 0; sample < s.n; sample++)
    for (int64_t block = 0; block < x.at.blocks; block++) {
      for (int64_t c = 0; c < count; c += kGroupColumns)
        if (!x.tile(sample, block, begin + c, std::min(kGroupColumns, count - c), tile + c, kStrip, values))
          return false;
      for (int64_t tap = 0; tap < s.taps(); tap++) {
        TapRun runs[kBlockRows];
        const int n =
            tap_runs(s, sample, x.at.row_begin(block), x.at.row_begin(block + 1), tap / s.kw, tap % s.kw, runs);
        add(runs, n, s.sw, tile, call.dy + begin, s.oc, count, sum + tap * kStrip);
      }
    }
  for (int64_t tap = 0; tap < s.taps(); tap++)
    std::memcpy(call.g + tap * s.oc + begin, sum + tap * kStrip, count * sizeof(float));
  return true;
}

}  // namespace

uint64_t depthwise_weight_scratch(const ConvShape& shape, int threads) {
  return static_cast<uint64_t>(threads) * shape.taps() * kStrip * sizeof(float);
}

bool depthwise_weight_run(const WeightGradient& call) {
  const KeptReader x(call.x_layout, call.x);
  const int64_t channels = call.shape.ic;
  std::atomic<bool> valid{true};
  call.pool->split(channels, kGroupColumns, [&](int64_t begin, int64_t end, int thread) {
    float* sum = static_cast<float*>(call.scratch) + thread * call.shape.taps() * kStrip;
    for (int64_t c = begin; c < end; c += kStrip)
      if (!strip_gradient(call, x, c, std::min(kStrip, end - c), sum))
        return valid.store(false, std::memory_order_relaxed);
  });
  return valid;
}

}  // namespace er::ER_ISA
