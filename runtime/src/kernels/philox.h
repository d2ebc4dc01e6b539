// The counter-based generator of dropout masks: the backward pass generates the same mask again, so nothing is kept.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "../kernel.h"
#include "../simd.h"

namespace er::ER_ISA {

constexpr int kCounters = 16;                   // generated together
constexpr int64_t kWords = 4 * kCounters;       // elements of a mask that they decide
constexpr int64_t kMaxMask = INT64_C(1) << 33;  // elements of a sample's mask: its counter has 32 bits

// Products of the low 32 bits of each lane.
inline VecU64 multiply_low(VecU64 lanes, uint32_t factor) {
#if ER_VECTOR_BYTES == 64 && defined(__AVX512F__)  // GCC would take vpmullq, three times as long
  return (VecU64)_mm512_maskz_mul_epu32(0xff, (__m512i)lanes, (__m512i)(VecU64{} + factor));
#else
  return (lanes & 0xFFFFFFFFu) * factor;
#endif
}

// High and low halves of x·factor, lane by lane (little-endian: an even lane is the low half of its 64 bits). Vectors,
// since compilers do not see that a 32×32 → 64 bit product of every lane is two products of every other lane.
inline void multiply(VecU x, uint32_t factor, VecU* high, VecU* low) {
  constexpr uint64_t kLow = 0xFFFFFFFFu;
  const VecU64 even = multiply_low((VecU64)x, factor), odd = multiply_low((VecU64)x >> 32, factor);
  *high = (VecU)((even >> 32) | (odd & ~kLow));
  *low = (VecU)((even & kLow) | (odd << 32));
}

// a[first], b[first], a[first + 1], b[first + 1], …
template <size_t kFirst, size_t... kLane>
inline VecU zip(VecU a, VecU b, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(a, b, (kLane % 2 * kLanes + kFirst + kLane / 2)...);
}

// Philox 4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) of the
// counters (c0, c1, c2, first + i); word[4·i + j] is word j of counter i.
inline void philox(uint32_t key0, uint32_t key1, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t first,
                   uint32_t word[kWords]) {
  constexpr int kParts = kCounters / kLanes;
  VecU x0[kParts], x1[kParts], x2[kParts], x3[kParts];
#pragma GCC unroll 4
  for (int p = 0; p < kParts; p++) {
    x0[p] = VecU{} + c0, x1[p] = VecU{} + c1, x2[p] = VecU{} + c2;
    x3[p] = (VecU)lane_index() + (first + static_cast<uint32_t>(p * kLanes));
  }
#pragma GCC unroll 1
  for (int round = 0; round < 10; round++) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; p++) {
      VecU high0, low0, high2, low2;
      multiply(x0[p], 0xD2511F53u, &high0, &low0);
      multiply(x2[p], 0xCD9E8D57u, &high2, &low2);
      x0[p] = high2 ^ x1[p] ^ key0;
      x2[p] = high0 ^ x3[p] ^ key1;
      x1[p] = low2;
      x3[p] = low0;
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
#pragma GCC unroll 4
  for (int p = 0; p < kParts; p++) {
    // By whole vectors, as they are read again: a vector that is read from smaller stores waits for them.
    constexpr auto lanes = std::make_index_sequence<kLanes>();
    const VecU low02 = zip<0>(x0[p], x2[p], lanes), high02 = zip<kLanes / 2>(x0[p], x2[p], lanes);
    const VecU low13 = zip<0>(x1[p], x3[p], lanes), high13 = zip<kLanes / 2>(x1[p], x3[p], lanes);
    const VecU in_order[] = {zip<0>(low02, low13, lanes), zip<kLanes / 2>(low02, low13, lanes),
                             zip<0>(high02, high13, lanes), zip<kLanes / 2>(high02, high13, lanes)};
    std::memcpy(word + 4 * kLanes * p, in_order, sizeof in_order);
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
    alignas(64) uint32_t word[kWords];
    philox(key0_, key1_, update0_, update1_, static_cast<uint32_t>(first_sample_ + static_cast<uint64_t>(sample)),
           static_cast<uint32_t>(first / 4), word);
    if (!dropped_) return std::fill(factor, factor + count, scale_);
    const VecU last = VecU{} + static_cast<uint32_t>(dropped_ - 1);
    for (int64_t i = 0; i < count; i += kLanes) {
      VecU v;
      std::memcpy(&v, word + i, sizeof v);
      store_upto(factor + i, select(v <= last, VecF{}, broadcast(scale_)), count - i);
    }
  }

 private:
  uint32_t key0_, key1_, update0_, update1_;
  uint64_t first_sample_, dropped_;
  float scale_;
};

}  // namespace er::ER_ISA
