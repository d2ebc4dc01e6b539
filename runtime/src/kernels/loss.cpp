// Losses and their gradients in one pass. Each is a mean over the valid samples of the whole batch, so a micro-batch
// adds its share; samples past the valid ones add nothing and get a gradient of 0.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "../kernel.h"
#include "../simd.h"
#include "call_check.h"

namespace er::ER_ISA {
namespace {

// Adds up body(begin, end) over [0, items) in a fixed number of parts: the same sum for every number of threads.
template <class F>
double sum_parts(const Call& call, int64_t items, int64_t floats, F&& body) {
  constexpr int64_t kParts = 64;
  double part[kParts] = {};
  parallel(call, kParts, items * floats / kParts, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++) part[p] = body(items * p / kParts, items * (p + 1) / kParts);
  });
  return std::accumulate(part, part + kParts, 0.0);
}

int64_t valid_samples(const Call& call, int64_t samples) {
  return static_cast<int64_t>(std::min<uint64_t>(call.context->valid_micro, static_cast<uint64_t>(samples)));
}

// 1 / (terms of the mean over the batch).
double mean_factor(const Call& call, int64_t terms_a_sample) {
  return 1.0 /
         (static_cast<double>(std::max<uint64_t>(call.context->valid_batch, 1)) * static_cast<double>(terms_a_sample));
}

// ---- cross_entropy: logits[samples, positions, classes], target[samples, positions] → dlogits?; label_smoothing ε,
// ---- ignore_index: a position with this target adds nothing, and the mean is over the others of the whole batch.
// ---- loss = logΣe^x − (1 − ε)·x[target] − ε·mean(x); a target that is no class makes the loss NaN.

std::string check_cross_entropy(const Call& call) {
  CallCheck check(call, 3, 4, 1);
  const int64_t samples = check.size(0, "samples"), positions = check.size(1, "positions"),
                classes = check.size(2, "classes");
  check.integer(3, "ignore_index", INT32_MIN, INT32_MAX);
  if (check.ok()) check.require(call.floats[0] >= 0 && call.floats[0] <= 1, "label_smoothing must be 0 to 1");
  check.present(0, "logits", byte_size({samples, positions, classes}));
  check.present(1, "target", byte_size({samples, positions}));
  check.optional(2, "dlogits", byte_size({samples, positions, classes}));
  return check.error();
}

// Loss of one row x[classes]; d (may be x, may be null) gets its gradient times `factor`.
double cross_entropy_row(const float* x, int64_t classes, int64_t target, float smoothing, float factor, float* d) {
  constexpr int64_t kSumRun = 32 * kLanes;  // terms summed in float32 before they go to a double
  VecF best = broadcast(-std::numeric_limits<float>::infinity());
  double total = 0;
  for (int64_t first = 0; first < classes; first += kSumRun) {
    const int64_t last = std::min(classes, first + kSumRun);
    VecF run{};
    for (int64_t i = first; i < last; i += kLanes) {
      const int64_t left = classes - i;
      const VecF v = load_upto(x + i, left);
      // Lanes past the end hold 0: right for the sum, but not for the maximum.
      best = max(left < kLanes ? select(lane_index() < static_cast<int32_t>(left), v, best) : v, best);
      run += v;
    }
    total += sum(run);
  }
  float top = best[0];
  for (int lane = 1; lane < kLanes; lane++) top = std::max(top, best[lane]);
  const float at_target = x[target];
  double sum_exps = 0;
  for (int64_t first = 0; first < classes; first += kSumRun) {
    const int64_t last = std::min(classes, first + kSumRun);
    VecF run{};
    for (int64_t i = first; i < last; i += kLanes) {
      const int64_t left = classes - i;
      VecF e = exp(load_upto(x + i, left) - top);
      if (d) store_upto(d + i, e, left);
      if (left < kLanes) e = (VecF)((lane_index() < static_cast<int32_t>(left)) & (VecI)e);
      run += e;
    }
    sum_exps += sum(run);
  }
  const double log_sum = static_cast<double>(top) + std::log(sum_exps);
  if (d) {
    const float share = static_cast<float>(factor / sum_exps),
                smooth = factor * smoothing / static_cast<float>(classes);
    for (int64_t i = 0; i < classes; i += kLanes)
      store_upto(d + i, load_upto(d + i, classes - i) * share - smooth, classes - i);
    d[target] -= factor * (1.0f - smoothing);
  }
  double loss = log_sum - (1.0 - smoothing) * at_target;
  if (smoothing > 0) loss -= smoothing * total / static_cast<double>(classes);
  return loss;
}

