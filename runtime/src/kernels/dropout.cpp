// Dropout with a counter-based generator: the backward pass calls the same kernel again and gets the same mask, so
// nothing is kept.
#include <algorithm>
#include <cmath>

#include "../kernel.h"
#include "call_check.h"

namespace er::ER_ISA {
namespace {

constexpr int kCounters = 16;  // generated together, one a lane

// Philox 4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) of the
// counters (c0, c1, c2, first + i); word[4·i + j] is word j of counter i.
void philox(uint32_t key0, uint32_t key1, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t first,
            uint32_t word[4 * kCounters]) {
  uint32_t x0[kCounters], x1[kCounters], x2[kCounters], x3[kCounters];
  for (int i = 0; i < kCounters; i++) {
    x0[i] = c0;
    x1[i] = c1;
    x2[i] = c2;
    x3[i] = first + static_cast<uint32_t>(i);
  }
  for (int round = 0; round < 10; round++) {
    for (int i = 0; i < kCounters; i++) {
      const uint64_t a = uint64_t{0xD2511F53u} * x0[i], b = uint64_t{0xCD9E8D57u} * x2[i];
      x0[i] = static_cast<uint32_t>(b >> 32) ^ x1[i] ^ key0;
      x2[i] = static_cast<uint32_t>(a >> 32) ^ x3[i] ^ key1;
      x1[i] = static_cast<uint32_t>(b);
      x3[i] = static_cast<uint32_t>(a);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (int i = 0; i < kCounters; i++) {
    word[4 * i] = x0[i];
    word[4 * i + 1] = x1[i];
    word[4 * i + 2] = x2[i];
    word[4 * i + 3] = x3[i];
  }
}

// dropout: X, Y = X·mask/(1 − ratio); ints elements a sample, samples, stream; float ratio.
std::string check_dropout(const Call& call) {
  CallCheck check(call, 2, 3, 1);
  const int64_t elements = check.integer(0, "elements a sample", 1, int64_t{1} << 33),
                samples = check.size(1, "samples");
  check.integer(2, "stream", 0, UINT32_MAX);
  if (check.ok()) check.require(call.floats[0] >= 0 && call.floats[0] <= 1, "ratio must be 0 to 1");
  check.present(0, "X", byte_size({samples, elements}));
  check.present(1, "Y", byte_size({samples, elements}));
  return check.error();
}

bool run_dropout(const Call& call) {
  const int64_t elements = call.ints[0], samples = call.ints[1];
  const er_context& context = *call.context;
  const uint32_t key0 = static_cast<uint32_t>(context.seed);
  const uint32_t key1 = static_cast<uint32_t>(context.seed >> 32) ^ static_cast<uint32_t>(call.ints[2]);
  const uint32_t update0 = static_cast<uint32_t>(context.update), update1 = static_cast<uint32_t>(context.update >> 32);
  const double ratio = call.floats[0];
  const uint64_t threshold = static_cast<uint64_t>(std::ceil(ratio * 4294967296.0));  // word < ratio·2^32, on integers
  const float scale = ratio < 1 ? static_cast<float>(1.0 / (1.0 - ratio)) : 0.0f;
  const float* x = call.as<float>(0);
  float* y = call.as<float>(1);
  constexpr int64_t kBlock = 4 * kCounters;
  const int64_t blocks = (elements + kBlock - 1) / kBlock;
  parallel(call, samples * blocks, 4 * std::min(elements, kBlock), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t sample = unit / blocks, first = unit % blocks * kBlock;
      uint32_t word[kBlock];
      philox(key0, key1, update0, update1, static_cast<uint32_t>(context.first_sample + static_cast<uint64_t>(sample)),
             static_cast<uint32_t>(first / 4), word);
      const int64_t count = std::min(kBlock, elements - first), at = sample * elements + first;
      for (int64_t i = 0; i < count; i++) y[at + i] = x[at + i] * (word[i] < threshold ? 0.0f : scale);
    }
  });
  return true;
}

}  // namespace

extern const Kernel dropout_kernels[];
const Kernel dropout_kernels[] = {
    {"dropout", check_dropout, nullptr, run_dropout},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
