// `conv_grad_weight`: checks, and the choice of the way by form and group.
#include "conv_weight.h"

#include "call_check.h"

namespace er::ER_ISA {
namespace {

// Attributes behind the shape; those from kAccumulate on are there or not.
enum WeightInt : uint32_t { kForm = kConvInts, kKeep, kAccumulate, kSamples, kFirst, kWeightInts };

// The shape and the layout of the samples of X that the call reads. What is wrong with the ints, or null.
const char* parse(const Call& call, ConvShape* shape, PackedLayout* x) {
  const bool some = call.n_ints == kWeightInts;
  if ((!some && call.n_ints != kAccumulate) || !conv_shape_error(call).empty()) return "the shape is not valid";
  *shape = conv_shape(call.ints);
  const ConvShape& s = *shape;
  const int64_t samples = some ? call.ints[kSamples] : s.n, first = some ? call.ints[kFirst] : 0;
  if (!packed_layout(call.ints[kForm], samples, s.ih * s.iw, s.ic, call.ints[kKeep], x))
    return "no kept tensor has this form, these sizes and this many values a sample";
  if (first < 0 || first > samples - s.n || (x->form == kDense && samples != s.n))
    return "X does not hold the call's samples";
  *x = x->part(first, s.n);
  return some && call.ints[kAccumulate] != 0 && call.ints[kAccumulate] != 1 ? "accumulate must be 0 or 1" : nullptr;
}

// Bytes of the gradient of the call's samples, which comes first in scratch, if it is added to G.
uint64_t own_gradient_bytes(const Call& call, const ConvShape& s) {
  if (call.n_ints != kWeightInts || !call.ints[kAccumulate]) return 0;
  return (static_cast<uint64_t>(s.w_elements()) * sizeof(float) + 63) / 64 * 64;
}

bool one_to_one(const ConvShape& s) { return s.depthwise() && s.oc == s.ic; }

std::string check(const Call& call) {
  CallCheck check(call, 4, call.n_ints > kAccumulate ? kWeightInts : kAccumulate, 0);
  if (!check.ok()) return check.error();
  const std::string shape_error = conv_shape_error(call);
  if (!shape_error.empty()) return shape_error;
  ConvShape s;
  PackedLayout x{};
  if (const char* error = parse(call, &s, &x)) return error;
  check.present(0, "X", x.bytes);
  check.present(1, "dY", byte_size({s.y_elements()}));
  check.present(2, "G", byte_size({s.w_elements()}));
  return check.error();
}

uint64_t path_scratch(const ConvShape& s, const PackedLayout& x, int threads) {
  if (one_to_one(s)) return depthwise_weight_scratch(s, threads);
  if (winograd_weight_wins(s, x, threads)) return winograd_weight_scratch(s, threads);
  return x.razor() ? razor_weight_scratch(s, threads) : dense_weight_scratch(s, x, threads);
}

uint64_t scratch(const Call& call, int threads) {
  ConvShape s;
  PackedLayout x;
  if (parse(call, &s, &x)) return UINT64_MAX;
  return own_gradient_bytes(call, s) + path_scratch(s, x, threads);
}

bool path_run(const WeightGradient& gradient) {
  const ConvShape& s = gradient.shape;
  const PackedLayout& x = gradient.x_layout;
  if (one_to_one(s)) return depthwise_weight_run(gradient);
  if (winograd_weight_wins(s, x, gradient.pool->threads())) return winograd_weight_run(gradient), true;
  return x.razor() ? razor_weight_run(gradient) : dense_weight_run(gradient);
}

bool run(const Call& call) {
  WeightGradient gradient{
      {}, {}, call.operands[0].data, call.as<const float>(1), call.as<float>(2), call.operands[3].data, call.pool};
  parse(call, &gradient.shape, &gradient.x_layout);
  const uint64_t own = own_gradient_bytes(call, gradient.shape);
  if (!own) return path_run(gradient);
  gradient.g = call.as<float>(3);
  gradient.scratch = call.as<char>(3) + own;
  if (!path_run(gradient)) return false;
  add_partials(gradient, call.as<float>(2), gradient.g, 1);
  return true;
}

}  // namespace

extern const Kernel conv_weight_kernels[];
const Kernel conv_weight_kernels[] = {
    {"conv_grad_weight", ER_CHECK(check), scratch, run},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