bool run_cross_entropy(const Call& call) {
  const int64_t samples = call.ints[0], positions = call.ints[1], classes = call.ints[2], ignored = call.ints[3];
  const float smoothing = call.floats[0];
  const float* x = call.as<float>(0);
  const int32_t* target = call.as<int32_t>(1);
  float* d = call.as<float>(2);
  const uint64_t counted = call.context->counted_batch;
  const double factor = counted ? 1.0 / static_cast<double>(counted) : mean_factor(call, positions);
  const int64_t valid = valid_samples(call, samples) * positions;
  const double loss = sum_parts(call, valid, 8 * classes, [&](int64_t begin, int64_t end) {
    double total = 0;
    for (int64_t r = begin; r < end; r++) {
      if (target[r] < 0 || target[r] >= classes) {
        if (d) std::fill(d + r * classes, d + (r + 1) * classes, 0.0f);
        if (target[r] != ignored) total = std::numeric_limits<double>::quiet_NaN();
        continue;
      }
      total += cross_entropy_row(x + r * classes, classes, target[r], smoothing, static_cast<float>(factor),
                                 d ? d + r * classes : nullptr);
    }
    return total;
  });
  if (d) std::fill(d + valid * classes, d + samples * positions * classes, 0.0f);
  call.context->loss += loss * factor;
  return std::isfinite(loss);
}

// ---- mse, bce_logits: prediction[samples, elements], target[samples, elements] → dprediction? ----

std::string check_elementwise(const Call& call) {
  CallCheck check(call, 3, 2, 0);
  const int64_t samples = check.size(0, "samples"), elements = check.size(1, "elements a sample");
  check.present(0, "prediction", byte_size({samples, elements}));
  check.present(1, "target", byte_size({samples, elements}));
  check.optional(2, "dprediction", byte_size({samples, elements}));
  return check.error();
}

// term(prediction, target, gradient) gives an element's loss and its gradient.
template <class Term>
bool elementwise(const Call& call, Term&& term) {
  const int64_t samples = call.ints[0], elements = call.ints[1];
  const float *p = call.as<float>(0), *t = call.as<float>(1);
  float* d = call.as<float>(2);
  const double factor = mean_factor(call, elements);
  const int64_t valid = valid_samples(call, samples) * elements;
  const double loss = sum_parts(call, valid, 8, [&](int64_t begin, int64_t end) {
    double total = 0;
    for (int64_t i = begin; i < end; i++) {
      double gradient;
      total += term(p[i], t[i], &gradient);
      if (d) d[i] = static_cast<float>(gradient * factor);
    }
    return total;
  });
  if (d) std::fill(d + valid, d + samples * elements, 0.0f);
  call.context->loss += loss * factor;
  return std::isfinite(loss);
}

bool run_mse(const Call& call) {
  return elementwise(call, [](double p, double t, double* gradient) {
    *gradient = 2 * (p - t);
    return (p - t) * (p - t);
  });
}

// −t·log σ(x) − (1 − t)·log(1 − σ(x)), without overflow.
bool run_bce_logits(const Call& call) {
  return elementwise(call, [](double x, double t, double* gradient) {
    const double e = std::exp(-std::fabs(x));
    *gradient = (x >= 0 ? 1.0 : e) / (1.0 + e) - t;
    return (x > 0 ? x : 0.0) - x * t + std::log1p(e);
  });
}

}  // namespace

extern const Kernel loss_kernels[];
const Kernel loss_kernels[] = {
    {"cross_entropy", ER_CHECK(check_cross_entropy), nullptr, run_cross_entropy},
    {"mse", ER_CHECK(check_elementwise), nullptr, run_mse},
    {"bce_logits", ER_CHECK(check_elementwise), nullptr, run_bce_logits},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
