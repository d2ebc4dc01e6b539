// The geometry that conv, conv_grad_input and conv_grad_weight share (docs/plan-format.md, ConvShape).
#pragma once
#include <cstdint>
#include <string>

#include "../kernel.h"

namespace er::ER_ISA {

constexpr uint32_t kConvInts = 16;

// X is [n,ih,iw,ic], W [kh,kw,ic/group,oc], Y [n,oh,ow,oc]; Y[·,oy,ox,o] reads input row oy·sh − pt + ky·dh and column
// ox·sw − pl + kx·dw, zero outside the map. Padding at the bottom and right follows from oh and ow.
struct ConvShape {
  int64_t n, ih, iw, ic, oh, ow, oc, kh, kw, sh, sw, pt, pl, dh, dw, group;

  int64_t x_elements() const { return n * ih * iw * ic; }
  int64_t y_elements() const { return n * oh * ow * oc; }
  int64_t w_elements() const { return kh * kw * (ic / group) * oc; }
  int64_t taps() const { return kh * kw; }
  // A GEMM on X as it lies in memory.
  bool pointwise() const {
    return kh == 1 && kw == 1 && sh == 1 && sw == 1 && pt == 0 && pl == 0 && oh == ih && ow == iw && group == 1;
  }
  // Few channels: the taps of a kernel row, which lie side by side in X and in W, are read as one.
  bool joins_taps() const {
    constexpr int64_t kFewChannels = 16;
    return group == 1 && dw == 1 && kw > 1 && ic <= kFewChannels;
  }
  // Every output channel reads one input channel.
  bool depthwise() const { return group == ic && group > 1; }
};

// The shape in the first 16 ints; the caller has checked that they are there.
inline ConvShape conv_shape(const int64_t* i) {
  return {i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], i[8], i[9], i[10], i[11], i[12], i[13], i[14], i[15]};
}

// What is wrong with a call's shape, "" if nothing. A shape that passes makes no product above 2^40 elements and no
// coordinate above 2^52.
__attribute__((cold, noinline)) inline std::string conv_shape_error(const Call& call) {
  static const char* const names[kConvInts] = {"n",  "ih", "iw", "ic", "oh", "ow", "oc", "kh",
                                               "kw", "sh", "sw", "pt", "pl", "dh", "dw", "group"};
  if (call.n_ints < kConvInts)
    return "needs " + std::to_string(kConvInts) + " shape integers, got " + std::to_string(call.n_ints);
  constexpr int64_t kDimLimit = int64_t{1} << 30, kStepLimit = int64_t{1} << 20, kStrideLimit = 1024,
                    kElementLimit = int64_t{1} << 40;
  for (uint32_t i = 0; i < kConvInts; i++) {
    bool pad = i == 11 || i == 12, stride = i == 9 || i == 10, step = i >= 11 && i <= 14;
    int64_t low = pad ? 0 : 1, high = stride ? kStrideLimit : step ? kStepLimit : kDimLimit, value = call.ints[i];
    if (value < low || value > high)
      return std::string(names[i]) + " = " + std::to_string(value) + " is not within " + std::to_string(low) + " and " +
             std::to_string(high);
  }
  ConvShape s = conv_shape(call.ints);
  if (s.ic % s.group || s.oc % s.group)
    return "group " + std::to_string(s.group) + " does not divide the channels " + std::to_string(s.ic) + " and " +
           std::to_string(s.oc);
  auto too_many = [&](std::initializer_list<int64_t> dims) {
    int64_t product = 1;
    for (int64_t d : dims)
      if (__builtin_mul_overflow(product, d, &product) || product > kElementLimit) return true;
    return false;
  };
  if (too_many({s.n, s.ih, s.iw, s.ic})) return "the input has too many elements";
  if (too_many({s.n, s.oh, s.ow, s.oc})) return "the output has too many elements";
  if (too_many({s.kh, s.kw, s.ic / s.group, s.oc})) return "the weight has too many elements";
  // A window that starts past the padded input can only come from a wrong plan: bottom padding is below the kernel's
  // extent or the limit.
  if ((s.oh - 1) * s.sh - s.pt >= s.ih + kStepLimit || (s.ow - 1) * s.sw - s.pl >= s.iw + kStepLimit)
    return "the output is larger than the input allows";
  return "";
}

}  // namespace er::ER_ISA
