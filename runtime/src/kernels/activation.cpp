// Affine maps with activations outside of convolutions, and the backward pass of every activation from the form in
// which it was kept.
#include "activation.h"

#include <algorithm>

#include "../kernel.h"
#include "call_check.h"
#include "column_sum.h"
#include "slope.h"

namespace er::ER_ISA {
namespace {

Activation activation_of(const Call& call, uint32_t code_at) {
  return {call.ints[code_at], call.floats[0], call.floats[1]};
}

// affine: X[rows][cols], scale?[cols], shift?[cols], Y[rows][cols] = act(scale·X + shift), kept?; ints rows, cols, act,
// keep.
std::string check_affine(const Call& call) {
  CallCheck check(call, 5, 4, 2);
  const int64_t rows = check.size(0, "rows"), cols = check.size(1, "cols");
  if (check.ok()) {
    const std::string problem = activation_error(activation_of(call, 2), call.ints[3]);
    if (!problem.empty()) check.fail(problem);
  }
  const uint64_t bytes = byte_size({rows, cols});
  check.present(0, "X", bytes);
  check.optional(1, "scale", byte_size({cols}));
  check.optional(2, "shift", byte_size({cols}));
  check.present(3, "Y", bytes);
  if (check.ok() && call.ints[3] != kKeepNothing)
    check.present(4, "kept", byte_size({rows, kept_row_bytes(call.ints[3], cols)}, 1));
  return check.error();
}

bool run_affine(const Call& call) {
  const float *x = call.as<float>(0), *scale = call.as<float>(1), *shift = call.as<float>(2);
  float* y = call.as<float>(3);
  const int64_t rows = call.ints[0], cols = call.ints[1], keep = call.ints[3];
  const Activation act = activation_of(call, 2);
  const int64_t kept_stride = kept_row_bytes(keep, cols);
  uint8_t* kept = keep == kKeepNothing ? nullptr : call.as<uint8_t>(4);
  // The scaled values of a few rows go through Y while they are in the cache.
  parallel(call, rows, 2 * cols, [&](int64_t begin, int64_t end) {
    const int64_t step = std::max<int64_t>(1, 2048 / cols);
    for (int64_t first = begin; first < end; first += step) {
      const int64_t last = std::min(end, first + step);
      const float* from = x;
      if (scale || shift) {
        from = y;
        for (int64_t r = first; r < last; r++)
          for (int64_t c = 0; c < cols; c += kLanes) {
            const int64_t left = cols - c;
            VecF v = load_upto(x + r * cols + c, left);
            if (scale) v = v * load_upto(scale + c, left);
            if (shift) v = v + load_upto(shift + c, left);
            store_upto(y + r * cols + c, v, left);
          }
      }
      if (from == y && act.code == kActNone) continue;
      activate_rows(act, keep, from + first * cols, cols, y + first * cols, cols,
                    kept ? kept + first * kept_stride : nullptr, kept_stride, last - first, cols);
    }
  });
  return true;
}

// activation_grad: dY[rows][cols], kept, dX[rows][cols] = dY·f', sums?[cols] (=, or += if sum is 2) Σ over rows of dX;
// ints rows, cols, act, keep (not "nothing"), sum. Scratch: one partial sum [cols] a chunk of rows.
std::string check_grad(const Call& call) {
  CallCheck check(call, 5, 5, 2);
  const int64_t rows = check.size(0, "rows"), cols = check.size(1, "cols"), sum = check.integer(4, "sum", 0, 2);
  if (check.ok()) {
    const std::string problem = activation_error(activation_of(call, 2), call.ints[3]);
    if (!problem.empty()) check.fail(problem);
    check.require(call.ints[3] != kKeepNothing, "nothing was kept");
  }
  const uint64_t bytes = byte_size({rows, cols});
  check.present(0, "dY", bytes);
  if (check.ok()) check.present(1, "kept", byte_size({rows, kept_row_bytes(call.ints[3], cols)}, 1));
  check.present(2, "dX", bytes);
  if (sum)
    check.present(3, "sums", byte_size({cols}));
  else
    check.require(!check.ok() || !call.operands[3].data, "sums is present, but sum is 0");
  return check.error();
}

uint64_t scratch_grad(const Call& call, int) {
  if (call.n_ints != 5 || call.ints[0] < 1 || call.ints[1] < 1) return UINT64_MAX;
  const int64_t chunks = sum_chunks(call.ints[0]);
  return call.ints[4] && (chunks > 1 || call.ints[4] == 2) ? byte_size({chunks, call.ints[1]}) : 0;
}

// dX[r][c …] = times(dY[r][c …], r, c, left), summed over rows if asked.
template <class Times>
void grad_rows(const Call& call, Times&& times) {
  const float* dy = call.as<float>(0);
  float* dx = call.as<float>(2);
  const int64_t rows = call.ints[0], cols = call.ints[1];
  auto term = [&](int64_t r, int64_t c, int64_t left) __attribute__((always_inline)) {
    const VecF g = times(load_upto(dy + r * cols + c, left), r, c, left);
    store_upto(dx + r * cols + c, g, left);
    return g;
  };
  if (call.ints[4])
    return sum_rows(call, rows, cols, 1.0f, call.ints[4] == 2, call.as<float>(3), call.as<float>(4), term);
  parallel(call, rows, 2 * cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      for (int64_t c = 0; c < cols; c += kLanes) term(r, c, cols - c);
  });
}

// f' by a pointer: one copy of the loops below for all activations. A dense pre-activation is kept for smooth ones
// only, whose f' takes longer than the call.
using Derivative = VecF (*)(VecF, float, float);

Derivative derivative_of(int64_t code) {
  switch (code) {
    case kActRelu:
      return derivative<kActRelu>;
    case kActClip:
      return derivative<kActClip>;
    case kActLeakyRelu:
      return derivative<kActLeakyRelu>;
    case kActHardSigmoid:
      return derivative<kActHardSigmoid>;
    case kActHardSwish:
      return derivative<kActHardSwish>;
    case kActSigmoid:
      return derivative<kActSigmoid>;
    case kActTanh:
      return derivative<kActTanh>;
    case kActSilu:
      return derivative<kActSilu>;
    case kActGelu:
      return derivative<kActGelu>;
    default:
      return derivative<kActGeluTanh>;
  }
}

// dX = dY·f'(pre-activation).
void grad_dense(const Call& call, const Activation& act) {
  const Derivative slope = derivative_of(act.code);
  const float* x = call.as<const float>(1);
  const int64_t cols = call.ints[1];
  auto times = [=](VecF g, int64_t r, int64_t c, int64_t left) {
    return g * slope(load_upto(x + r * cols + c, left), act.alpha, act.beta);
  };
  if (call.ints[4]) return grad_rows(call, times);
  // One long row: columns may be few.
  parallel_elements(call, call.ints[0] * cols, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kLanes)
      store_upto(call.as<float>(2) + i, times(load_upto(call.as<const float>(0) + i, end - i), 0, i, end - i), end - i);
  });
}

bool run_grad(const Call& call) {
  const int64_t keep = call.ints[3];
  const Activation act = activation_of(call, 2);
  if (keep == kKeepDense) {
    grad_dense(call, act);
    return true;
  }
  const Slope slope = Slope::of(act, keep, call.as<const uint8_t>(1), call.ints[1]);
  slope.with_kind([&](auto kind) {
    grad_rows(call, [=](VecF g, int64_t r, int64_t c, int64_t left) {
      return slope.times<kind.value>(g, slope.row(r), c, left);
    });
  });
  return true;
}

}  // namespace

extern const Kernel activation_kernels[];
const Kernel activation_kernels[] = {
    {"affine", ER_CHECK(check_affine), nullptr, run_affine},
    {"activation_grad", ER_CHECK(check_grad), scratch_grad, run_grad},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
