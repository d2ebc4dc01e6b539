// Softmax along one axis of [outer][axis][inner], forward and backward.
#include <algorithm>
#include <limits>

#include "../kernel.h"
#include "../simd.h"
#include "call_check.h"

namespace er::ER_ISA {
namespace {

std::string check_operands(const Call& call, uint32_t operands, const char* const* names) {
  CallCheck check(call, operands, 3, 0);
  const int64_t outer = check.size(0, "outer"), axis = check.size(1, "axis"), inner = check.size(2, "inner");
  for (uint32_t i = 0; i < operands; i++) check.present(i, names[i], byte_size({outer, axis, inner}));
  return check.error();
}

// Terms summed in float32 before they go to a double: long axes (vocabularies) would lose digits.
constexpr int64_t kSumRun = 32 * kLanes;

// e^x that is 0 where it underflows, so that a position masked with −infinity gets no share at all.
inline VecF exp_or_zero(VecF x) { return (VecF)(~(VecI)(x < -87.0f) & (VecI)exp(x)); }

// Columns of [axis][inner] are walked in tiles of kLanes; an axis that is contiguous (inner = 1) is walked along
// itself.
template <class Row, class Column>
void along_axis(const Call& call, Row&& row, Column&& column) {
  const int64_t outer = call.ints[0], axis = call.ints[1], inner = call.ints[2];
  if (inner == 1) {
    parallel(call, outer, 4 * axis, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; o++) row(o * axis);
    });
    return;
  }
  const int64_t tiles = (inner + kLanes - 1) / kLanes;
  parallel(call, outer * tiles, 4 * axis * std::min<int64_t>(inner, kLanes), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t c = unit % tiles * kLanes;
      column(unit / tiles * axis * inner + c, inner - c);
    }
  });
}

// softmax: X → Y; ints outer, axis, inner.
std::string check_softmax(const Call& call) {
  static const char* const names[] = {"X", "Y"};
  return check_operands(call, 2, names);
}

bool run_softmax(const Call& call) {
  const int64_t axis = call.ints[1], inner = call.ints[2];
  const float lowest = -std::numeric_limits<float>::infinity();
  auto row = [&](int64_t at) {
    const float* x = call.as<float>(0) + at;
    float* y = call.as<float>(1) + at;
    float top = lowest;
    VecF best = broadcast(lowest);
    int64_t i = 0;
    for (; i + kLanes <= axis; i += kLanes) best = max(load(x + i), best);
    for (int lane = 0; lane < kLanes; lane++) top = std::max(top, best[lane]);
    for (; i < axis; i++) top = std::max(top, x[i]);
    double total = 0;
    for (int64_t first = 0; first < axis; first += kSumRun) {
      const int64_t last = std::min(axis, first + kSumRun);
      VecF run{};
      for (i = first; i < last; i += kLanes) {
        const int64_t left = axis - i;
        VecF e = exp_or_zero(load_upto(x + i, left) - top);
        store_upto(y + i, e, left);
        if (left < kLanes) e = (VecF)((lane_index() < static_cast<int32_t>(left)) & (VecI)e);
        run += e;
      }
      total += sum(run);
    }
    const float factor = static_cast<float>(1.0 / total);
    for (i = 0; i < axis; i += kLanes) store_upto(y + i, load_upto(y + i, axis - i) * factor, axis - i);
  };
  auto column = [&](int64_t at, int64_t left) {
    const float* x = call.as<float>(0) + at;
    float* y = call.as<float>(1) + at;
    VecF top = broadcast(lowest), total{};
    for (int64_t a = 0; a < axis; a++) top = max(load_upto(x + a * inner, left), top);
    for (int64_t a = 0; a < axis; a++) {
      const VecF e = exp_or_zero(load_upto(x + a * inner, left) - top);
      total += e;
      store_upto(y + a * inner, e, left);
    }
    const VecF factor = 1.0f / total;
    for (int64_t a = 0; a < axis; a++) store_upto(y + a * inner, load_upto(y + a * inner, left) * factor, left);
  };
  along_axis(call, row, column);
  return true;
}

// softmax_grad: dY, Y → dX = Y·(dY − Σ Y·dY); ints outer, axis, inner.
std::string check_softmax_grad(const Call& call) {
  static const char* const names[] = {"dY", "Y", "dX"};
  return check_operands(call, 3, names);
}

bool run_softmax_grad(const Call& call) {
  const int64_t axis = call.ints[1], inner = call.ints[2];
  auto row = [&](int64_t at) {
    const float *dy = call.as<float>(0) + at, *y = call.as<float>(1) + at;
    float* dx = call.as<float>(2) + at;
    double products = 0;
    for (int64_t first = 0; first < axis; first += kSumRun) {
      const int64_t last = std::min(axis, first + kSumRun);
      VecF run{};
      for (int64_t i = first; i < last; i += kLanes) run += load_upto(dy + i, axis - i) * load_upto(y + i, axis - i);
      products += sum(run);
    }
    const float dot = static_cast<float>(products);
    for (int64_t i = 0; i < axis; i += kLanes)
      store_upto(dx + i, load_upto(y + i, axis - i) * (load_upto(dy + i, axis - i) - dot), axis - i);
  };
  auto column = [&](int64_t at, int64_t left) {
    const float *dy = call.as<float>(0) + at, *y = call.as<float>(1) + at;
    float* dx = call.as<float>(2) + at;
    VecF dot{};
    for (int64_t a = 0; a < axis; a++) dot += load_upto(dy + a * inner, left) * load_upto(y + a * inner, left);
    for (int64_t a = 0; a < axis; a++)
      store_upto(dx + a * inner, load_upto(y + a * inner, left) * (load_upto(dy + a * inner, left) - dot), left);
  };
  along_axis(call, row, column);
  return true;
}

}  // namespace

extern const Kernel softmax_kernels[];
const Kernel softmax_kernels[] = {
    {"softmax", ER_CHECK(check_softmax), nullptr, run_softmax},
    {"softmax_grad", ER_CHECK(check_softmax_grad), nullptr, run_softmax_grad},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
