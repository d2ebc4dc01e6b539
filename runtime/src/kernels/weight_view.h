// A weight as it is stored (docs/plan-format.md, "Weights"): float32 HWIO, as trained weights are, or a row for each
// output channel, as frozen weights may be. Kernels load vectors of it where they pack a tile, so that a weight in bf16
// or int8 is never whole in float32 anywhere.
#pragma once
#include <cstdint>
#include <cstring>

#include "../simd.h"
#include "bytes.h"
#include "call_check.h"

namespace er::ER_ISA {

enum WeightForm : int64_t { kHwio = 0, kRowsFloat = 1, kRowsBf16 = 2, kRowsInt8 = 3 };

// int8 as floats.
inline VecF load_int8(const int8_t* p, int64_t left) {
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(p);
  const VecI wide = left >= kLanes ? load_bytes(bytes, kLanes) : load_bytes(bytes, left);
  return to_float((wide << 24) >> 24);
}

// Rows of `cols` elements: [rows][cols] in float32 or bf16, or float32 scale[rows], aligned to 64 bytes, and
// int8 [rows][cols]. UINT64_MAX if that is too large.
inline uint64_t weight_rows_bytes(int64_t form, int64_t rows, int64_t cols) {
  if (form != kRowsInt8) return byte_size({rows, cols}, form == kRowsBf16 ? 2 : 4);
  const uint64_t values = byte_size({rows, cols}, 1);
  uint64_t total;
  return values == UINT64_MAX ||
                 __builtin_add_overflow(values, (static_cast<uint64_t>(rows) * 4 + 63) / 64 * 64, &total)
             ? UINT64_MAX
             : total;
}

struct WeightView {
  int64_t form;
  int64_t taps, in, out;  // taps of the kernel, input channels of a group, output channels of all groups
  const void* data;

  // The first of the two coordinates of load(): input channels in HWIO, else output channels.
  bool by_input() const { return form == kHwio; }
  const float* hwio(int64_t tap, int64_t input, int64_t output) const {
    return static_cast<const float*>(data) + (tap * in + input) * out + output;
  }
  // `left` elements of a tap from (row, column) on: HWIO: row = input channel, columns = output channels; else row =
  // output channel, columns = input channels. `kForm` is `form`.
  template <int64_t kForm>
  VecF load(int64_t tap, int64_t row, int64_t column, int64_t left) const {
    if constexpr (kForm == kHwio) return load_upto(hwio(tap, row, column), left);
    const int64_t at = (row * taps + tap) * in + column;
    if constexpr (kForm == kRowsFloat) return load_upto(static_cast<const float*>(data) + at, left);
    if constexpr (kForm == kRowsBf16) return load_bf16(static_cast<const uint16_t*>(data) + at, left);
    const float* scale = static_cast<const float*>(data);
    const int8_t* values = static_cast<const int8_t*>(data) + (static_cast<uint64_t>(out) * 4 + 63) / 64 * 64;
    return load_int8(values + at, left) * broadcast(scale[row]);
  }
  // body(std::integral_constant<int64_t, form>).
  template <class F>
  void with_form(F&& body) const {
    switch (form) {
      case kHwio:
        return body(std::integral_constant<int64_t, kHwio>());
      case kRowsFloat:
        return body(std::integral_constant<int64_t, kRowsFloat>());
      case kRowsBf16:
        return body(std::integral_constant<int64_t, kRowsBf16>());
      default:
        return body(std::integral_constant<int64_t, kRowsInt8>());
    }
  }
};

}  // namespace er::ER_ISA
