// Dropout; its gradient is the same kernel with the same mask (philox.h).
#include <algorithm>

#include "call_check.h"
#include "philox.h"

namespace er::ER_ISA {
namespace {

// dropout: X, Y = X·mask/(1 − ratio); ints elements a sample, samples, stream; float ratio.
std::string check_dropout(const Call& call) {
  CallCheck check(call, 2, 3, 1);
  const int64_t elements = check.integer(0, "elements a sample", 1, kMaxMask), samples = check.size(1, "samples");
  check.integer(2, "stream", 0, UINT32_MAX);
  if (check.ok()) check.require(call.floats[0] >= 0 && call.floats[0] <= 1, "ratio must be 0 to 1");
  check.present(0, "X", byte_size({samples, elements}));
  check.present(1, "Y", byte_size({samples, elements}));
  return check.error();
}

bool run_dropout(const Call& call) {
  const int64_t elements = call.ints[0], samples = call.ints[1];
  const DropoutMask mask(*call.context, call.ints[2], call.floats[0]);
  const float* x = call.as<float>(0);
  float* y = call.as<float>(1);
  const int64_t blocks = (elements + kWords - 1) / kWords;
  parallel(call, samples * blocks, 4 * std::min(elements, kWords), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t sample = unit / blocks, first = unit % blocks * kWords;
      const int64_t count = std::min(kWords, elements - first), at = sample * elements + first;
      alignas(64) float factor[kWords];
      mask.factors(sample, first, count, factor);
      for (int64_t i = 0; i < count; i += kLanes)
        store_upto(y + at + i, load_upto(x + at + i, count - i) * load_upto(factor + i, count - i), count - i);
    }
  });
  return true;
}

}  // namespace

extern const Kernel dropout_kernels[];
const Kernel dropout_kernels[] = {
    {"dropout", ER_CHECK(check_dropout), nullptr, run_dropout},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
