// What the convolution's entry points (conv.cpp) and its engines share.
#pragma once
#include "activation.h"
#include "conv_axis.h"
#include "conv_shape.h"
#include "slope.h"
#include "weight_view.h"

namespace er::ER_ISA {

// What happens to a finished accumulator z. Forward: y = f(scale·z + shift + addend), with the kept form. Gradient:
// dx = slope·(z + addend), where the addend is dx itself, and the sum of each column of dX.
struct Finish {
  const float* scale;  // [columns] or null
  const float* shift;  // [columns] or null
  bool adds;
  int64_t addend;  // floats from any element of the result to what is added to it
  Activation act;
  int64_t keep;
  uint8_t* kept;
  int64_t kept_row;       // bytes
  Slope slope{};          // of the activation whose value dX is the gradient of
  float* sums = nullptr;  // [parts][2][sums_stride], zeros at first, or null
  int64_t sums_stride = 0;

  // Whether a gradient needs more than its store.
  bool slopes_or_sums() const { return slope.kind != SlopeKind::kOne || sums; }
  // Of a part of the rows.
  RunningSums running_sums(int64_t part) const {
    if (!sums) return {};
    float* own = sums + part * 2 * sums_stride;
    return {own, own + sums_stride};
  }
  // The last step of a gradient: columns [begin, end) of `count` rows of dX, which hold z (+ dx) and have just been
  // stored. kept[r] is the row's kept slopes (slope.row), unused without an activation; begin is a multiple of kLanes.
  __attribute__((noinline)) void finish_gradient(float* const* rows, const uint8_t* const* kept, int64_t count,
                                                 int64_t begin, int64_t end, const RunningSums& running) const {
    slope.with_kind([&](auto kind) {
      for (int64_t c = begin; c < end; c += kLanes) {
        const int64_t left = end - c;
        VecF total{};
        for (int64_t r = 0; r < count; r++) {
          VecF z = load_upto(rows[r] + c, left);
          if constexpr (kind.value != SlopeKind::kOne) {
            z = slope.times<kind.value>(z, kept[r], c, left);
            store_upto(rows[r] + c, z, left);
          }
          total += z;
        }
        if (running.sum) running.add(c, total, left);
      }
    });
  }

  // relu and clip without a kept form are two instructions on the accumulator; the others run over finished rows.
  bool clamps() const { return keep == kKeepNothing && (act.code == kActRelu || act.code == kActClip); }
  bool second_pass() const { return act.code != kActNone && !clamps(); }
  float low() const { return !clamps() ? -INFINITY : act.code == kActRelu ? 0.0f : act.alpha; }
  float high() const { return clamps() && act.code == kActClip ? act.beta : INFINITY; }

  // The second pass over `rows` rows of y from row number `row` on, columns [begin, end); begin is a multiple of 8.
  void run(float* y, int64_t cols, int64_t row, int64_t rows, int64_t begin, int64_t end) const {
    int64_t skip = keep == kKeepBits ? begin / 8 : keep == kKeepQ4 ? begin / 2 : begin * 4;
    float* at = y + row * cols + begin;
    activate_rows(act, keep, at, cols, at, cols, kept ? kept + row * kept_row + skip : nullptr, kept_row, rows,
                  end - begin);
  }
};

// A sum over taps of small matrix products with gathered rows:
//   out[s, y(j), x(i), g·n + c] = Σ_t Σ_k source[s, …, g·k_tap + k] · B_g[t·k_tap + k, c],
// B_g from the weight (forward: n output channels, k_tap input channels of a group) or its transpose, scaled
// (gradient).
struct GatherGemm {
  Axis rows_axis, cols_axis;
  int64_t samples;
  const float* source;
  int64_t source_cols;
  float* out;
  int64_t out_h, out_w, out_cols;
  int64_t group, k_tap, n;
  WeightView weight;
  int64_t kernel_w;    // tap (ky, kx) is the weight's tap ky·kernel_w + kx
  int64_t joined = 1;  // neighbouring source pixels that a tap reads: k_tap counts the channels of all
  bool gradient;       // B_g[t·k_tap + o, i] = weight[tap, i, g·k_tap + o] · weight_scale[g·k_tap + o]
  const float* weight_scale;
  Finish finish;
};
// What stands for a source pixel outside, or for all that a tap reads.
inline int64_t zero_floats(const GatherGemm& g) { return g.source_cols * g.joined; }
// Bytes of scratch that each thread needs.
uint64_t gather_gemm_scratch(const GatherGemm& g);
// The units that threads share: pool->cut() them. The parts of the rows that have running sums of their own.
int64_t gather_gemm_units(const GatherGemm& g, int threads);
int64_t gather_gemm_parts(const GatherGemm& g, int threads);
// `scratch` is this thread's, `zeros` has zero_floats() zeros. Every thread calls it with its number. Not `shared`:
// each does its own units, its number is the part of its sums.
void gather_gemm(const GatherGemm& g, ThreadPool* pool, int thread, bool shared, char* scratch, const float* zeros);

// 3×3 taps, stride and dilation 1, one group: out[s, y, x, c] = Σ source[s, y − pad_y + ky, x − pad_x + kx, k] · B[ky,
// kx, k, c]. B is the weight (forward), or turned by half a turn, transposed and scaled (gradient).
struct Winograd {
  int64_t samples, source_h, source_w, k;  // source is [samples, source_h, source_w, k]
  int64_t out_h, out_w, n;                 // out is [samples, out_h, out_w, n]
  int64_t pad_y, pad_x;
  const float* source;
  float* out;
  WeightView weight;
  bool gradient;  // B[ky, kx, k, c] = weight[2 − ky, 2 − kx, c, k] · weight_scale[k]
  const float* weight_scale;
  Finish finish;
};
// Whether it is possible for the shape and faster than gather_gemm.
bool winograd_wins(const ConvShape& s, bool gradient, int threads);
// Bytes of scratch for all threads together.
uint64_t winograd_scratch(const Winograd& w, int threads);
// Parts of the rows that have running sums of their own.
int64_t winograd_parts(const Winograd& w, int threads);
// Runs on all threads of the pool.
void winograd(const Winograd& w, ThreadPool* pool, char* scratch);

// group = ic = oc: Y[s, y, x, c] = Σ_t X[s, …, c] · W[t, c], or dX from dY, where each input position gathers the taps
// that reached it.
struct Depthwise {
  ConvShape shape;
  bool gradient;
  const float* source;  // X or dY
  const float* weight;  // [kh, kw, channels]
  float* out;           // Y or dX
  Finish finish;
};
void depthwise(const Depthwise& d, ThreadPool* pool);
// Parts of the gradient's rows that have running sums of their own.
int64_t depthwise_parts(const ConvShape& s, int threads);

}  // namespace er::ER_ISA
