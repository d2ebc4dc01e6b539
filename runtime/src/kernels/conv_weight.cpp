// `conv_grad_weight`: checks, and the choice of the way by form and group.
#include "conv_weight.h"

#include "call_check.h"

namespace er::ER_ISA {
namespace {

// The shape and the layout of X; false if the ints are invalid.
bool parse(const Call& call, ConvShape* shape, PackedLayout* x) {
  if (call.n_ints != kConvInts + 2 || !conv_shape_error(call).empty()) return false;
  *shape = conv_shape(call.ints);
  return packed_layout(call.ints[kConvInts], shape->n, shape->ih * shape->iw, shape->ic, call.ints[kConvInts + 1], x);
}

bool one_to_one(const ConvShape& s) { return s.depthwise() && s.oc == s.ic; }

std::string check(const Call& call) {
  CallCheck check(call, 4, kConvInts + 2, 0);
  if (!check.ok()) return check.error();
  const std::string shape_error = conv_shape_error(call);
  if (!shape_error.empty()) return shape_error;
  ConvShape s;
  PackedLayout x{};
  check.require(parse(call, &s, &x), "no kept tensor has this form, these sizes and this many values a sample");
  if (!check.ok()) return check.error();
  check.present(0, "X", x.bytes);
  check.present(1, "dY", byte_size({s.y_elements()}));
  check.present(2, "G", byte_size({s.w_elements()}));
  return check.error();
}

uint64_t scratch(const Call& call, int threads) {
  ConvShape s;
  PackedLayout x;
  if (!parse(call, &s, &x)) return UINT64_MAX;
  if (one_to_one(s)) return depthwise_weight_scratch(s, threads);
  if (winograd_weight_wins(s, x, threads)) return winograd_weight_scratch(s, threads);
  return x.razor() ? razor_weight_scratch(s, threads) : dense_weight_scratch(s, x, threads);
}

bool run(const Call& call) {
  WeightGradient gradient{
      {}, {}, call.operands[0].data, call.as<const float>(1), call.as<float>(2), call.operands[3].data, call.pool};
  parse(call, &gradient.shape, &gradient.x_layout);
  if (one_to_one(gradient.shape)) return depthwise_weight_run(gradient);
  if (winograd_weight_wins(gradient.shape, gradient.x_layout, call.pool->threads()))
    return winograd_weight_run(gradient), true;
  return gradient.x_layout.razor() ? razor_weight_run(gradient) : dense_weight_run(gradient);
}

}  // namespace

extern const Kernel conv_weight_kernels[];
const Kernel conv_weight_kernels[] = {
    {"conv_grad_weight", ER_CHECK(check), scratch, run},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
