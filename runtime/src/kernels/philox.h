// The counter-based generator of dropout masks: the backward pass generates the same mask again, so nothing is kept.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../kernel.h"

namespace er::ER_ISA {

constexpr int kCounters = 16;                   // generated together, one a lane
constexpr int64_t kWords = 4 * kCounters;       // elements of a mask that they decide
constexpr int64_t kMaxMask = INT64_C(1) << 33;  // elements of a sample's mask: its counter has 32 bits

// Vectors of 16 lanes, which the compiler splits where registers are smaller. A plain loop stays scalar: compilers do
// not see that a 32×32 → 64 bit product of every lane is two products of every other lane.
typedef uint32_t Counters __attribute__((vector_size(kCounters * 4)));
typedef uint64_t Products __attribute__((vector_size(kCounters * 4)));

// High and low halves of x·factor, lane by lane (little-endian: an even lane is the low half of its 64 bits).
inline void multiply(Counters x, uint32_t factor, Counters* high, Counters* low) {
  constexpr uint64_t kLow = 0xFFFFFFFFu;
  const Products lanes = (Products)x, even = (lanes & kLow) * factor, odd = (lanes >> 32) * factor;
  *high = (Counters)((even >> 32) | (odd & ~kLow));
  *low = (Counters)((even & kLow) | (odd << 32));
}

// Philox 4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) of the
// counters (c0, c1, c2, first + i); word[4·i + j] is word j of counter i.
inline void philox(uint32_t key0, uint32_t key1, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t first,
                   uint32_t word[kWords]) {
  Counters x0 = Counters{} + c0, x1 = Counters{} + c1, x2 = Counters{} + c2;
  Counters x3 = Counters{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + first;
  for (int round = 0; round < 10; round++) {
    Counters high0, low0, high2, low2;
    multiply(x0, 0xD2511F53u, &high0, &low0);
    multiply(x2, 0xCD9E8D57u, &high2, &low2);
    x0 = high2 ^ x1 ^ key0;
    x2 = high0 ^ x3 ^ key1;
    x1 = low2;
    x3 = low0;
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

// The mask of one dropout (docs/plan-format.md, "Step context").
class DropoutMask {
 public:
  DropoutMask(const er_context& context, int64_t stream, float ratio)
      : key0_(static_cast<uint32_t>(context.seed)),
        key1_(static_cast<uint32_t>(context.seed >> 32) ^ static_cast<uint32_t>(stream)),
        update0_(static_cast<uint32_t>(context.update)),
        update1_(static_cast<uint32_t>(context.update >> 32)),
        first_sample_(context.first_sample),
        dropped_(static_cast<uint64_t>(std::ceil(double{ratio} * 4294967296.0))),  // word < ratio·2^32, on integers
        scale_(ratio < 1 ? static_cast<float>(1.0 / (1.0 - double{ratio})) : 0.0f) {}

  // factor[i] = 0 or 1/(1 − ratio) for element first + i of a sample of the micro-batch, i < count ≤ kWords; first is
  // a multiple of 4.
  void factors(int64_t sample, int64_t first, int64_t count, float* factor) const {
    uint32_t word[kWords];
    philox(key0_, key1_, update0_, update1_, static_cast<uint32_t>(first_sample_ + static_cast<uint64_t>(sample)),
           static_cast<uint32_t>(first / 4), word);
    if (!dropped_) return std::fill(factor, factor + count, scale_);
    const uint32_t last = static_cast<uint32_t>(dropped_ - 1);  // 32-bit comparisons vectorize
    for (int64_t i = 0; i < count; i++) factor[i] = word[i] <= last ? 0.0f : scale_;
  }

 private:
  uint32_t key0_, key1_, update0_, update1_;
  uint64_t first_sample_, dropped_;
  float scale_;
};

}  // namespace er::ER_ISA
