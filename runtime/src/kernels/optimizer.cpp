// SGD and AdamW, applied in place as soon as a gradient is complete, one pass over memory. With M micro-batches the
// gradients add up in the momentum or in an accumulator, and the parameter changes only with the last one: until then
// the forward passes must see the old value.
#include "optimizer_rule.h"

namespace er::ER_ISA {
namespace {

// Walks [0, n) in vectors on all threads: body(i, left).
template <class F>
void elements(const Call& call, int64_t n, F&& body) {
  parallel_elements(call, n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kLanes) body(i, end - i);
  });
}

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
  check_sgd_floats(check, call, nesterov);
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
  const Sgd rule(call, nesterov);
  elements(call, n, [&](int64_t i, int64_t left) {
    VecF g = load_upto(grad + i, left);
    if (split) g += load_upto(accumulator + i, left);
    rule.update(w + i, v ? v + i : nullptr, g, left);
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
  check_adamw_floats(check, call);
  return check.error();
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
  const AdamW rule(call);
  elements(call, n, [&](int64_t i, int64_t left) {
    VecF g = load_upto(grad + i, left);
    if (split) g += load_upto(accumulator + i, left);
    rule.update(w + i, m + i, v + i, g, left);
  });
  return true;
}

}  // namespace

extern const Kernel optimizer_kernels[];
const Kernel optimizer_kernels[] = {
    {"sgd", ER_CHECK(check_sgd), nullptr, run_sgd},
    {"adamw", ER_CHECK(check_adamw), nullptr, run_adamw},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
