// SGD and AdamW, applied in place as soon as a gradient is complete, one pass over memory. With M micro-batches the
// gradients add up in the momentum or in an accumulator, and the parameter changes only with the last one: until then
// the forward passes must see the old value.
#include <cmath>
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../kernel.h"
#include "../simd.h"
#include "call_check.h"

namespace er::ER_ISA {
namespace {

// Walks [0, n) in vectors on all threads: body(i, left).
template <class F>
void elements(const Call& call, int64_t n, F&& body) {
  parallel_elements(call, n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kLanes) body(i, end - i);
  });
}

bool last_micro(const Call& call) { return call.context->micro_index + 1 >= call.context->micro_count; }

// accumulator = grad at the first micro-batch, else += grad.
void accumulate(const Call& call, int64_t n, const float* grad, float* accumulator) {
  const bool first = call.context->micro_index == 0;
  elements(call, n, [&](int64_t i, int64_t left) {
    const VecF g = load_upto(grad + i, left);
    store_upto(accumulator + i, first ? g : load_upto(accumulator + i, left) + g, left);
  });
}

// ---- sgd: param, grad, momentum?, accumulator? (all [n]); ints n, nesterov; floats momentum μ, weight_decay ----

std::string check_sgd(const Call& call) {
  CallCheck check(call, 4, 2, 2);
  const uint64_t bytes = byte_size({check.integer(0, "n", 1, INT64_MAX)});
  const bool nesterov = check.integer(1, "nesterov", 0, 1) == 1;
  check.present(0, "param", bytes);
  check.present(1, "grad", bytes);
  check.optional(2, "momentum", bytes);
  check.optional(3, "accumulator", bytes);
  if (check.ok()) {
    check.require(call.floats[0] >= 0 && call.floats[1] >= 0, "momentum and weight_decay must not be negative");
    check.require(std::isfinite(call.floats[0]) && std::isfinite(call.floats[1]),
                  "momentum and weight_decay must be finite");
    check.require(!nesterov || call.operands[2].data, "nesterov needs the momentum operand");
  }
  return check.error();
}

// M > 1, gradients add up in v: v = μ·v + wd·w + g at the first micro-batch, v += g at the others, w −= lr·v at the
// last.
void sgd_in_momentum(const Call& call, int64_t n, float* w, const float* grad, float* v) {
  const float mu = call.floats[0], decay = call.floats[1], rate = call.context->learning_rate;
  const bool first = call.context->micro_index == 0, last = last_micro(call);
  elements(call, n, [&](int64_t i, int64_t left) {
    VecF sum = load_upto(v + i, left);
    if (first) sum = mu * sum + decay * load_upto(w + i, left);
    sum += load_upto(grad + i, left);
    store_upto(v + i, sum, left);
    if (last) store_upto(w + i, load_upto(w + i, left) - rate * sum, left);
  });
}

bool run_sgd(const Call& call) {
  float *w = call.as<float>(0), *v = call.as<float>(2), *accumulator = call.as<float>(3);
  const float* grad = call.as<float>(1);
  const int64_t n = call.ints[0];
  const bool nesterov = call.ints[1] == 1, split = call.context->micro_count > 1;
  if (split && !accumulator) {
    if (!v || nesterov) return false;  // there is no place to add the gradients up: refuse to change anything
    sgd_in_momentum(call, n, w, grad, v);
    return true;
  }
  if (split && !last_micro(call)) {
    accumulate(call, n, grad, accumulator);
    return true;
  }
  const float mu = call.floats[0], decay = call.floats[1], rate = call.context->learning_rate;
  elements(call, n, [&](int64_t i, int64_t left) {
    const VecF x = load_upto(w + i, left);
    VecF g = load_upto(grad + i, left);
    if (split) g += load_upto(accumulator + i, left);
    g += decay * x;
    if (v) {
      const VecF velocity = mu * load_upto(v + i, left) + g;
      store_upto(v + i, velocity, left);
      g = nesterov ? g + mu * velocity : velocity;
    }
    store_upto(w + i, x - rate * g, left);
  });
  return true;
}

// ---- adamw: param, grad, m, v, accumulator? (all [n]); int n; floats beta1, beta2, epsilon, weight_decay ----

std::string check_adamw(const Call& call) {
  CallCheck check(call, 5, 1, 4);
  const uint64_t bytes = byte_size({check.integer(0, "n", 1, INT64_MAX)});
  static const char* const names[] = {"param", "grad", "m", "v"};
  for (uint32_t i = 0; i < 4; i++) check.present(i, names[i], bytes);
  check.optional(4, "accumulator", bytes);
  if (check.ok()) {
    for (int i = 0; i < 2; i++)
      check.require(call.floats[i] >= 0 && call.floats[i] < 1, "beta1 and beta2 must be in [0, 1)");
    for (int i = 2; i < 4; i++)
      check.require(call.floats[i] >= 0 && std::isfinite(call.floats[i]),
                    "epsilon and weight_decay must be finite and not negative");
  }
  return check.error();
}

// Written out, since errno keeps compilers from making one instruction of a loop over std::sqrt (and the masked form,
// since GCC 12 warns of its own header in the other one).
inline VecF sqrt(VecF v) {
#if ER_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (VecF)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);
#elif ER_VECTOR_BYTES == 32 && defined(__AVX__)
  return (VecF)_mm256_sqrt_ps((__m256)v);
#elif ER_VECTOR_BYTES == 16 && defined(__SSE2__)
  return (VecF)_mm_sqrt_ps((__m128)v);
#elif ER_VECTOR_BYTES == 16 && defined(__aarch64__)
  return (VecF)vsqrtq_f32((float32x4_t)v);
#else
  for (int i = 0; i < kLanes; i++) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

bool run_adamw(const Call& call) {
  float *w = call.as<float>(0), *m = call.as<float>(2), *v = call.as<float>(3), *accumulator = call.as<float>(4);
  const float* grad = call.as<float>(1);
  const int64_t n = call.ints[0];
  const bool split = call.context->micro_count > 1;
  if (split && !accumulator) return false;  // there is no place to add the gradients up: refuse to change anything
  if (split && !last_micro(call)) {
    accumulate(call, n, grad, accumulator);
    return true;
  }
  const double t = static_cast<double>(call.context->update), rate = call.context->learning_rate;
  const double beta1 = call.floats[0], beta2 = call.floats[1];
  const float decay = static_cast<float>(rate * call.floats[3]);
  const float step = static_cast<float>(rate / (1.0 - std::pow(beta1, t)));
  const float root = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, t)));
  const float b1 = call.floats[0], b2 = call.floats[1], epsilon = call.floats[2];
  const float rest1 = static_cast<float>(1.0 - beta1), rest2 = static_cast<float>(1.0 - beta2);
  elements(call, n, [&](int64_t i, int64_t left) {
    VecF g = load_upto(grad + i, left);
    if (split) g += load_upto(accumulator + i, left);
    const VecF first = b1 * load_upto(m + i, left) + rest1 * g;
    const VecF second = b2 * load_upto(v + i, left) + rest2 * (g * g);
    store_upto(m + i, first, left);
    store_upto(v + i, second, left);
    const VecF x = load_upto(w + i, left);
    // Decay and step are added up first: the parameter, the largest of the three, is rounded once.
    store_upto(w + i, x - (decay * x + step * first / (sqrt(second) * root + epsilon)), left);
  });
  return true;
}

}  // namespace

extern const Kernel optimizer_kernels[];
const Kernel optimizer_kernels[] = {
    {"sgd", check_sgd, nullptr, run_sgd},
    {"adamw", check_adamw, nullptr, run_adamw},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
