// The slope f' of an activation from the form in which it was kept, vector by vector, and running sums over rows.
// activation_grad uses them, and the epilogue of conv_grad_input, whose dX is the gradient of an activation's value.
#pragma once
#include <type_traits>

#include "activation.h"
#include "bytes.h"

namespace er::ER_ISA {

// The kLanes bits from column c (a multiple of kLanes) of a row of bits, of which `left` columns exist; the bits past
// them may be anything.
inline uint32_t kept_bits(const uint8_t* row, int64_t c, int64_t left) {
  if (kLanes == 16 && left > 8) {
    uint16_t two;
    std::memcpy(&two, row + c / 8, 2);
    return two;
  }
  return kLanes == 4 ? row[c / 8] >> c % 8 : row[c / 8];
}

enum class SlopeKind {
  kOne,   // no activation
  kMask,  // bits, slopes 1 and 0: selecting lets NaN gradients of inactive elements vanish, as in torch
  kTwo,   // bits, slopes `high` and `low`
  kQ4     // low + nibble · high
};

// Kept slopes of rows × columns (keep = bits or q4).
struct Slope {
  SlopeKind kind = SlopeKind::kOne;
  const uint8_t* kept = nullptr;
  int64_t row_bytes = 0;
  float low = 0.0f, high = 1.0f;

  static Slope of(const Activation& act, int64_t keep, const uint8_t* kept, int64_t cols) {
    if (keep == kKeepNothing) return {};
    const int64_t row_bytes = kept_row_bytes(keep, cols);
    if (keep == kKeepQ4) {
      const DerivativeRange range = derivative_range(act.code);
      return {SlopeKind::kQ4, kept, row_bytes, range.low, (range.high - range.low) / 15.0f};
    }
    if (act.code == kActLeakyRelu) return {SlopeKind::kTwo, kept, row_bytes, act.alpha, 1.0f};
    if (act.code == kActHardSigmoid) return {SlopeKind::kTwo, kept, row_bytes, 0.0f, act.alpha};
    return {SlopeKind::kMask, kept, row_bytes, 0.0f, 1.0f};
  }
  const uint8_t* row(int64_t r) const { return kept + r * row_bytes; }

  // g·f' for the kLanes columns from c (a multiple of kLanes) on, of which `left` exist; `row` as row() gives it.
  template <SlopeKind kKind>
  VecF times(VecF g, const uint8_t* row, int64_t c, int64_t left) const {
    if constexpr (kKind == SlopeKind::kMask) return keep_lanes(kept_bits(row, c, left), g);
    if constexpr (kKind == SlopeKind::kTwo)
      return g * select(bits_mask(kept_bits(row, c, left)), broadcast(high), broadcast(low));
    if constexpr (kKind == SlopeKind::kQ4)
      return g * (low + to_float(load_nibbles(row + c / 2, (left + 1) / 2)) * high);
    return g;
  }
  // body(kind) with the kind as a constant.
  template <class F>
  void with_kind(F&& body) const {
    switch (kind) {
      case SlopeKind::kOne:
        return body(std::integral_constant<SlopeKind, SlopeKind::kOne>());
      case SlopeKind::kMask:
        return body(std::integral_constant<SlopeKind, SlopeKind::kMask>());
      case SlopeKind::kTwo:
        return body(std::integral_constant<SlopeKind, SlopeKind::kTwo>());
      case SlopeKind::kQ4:
        return body(std::integral_constant<SlopeKind, SlopeKind::kQ4>());
    }
  }
};

// Sums per column that one thread adds to in any order, compensated (Kahan 1965): the error stays at a rounding or two
// however many terms there are. None if `sum` is null.
struct RunningSums {
  float* sum = nullptr;   // [columns]
  float* lost = nullptr;  // [columns]: what the roundings have added to `sum` too much

  void add(int64_t c, VecF term, int64_t left) const {
    const VecF before = load_upto(sum + c, left), wanted = term - load_upto(lost + c, left);
    const VecF after = before + wanted;
    store_upto(lost + c, (after - before) - wanted, left);
    store_upto(sum + c, after, left);
  }
};

}  // namespace er::ER_ISA
