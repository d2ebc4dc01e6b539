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

// Philox 4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) of the
// counters (c0, c1, c2, first + i); word[4·i + j] is word j of counter i.
inline void philox(uint32_t key0, uint32_t key1, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t first,
                   uint32_t word[kWords]) {
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

// The mask of one dropout (docs/plan-format.md, "Step context").
class DropoutMask {
 public:
  DropoutMask(const er_context& context, int64_t stream, float ratio)
      : key0_(static_cast<uint32_t>(context.seed)),
        key1_(static_cast<uint32_t>(context.seed >> 32) ^ static_cast<uint32_t>(stream)),
        update0_(static_cast<uint32_t>(context.update)),
        update1_(static_cast<uint32_t>(context.update >> 32)),
        first_sample_(context.first_sample),
        threshold_(static_cast<uint64_t>(std::ceil(double{ratio} * 4294967296.0))),  // word < ratio·2^32, on integers
        scale_(ratio < 1 ? static_cast<float>(1.0 / (1.0 - double{ratio})) : 0.0f) {}

  // factor[i] = 0 or 1/(1 − ratio) for element first + i of a sample of the micro-batch, i < count ≤ kWords; first is
  // a multiple of 4.
  void factors(int64_t sample, int64_t first, int64_t count, float* factor) const {
    uint32_t word[kWords];
    philox(key0_, key1_, update0_, update1_, static_cast<uint32_t>(first_sample_ + static_cast<uint64_t>(sample)),
           static_cast<uint32_t>(first / 4), word);
    for (int64_t i = 0; i < count; i++) factor[i] = word[i] < threshold_ ? 0.0f : scale_;
  }

 private:
  uint32_t key0_, key1_, update0_, update1_;
  uint64_t first_sample_, threshold_;
  float scale_;
};

}  // namespace er::ER_ISA
