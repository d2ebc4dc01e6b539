// Activations on vectors: f, f', and the form in which the backward pass keeps what it needs (docs/plan-format.md, act
// and keep). Shared by conv (fused) and by affine and activation_grad.
#pragma once
#include <cmath>
#include <cstdint>
#include <string>

#include "../simd.h"
#include "bytes.h"

namespace er::ER_ISA {

enum ActCode : int64_t {
  kActNone = 0,
  kActRelu = 1,
  kActClip = 2,
  kActLeakyRelu = 3,
  kActHardSigmoid = 4,
  kActHardSwish = 5,
  kActSigmoid = 6,
  kActTanh = 7,
  kActSilu = 8,
  kActGelu = 9,
  kActGeluTanh = 10
};
enum KeepCode : int64_t { kKeepNothing = 0, kKeepBits = 1, kKeepQ4 = 2, kKeepDense = 3 };

struct Activation {
  int64_t code;
  float alpha, beta;
};

// What is wrong with an activation and the way it is kept, "" if nothing.
__attribute__((cold, noinline)) inline std::string activation_error(const Activation& act, int64_t keep) {
  if (act.code < kActNone || act.code > kActGeluTanh) return "unknown activation code " + std::to_string(act.code);
  if (!std::isfinite(act.alpha) || !std::isfinite(act.beta)) {
    if (act.code != kActClip || std::isnan(act.alpha) || std::isnan(act.beta)) return "alpha and beta must be finite";
  }
  if (act.code == kActClip && act.alpha > act.beta) return "clip bounds are the wrong way round";
  bool piecewise_linear = act.code >= kActRelu && act.code <= kActHardSigmoid;
  if (keep < kKeepNothing || keep > kKeepDense) return "unknown keep code " + std::to_string(keep);
  if (keep != kKeepNothing && act.code == kActNone) return "no activation needs nothing kept";
  if (keep == kKeepBits && !piecewise_linear) return "bits can be kept only for a piecewise-linear activation";
  if (keep == kKeepQ4 && (piecewise_linear || act.code == kActNone))
    return "q4 can be kept only for a smooth activation";
  return "";
}

// Bytes of a row of `cols` kept values.
inline int64_t kept_row_bytes(int64_t keep, int64_t cols) {
  switch (keep) {
    case kKeepBits:
      return (cols + 7) / 8;
    case kKeepQ4:
      return (cols + 1) / 2;
    case kKeepDense:
      return 4 * cols;
    default:
      return 0;
  }
}

// Range of f' of the smooth activations, the ends of q4's scale.
struct DerivativeRange {
  float low, high;
};
inline DerivativeRange derivative_range(int64_t code) {
  switch (code) {
    case kActHardSwish:
      return {-0.5f, 1.5f};
    case kActSigmoid:
      return {0.0f, 0.25f};
    case kActTanh:
      return {0.0f, 1.0f};
    case kActSilu:
      return {-0.0999f, 1.0999f};
    default:
      return {-0.1291f, 1.1291f};
  }
}

inline VecF sigmoid(VecF x) { return 1.0f / (1.0f + exp(-x)); }

// √(2/π)·(x + 0.044715·x³), the argument of tanh in gelu_tanh.
inline VecF gelu_tanh_argument(VecF x) { return 0.7978845608028654f * (x + 0.044715f * x * x * x); }

// f(x). NaN stays NaN for every code.
template <int64_t kCode>
inline VecF activate(VecF x, float alpha, float beta) {
  const VecF zero{}, one = broadcast(1.0f);
  if constexpr (kCode == kActRelu) return max(zero, x);
  if constexpr (kCode == kActClip) return min(broadcast(beta), max(broadcast(alpha), x));
  if constexpr (kCode == kActLeakyRelu) return select(x > zero, x, alpha * x);
  if constexpr (kCode == kActHardSigmoid) return min(one, max(zero, alpha * x + beta));
  if constexpr (kCode == kActHardSwish) return x * min(one, max(zero, x * (1.0f / 6.0f) + 0.5f));
  if constexpr (kCode == kActSigmoid) return sigmoid(x);
  if constexpr (kCode == kActTanh) return tanh(x);
  if constexpr (kCode == kActSilu) return x * sigmoid(x);
  if constexpr (kCode == kActGelu) return x * normal(x).cdf;
  if constexpr (kCode == kActGeluTanh)
    return x * sigmoid(2.0f * gelu_tanh_argument(x));  // (1 + tanh u)/2 = sigmoid(2u)
  return x;
}

// Lanes where the slope of a piecewise-linear activation is the active one: what keep = bits records.
template <int64_t kCode>
inline VecI active(VecF x, float alpha, float beta) {
  const VecF zero{};
  if constexpr (kCode == kActClip) return (x > alpha) & (x < beta);
  if constexpr (kCode == kActHardSigmoid) {
    VecF u = alpha * x + beta;
    return (u > 0.0f) & (u < 1.0f);
  }
  return x > zero;
}

// f'(x), at kinks as `active` says.
template <int64_t kCode>
inline VecF derivative(VecF x, float alpha, float beta) {
  const VecF zero{}, one = broadcast(1.0f);
  if constexpr (kCode == kActRelu || kCode == kActClip) return select(active<kCode>(x, alpha, beta), one, zero);
  if constexpr (kCode == kActLeakyRelu) return select(x > zero, one, broadcast(alpha));
  if constexpr (kCode == kActHardSigmoid) return select(active<kCode>(x, alpha, beta), broadcast(alpha), zero);
  if constexpr (kCode == kActHardSwish)
    return select(x <= -3.0f, zero, select(x < 3.0f, x * (1.0f / 3.0f) + 0.5f, one));
  if constexpr (kCode == kActSigmoid) {
    VecF s = sigmoid(x);
    return s * (1.0f - s);
  }
  if constexpr (kCode == kActTanh) {
    VecF t = tanh(x);
    return 1.0f - t * t;
  }
  if constexpr (kCode == kActSilu) {
    VecF s = sigmoid(x);
    return s + x * s * (1.0f - s);
  }
  if constexpr (kCode == kActGelu) {
    const Normal n = normal(x);
    return n.cdf + x * 0.3989422804014327f * n.bell;
  }
  if constexpr (kCode == kActGeluTanh) {
    VecF s = sigmoid(2.0f * gelu_tanh_argument(x));
    VecF slope = 2.0f * 0.7978845608028654f * (1.0f + 3.0f * 0.044715f * x * x);
    return s + x * s * (1.0f - s) * slope;
  }
  return one;
}

// Writes kLanes nibbles (kLanes/2 bytes) of q = round((d − low)·15/(high − low)), low nibble first; NaN gives 0.
// `bytes` of them are stored.
inline void store_q4(uint8_t* out, VecF d, DerivativeRange range, int64_t bytes) {
  VecF q = (d - range.low) * (15.0f / (range.high - range.low));
  q = round_even(max(min(q, broadcast(15.0f)), VecF{}));
  store_nibbles(out, to_int(q), bytes);
}

// The bits of kLanes columns starting at column c (a multiple of kLanes) of a row; `left` columns remain.
inline void store_bits(uint8_t* row, int64_t c, uint32_t word, int64_t left) {
  if constexpr (kLanes >= 8) {
    if (left < kLanes) word &= (1u << left) - 1;
    uint16_t two = static_cast<uint16_t>(word);
    if (kLanes == 16 && left > 8)
      std::memcpy(row + c / 8, &two, 2);
    else
      row[c / 8] = static_cast<uint8_t>(word);
  } else {
    if (left < kLanes) word &= (1u << left) - 1;
    if (c % 8 == 0)
      row[c / 8] = static_cast<uint8_t>(word);
    else
      row[c / 8] = static_cast<uint8_t>(row[c / 8] | word << 4);
  }
}

template <int64_t kCode, int64_t kKeep>
inline void activate_row(float alpha, float beta, const float* x, float* y, uint8_t* kept, int64_t cols) {
  auto vector = [&](int64_t c, int64_t left) __attribute__((always_inline)) {
    VecF v = load_upto(x + c, left);
    store_upto(y + c, activate<kCode>(v, alpha, beta), left);
    if constexpr (kKeep == kKeepBits) store_bits(kept, c, mask_bits(active<kCode>(v, alpha, beta)), left);
    if constexpr (kKeep == kKeepQ4) {
      VecF d = derivative<kCode>(v, alpha, beta);
      if (left < kLanes)
        d = select(lane_index() < static_cast<int32_t>(left), d, broadcast(-1.0f));  // a spare nibble is 0
      store_q4(kept + c / 2, d, derivative_range(kCode), (left + 1) / 2);
    }
    if constexpr (kKeep == kKeepDense) store_upto(reinterpret_cast<float*>(kept) + c, v, left);
  };
  for (int64_t c = 0; c < cols; c += kLanes) vector(c, cols - c);
}

// Y = f(X) and the kept form of `rows` × `cols` values. Strides are in elements for x and y (which may be the same),
// bytes for kept. `kept` points at the byte of the first column, which is a multiple of 8 within its row.
#if defined(ER_SMALL)
__attribute__((cold))  // its 22 loops, each with a few vectors in registers, are made small
#endif
__attribute__((noinline)) inline void activate_rows(const Activation& act, int64_t keep, const float* x,
                                                    int64_t x_stride, float* y, int64_t y_stride, uint8_t* kept,
                                                    int64_t kept_stride, int64_t rows, int64_t cols) {
  // Rows that follow one another without spare bits are one long row.
  const bool whole_bytes = keep == kKeepBits ? cols % 8 == 0 : keep != kKeepQ4 || cols % 2 == 0;
  if (x_stride == cols && y_stride == cols && whole_bytes && (!kept || kept_stride == kept_row_bytes(keep, cols))) {
    cols *= rows;
    rows = rows > 0;
  }
  auto all = [&](auto row) {
    for (int64_t r = 0; r < rows; r++)
      row(act.alpha, act.beta, x + r * x_stride, y + r * y_stride, kept ? kept + r * kept_stride : nullptr, cols);
  };
#define ER_LINEAR(code)                                                 \
  case code:                                                            \
    if (keep == kKeepBits) return all(activate_row<code, kKeepBits>);   \
    if (keep == kKeepDense) return all(activate_row<code, kKeepDense>); \
    return all(activate_row<code, kKeepNothing>);
#define ER_SMOOTH(code)                                                 \
  case code:                                                            \
    if (keep == kKeepQ4) return all(activate_row<code, kKeepQ4>);       \
    if (keep == kKeepDense) return all(activate_row<code, kKeepDense>); \
    return all(activate_row<code, kKeepNothing>);
  switch (act.code) {
    ER_LINEAR(kActRelu)
    ER_LINEAR(kActClip)
    ER_LINEAR(kActLeakyRelu)
    ER_LINEAR(kActHardSigmoid)
    ER_SMOOTH(kActHardSwish)
    ER_SMOOTH(kActSigmoid)
    ER_SMOOTH(kActTanh)
    ER_SMOOTH(kActSilu)
    ER_SMOOTH(kActGelu)
    ER_SMOOTH(kActGeluTanh)
    default:
      return all(activate_row<kActNone, kKeepNothing>);
  }
#undef ER_LINEAR
#undef ER_SMOOTH
}

}  // namespace er::ER_ISA
