// Affine maps with activations outside of convolutions, and the backward pass of every activation from the form in
// which it was kept.
#include "activation.h"

#include <algorithm>

#include "../kernel.h"
#include "bytes.h"
#include "call_check.h"

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

// activation_grad: dY[rows][cols], kept, dX[rows][cols] = dY·f'; ints rows, cols, act, keep (not "nothing").
std::string check_grad(const Call& call) {
  CallCheck check(call, 3, 4, 2);
  const int64_t rows = check.size(0, "rows"), cols = check.size(1, "cols");
  if (check.ok()) {
    const std::string problem = activation_error(activation_of(call, 2), call.ints[3]);
    if (!problem.empty()) check.fail(problem);
    check.require(call.ints[3] != kKeepNothing, "nothing was kept");
  }
  const uint64_t bytes = byte_size({rows, cols});
  check.present(0, "dY", bytes);
  if (check.ok()) check.present(1, "kept", byte_size({rows, kept_row_bytes(call.ints[3], cols)}, 1));
  check.present(2, "dX", bytes);
  return check.error();
}

// The kLanes bits from column c (a multiple of kLanes) of a row of bits, of which `left` columns exist.
inline VecI kept_active(const uint8_t* row, int64_t c, int64_t left) {
  uint32_t word = row[c / 8];
  if (kLanes == 4) word >>= c % 8;
  if (kLanes == 16 && left > 8) word |= static_cast<uint32_t>(row[c / 8 + 1]) << 8;
  return bits_mask(word);
}

// dX = dY·(bit ? on : off).
void grad_bits(const Activation& act, const float* dy, const uint8_t* kept, float* dx, int64_t rows, int64_t cols) {
  const VecF on = broadcast(act.code == kActHardSigmoid ? act.alpha : 1.0f);
  const VecF off = broadcast(act.code == kActLeakyRelu ? act.alpha : 0.0f);
  const int64_t stride = kept_row_bytes(kKeepBits, cols);
  // A slope of exactly 1 or 0 lets the mask select instead of multiply; NaN gradients of inactive elements vanish, as
  // in torch.
  const bool plain = act.code == kActRelu || act.code == kActClip;
  for (int64_t r = 0; r < rows; r++, dy += cols, dx += cols, kept += stride)
    for (int64_t c = 0; c < cols; c += kLanes) {
      const int64_t left = cols - c;
      const VecI mask = kept_active(kept, c, left);
      const VecF g = load_upto(dy + c, left);
      store_upto(dx + c, plain ? (VecF)(mask & (VecI)g) : g * select(mask, on, off), left);
    }
}

// dX = dY·(low + q·(high − low)/15).
void grad_q4(const Activation& act, const float* dy, const uint8_t* kept, float* dx, int64_t rows, int64_t cols) {
  const DerivativeRange range = derivative_range(act.code);
  const float step = (range.high - range.low) / 15.0f;
  const int64_t stride = kept_row_bytes(kKeepQ4, cols);
  for (int64_t r = 0; r < rows; r++, dy += cols, dx += cols, kept += stride)
    for (int64_t c = 0; c < cols; c += kLanes) {
      const int64_t left = cols - c;
      const VecF q = to_float(load_nibbles(kept + c / 2, (left + 1) / 2));
      store_upto(dx + c, load_upto(dy + c, left) * (range.low + q * step), left);
    }
}

// dX = dY·f'(pre-activation).
template <int64_t kCode>
void grad_dense(const Activation& act, const float* dy, const float* x, float* dx, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i;
    const VecF slope = derivative<kCode>(load_upto(x + i, left), act.alpha, act.beta);
    store_upto(dx + i, load_upto(dy + i, left) * slope, left);
  }
}

void grad_dense_any(const Activation& act, const float* dy, const float* x, float* dx, int64_t n) {
  switch (act.code) {
    case kActRelu:
      return grad_dense<kActRelu>(act, dy, x, dx, n);
    case kActClip:
      return grad_dense<kActClip>(act, dy, x, dx, n);
    case kActLeakyRelu:
      return grad_dense<kActLeakyRelu>(act, dy, x, dx, n);
    case kActHardSigmoid:
      return grad_dense<kActHardSigmoid>(act, dy, x, dx, n);
    case kActHardSwish:
      return grad_dense<kActHardSwish>(act, dy, x, dx, n);
    case kActSigmoid:
      return grad_dense<kActSigmoid>(act, dy, x, dx, n);
    case kActTanh:
      return grad_dense<kActTanh>(act, dy, x, dx, n);
    case kActSilu:
      return grad_dense<kActSilu>(act, dy, x, dx, n);
    case kActGelu:
      return grad_dense<kActGelu>(act, dy, x, dx, n);
    default:
      return grad_dense<kActGeluTanh>(act, dy, x, dx, n);
  }
}

bool run_grad(const Call& call) {
  const float* dy = call.as<float>(0);
  const uint8_t* kept = call.as<uint8_t>(1);
  float* dx = call.as<float>(2);
  const int64_t rows = call.ints[0], cols = call.ints[1], keep = call.ints[3];
  const Activation act = activation_of(call, 2);
  const int64_t stride = kept_row_bytes(keep, cols);
  parallel(call, rows, 2 * cols, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * cols, n = end - begin;
    const uint8_t* from = kept + begin * stride;
    if (keep == kKeepBits)
      grad_bits(act, dy + at, from, dx + at, n, cols);
    else if (keep == kKeepQ4)
      grad_q4(act, dy + at, from, dx + at, n, cols);
    else
      grad_dense_any(act, dy + at, reinterpret_cast<const float*>(from), dx + at, n * cols);
  });
  return true;
}

}  // namespace

extern const Kernel activation_kernels[];
const Kernel activation_kernels[] = {
    {"affine", check_affine, nullptr, run_affine},
    {"activation_grad", check_grad, nullptr, run_grad},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
