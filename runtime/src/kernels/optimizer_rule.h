// What one vector of a parameter becomes: the rules that whole tensors (optimizer.cpp) and tables of rows
// (optimizer_rows.cpp) share. Both are torch's definitions.
#pragma once
#include <cmath>
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "../kernel.h"
#include "../simd.h"
#include "call_check.h"

namespace er::ER_ISA {

inline bool last_micro(const Call& call) { return call.context->micro_index + 1 >= call.context->micro_count; }

// floats: momentum, weight_decay; the momentum is operand 2.
inline void check_sgd_floats(CallCheck& check, const Call& call, bool nesterov) {
  if (!check.ok()) return;
  check.require(call.floats[0] >= 0 && call.floats[1] >= 0, "momentum and weight_decay must not be negative");
  check.require(std::isfinite(call.floats[0]) && std::isfinite(call.floats[1]),
                "momentum and weight_decay must be finite");
  check.require(!nesterov || call.operands[2].data, "nesterov needs the momentum operand");
}

// floats: beta1, beta2, epsilon, weight_decay.
inline void check_adamw_floats(CallCheck& check, const Call& call) {
  if (!check.ok()) return;
  for (int i = 0; i < 2; i++)
    check.require(call.floats[i] >= 0 && call.floats[i] < 1, "beta1 and beta2 must be in [0, 1)");
  for (int i = 2; i < 4; i++)
    check.require(call.floats[i] >= 0 && std::isfinite(call.floats[i]),
                  "epsilon and weight_decay must be finite and not negative");
}

struct Sgd {
  float mu, decay, rate;
  bool nesterov;

  Sgd(const Call& call, bool nesterov_)
      : mu(call.floats[0]), decay(call.floats[1]), rate(call.context->learning_rate), nesterov(nesterov_) {}

  // v is null without momentum.
  void update(float* w, float* v, VecF g, int64_t left) const {
    const VecF x = load_upto(w, left);
    g += decay * x;
    if (v) {
      const VecF velocity = mu * load_upto(v, left) + g;
      store_upto(v, velocity, left);
      g = nesterov ? g + mu * velocity : velocity;
    }
    store_upto(w, x - rate * g, left);
  }
};

// Written out, since errno keeps compilers from making one instruction of a loop over std::sqrt (and the masked form,
// since GCC 12 warns of its own header in the other one).
inline VecF sqrt(VecF v) {
#if ER_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (VecF)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);
#elif ER_VECTOR_BYTES == 32 && defined(__AVX__)
  return (VecF)_mm256_sqrt_ps((__m256)v);
#elif ER_VECTOR_BYTES == 16 && defined(__SSE2__)
  return (VecF)_mm_sqrt_ps((__m128)v);
#elif ER_VECTOR_BYTES == 16 && defined(__ARM_NEON)
  return (VecF)vsqrtq_f32((float32x4_t)v);
#else
  for (int i = 0; i < kLanes; i++) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

struct AdamW {
  float decay, step, root, b1, b2, epsilon, rest1, rest2;

  explicit AdamW(const Call& call) {
    const float* floats = call.floats;
    const double t = static_cast<double>(call.context->update), rate = call.context->learning_rate;
    const double beta1 = floats[0], beta2 = floats[1];
    decay = static_cast<float>(rate * floats[3]);
    step = static_cast<float>(rate / (1.0 - std::pow(beta1, t)));
    root = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, t)));
    b1 = floats[0], b2 = floats[1], epsilon = floats[2];
    rest1 = static_cast<float>(1.0 - beta1), rest2 = static_cast<float>(1.0 - beta2);
  }

  void update(float* w, float* m, float* v, VecF g, int64_t left) const {
    const VecF first = b1 * load_upto(m, left) + rest1 * g;
    const VecF second = b2 * load_upto(v, left) + rest2 * (g * g);
    store_upto(m, first, left);
    store_upto(v, second, left);
    const VecF x = load_upto(w, left);
    // Decay and step are added up first: the parameter, the largest of the three, is rounded once.
    store_upto(w, x - (decay * x + step * first / (sqrt(second) * root + epsilon)), left);
  }
};

}  // namespace er::ER_ISA
