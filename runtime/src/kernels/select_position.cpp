// One position of each sample, chosen by its tokens or its mask: the last token before the padding.
#include <algorithm>
#include <cstring>

#include "../kernel.h"
#include "call_check.h"

namespace er::ER_ISA {
namespace {

// select_position: X[n, positions, cols], source[n, positions] → Y[n, cols]; select_position_grad: dY, source → dX.
// ints n, positions, cols, kind, number, integer. Of the positions whose source is not `number`, kind 0 takes the last,
// or position 0; kind 1 the one whose index is their number less one, or the last position. integer: source is int32,
// else float32.
std::string check(const Call& call, const char* first, const char* last, bool gradient) {
  CallCheck check(call, 3, 6, 0);
  const int64_t n = check.size(0, "n"), positions = check.size(1, "positions"), cols = check.size(2, "cols");
  check.integer(3, "kind", 0, 1);
  check.integer(4, "number", INT32_MIN, INT32_MAX);
  check.integer(5, "integer", 0, 1);
  const uint64_t all = byte_size({n, positions, cols}), one = byte_size({n, cols});
  check.present(0, first, gradient ? one : all);
  check.present(1, "source", byte_size({n, positions}));
  check.present(2, last, gradient ? all : one);
  return check.error();
}

std::string check_select(const Call& call) { return check(call, "X", "Y", false); }
std::string check_grad(const Call& call) { return check(call, "dY", "dX", true); }

template <class T>
int64_t position_of(const T* source, int64_t positions, bool counted, T number) {
  int64_t last = 0, count = 0;
  for (int64_t i = 0; i < positions; i++)
    if (source[i] != number) last = i, count++;
  if (!counted) return last;
  return count ? count - 1 : positions - 1;
}

int64_t position_of(const Call& call, int64_t sample) {
  const int64_t positions = call.ints[1];
  const bool counted = call.ints[3] == 1;
  if (call.ints[5] == 1)
    return position_of(call.as<const int32_t>(1) + sample * positions, positions, counted,
                       static_cast<int32_t>(call.ints[4]));
  return position_of(call.as<const float>(1) + sample * positions, positions, counted,
                     static_cast<float>(call.ints[4]));
}

bool run_select(const Call& call) {
  const int64_t n = call.ints[0], positions = call.ints[1], cols = call.ints[2];
  for (int64_t i = 0; i < n; i++)
    std::copy_n(call.as<const float>(0) + (i * positions + position_of(call, i)) * cols, cols,
                call.as<float>(2) + i * cols);
  return true;
}

bool run_grad(const Call& call) {
  const int64_t n = call.ints[0], positions = call.ints[1], cols = call.ints[2];
  parallel(call, n, positions * cols, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      float* dx = call.as<float>(2) + i * positions * cols;
      std::fill_n(dx, positions * cols, 0.f);
      std::copy_n(call.as<const float>(0) + i * cols, cols, dx + position_of(call, i) * cols);
    }
  });
  return true;
}

}  // namespace

extern const Kernel select_position_kernels[];
const Kernel select_position_kernels[] = {
    {"select_position", ER_CHECK(check_select), nullptr, run_select},
    {"select_position_grad", ER_CHECK(check_grad), nullptr, run_grad},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
