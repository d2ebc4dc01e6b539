// Frozen batch normalization folded into a scale and a shift per channel, and the per-channel sums of its gradients.
#include <algorithm>
#include <cmath>

#include "../kernel.h"
#include "call_check.h"
#include "column_sum.h"

namespace er::ER_ISA {
namespace {

// batch_norm_fold: gamma?[c], beta?[c], mean[c], var[c], bias?[c] → scale[c] = gamma/√(var + ε), shift[c] = beta +
// (bias − mean)·scale.
std::string check_fold(const Call& call) {
  CallCheck check(call, 7, 1, 1);
  uint64_t bytes = byte_size({check.size(0, "c")});
  check.optional(0, "gamma", bytes);
  check.optional(1, "beta", bytes);
  check.present(2, "mean", bytes);
  check.present(3, "var", bytes);
  check.optional(4, "bias", bytes);
  check.present(5, "scale", bytes);
  check.present(6, "shift", bytes);
  return check.error();
}

bool run_fold(const Call& call) {
  const float *gamma = call.as<float>(0), *beta = call.as<float>(1), *mean = call.as<float>(2),
              *var = call.as<float>(3);
  const float* bias = call.as<float>(4);
  float *scale = call.as<float>(5), *shift = call.as<float>(6);
  const double epsilon = call.floats[0];
  for (int64_t c = 0; c < call.ints[0]; c++) {
    const double s = (gamma ? gamma[c] : 1.0) / std::sqrt(var[c] + epsilon);
    const double offset = (bias ? bias[c] : 0.0) - mean[c];
    scale[c] = static_cast<float>(s);
    shift[c] = static_cast<float>((beta ? beta[c] : 0.0) + offset * s);
  }
  return true;
}

// batch_norm_grad: dot[c] = Σ dY·conv(X, W), dshift[c] = Σ dY, mean[c], var[c], bias?[c] → dgamma[c].
std::string check_grad(const Call& call) {
  CallCheck check(call, 6, 1, 1);
  uint64_t bytes = byte_size({check.size(0, "c")});
  check.present(0, "dot", bytes);
  check.present(1, "dshift", bytes);
  check.present(2, "mean", bytes);
  check.present(3, "var", bytes);
  check.optional(4, "bias", bytes);
  check.present(5, "dgamma", bytes);
  return check.error();
}

bool run_grad(const Call& call) {
  const float *dot = call.as<float>(0), *dshift = call.as<float>(1), *mean = call.as<float>(2),
              *var = call.as<float>(3);
  const float* bias = call.as<float>(4);
  float* dgamma = call.as<float>(5);
  const double epsilon = call.floats[0];
  for (int64_t c = 0; c < call.ints[0]; c++) {
    const double offset = (bias ? bias[c] : 0.0) - mean[c];
    dgamma[c] = static_cast<float>((dot[c] + offset * dshift[c]) / std::sqrt(var[c] + epsilon));
  }
  return true;
}

// channel_sum: dY[rows][cols] → out[cols], or out += that if accumulate, which may be left out, is 1. Scratch: one
// partial sum [cols] a chunk of rows.
std::string check_channel_sum(const Call& call) {
  CallCheck check(call, 3, call.n_ints > 2 ? 3 : 2, 0);
  int64_t rows = check.size(0, "rows"), cols = check.size(1, "cols");
  if (call.n_ints > 2) check.integer(2, "accumulate", 0, 1);
  check.present(0, "dY", byte_size({rows, cols}));
  check.present(1, "out", byte_size({cols}));
  return check.error();
}

bool sum_is_added(const Call& call) { return call.n_ints == 3 && call.ints[2] == 1; }

uint64_t scratch_channel_sum(const Call& call, int) {
  if (call.n_ints < 2 || call.n_ints > 3 || call.ints[0] < 1 || call.ints[1] < 1) return UINT64_MAX;
  const int64_t chunks = sum_chunks(call.ints[0]);
  return chunks == 1 && !sum_is_added(call) ? 0 : byte_size({chunks, call.ints[1]});
}

bool run_channel_sum(const Call& call) {
  const int64_t rows = call.ints[0], cols = call.ints[1];
  sum_rows(call, call.as<float>(0), rows, cols, 1.0f, sum_is_added(call), call.as<float>(1), call.as<float>(2));
  return true;
}

// column_dot: W[rows][cols], G[rows][cols] → out[cols] = Σ over rows of W·G.
std::string check_column_dot(const Call& call) {
  CallCheck check(call, 3, 2, 0);
  int64_t rows = check.size(0, "rows"), cols = check.size(1, "cols");
  check.present(0, "W", byte_size({rows, cols}));
  check.present(1, "G", byte_size({rows, cols}));
  check.present(2, "out", byte_size({cols}));
  return check.error();
}

bool run_column_dot(const Call& call) {
  const float *w = call.as<float>(0), *g = call.as<float>(1);
  const int64_t rows = call.ints[0], cols = call.ints[1], tiles = (cols + 63) / 64;
  parallel(call, tiles, 2 * rows * 64, [&](int64_t begin, int64_t end) {
    sum_columns(0, rows, begin * 64, std::min(cols, end * 64), false, call.as<float>(2),
                [=](int64_t r, int64_t c, int64_t left) {
                  return load_upto(w + r * cols + c, left) * load_upto(g + r * cols + c, left);
                });
  });
  return true;
}

// scale_columns: G[rows][cols], scale[cols] → out[rows][cols] = G·scale.
std::string check_scale_columns(const Call& call) {
  CallCheck check(call, 3, 2, 0);
  int64_t rows = check.size(0, "rows"), cols = check.size(1, "cols");
  check.present(0, "G", byte_size({rows, cols}));
  check.present(1, "scale", byte_size({cols}));
  check.present(2, "out", byte_size({rows, cols}));
  return check.error();
}

bool run_scale_columns(const Call& call) {
  const float *g = call.as<float>(0), *scale = call.as<float>(1);
  float* out = call.as<float>(2);
  const int64_t rows = call.ints[0], cols = call.ints[1];
  parallel(call, rows, cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      for (int64_t c = 0; c < cols; c += kLanes)
        store_upto(out + r * cols + c, load_upto(g + r * cols + c, cols - c) * load_upto(scale + c, cols - c),
                   cols - c);
  });
  return true;
}

}  // namespace

extern const Kernel norm_kernels[];
const Kernel norm_kernels[] = {
    {"batch_norm_fold", ER_CHECK(check_fold), nullptr, run_fold},
    {"batch_norm_grad", ER_CHECK(check_grad), nullptr, run_grad},
    {"channel_sum", ER_CHECK(check_channel_sum), scratch_channel_sum, run_channel_sum},
    {"column_dot", ER_CHECK(check_column_dot), nullptr, run_column_dot},
    {"scale_columns", ER_CHECK(check_scale_columns), nullptr, run_scale_columns},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
