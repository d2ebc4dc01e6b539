// Vectors of ER_VECTOR_BYTES (64 for AVX-512, 32 for AVX2, 16 for SSE2 and NEON) in GCC/Clang vector extensions.
#pragma once
#include <cstdint>
#include <cstring>

namespace er::ER_ISA {

typedef float VecF __attribute__((vector_size(ER_VECTOR_BYTES)));
typedef int32_t VecI __attribute__((vector_size(ER_VECTOR_BYTES)));
constexpr int kLanes = ER_VECTOR_BYTES / 4;

inline VecF load(const float* p) {
  VecF v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, VecF v) { std::memcpy(p, &v, sizeof v); }
inline VecF broadcast(float x) { return x - VecF{}; }
inline VecF select(VecI mask, VecF a, VecF b) { return mask ? a : b; }
inline VecF max(VecF a, VecF b) { return a > b ? a : b; }
inline VecF min(VecF a, VecF b) { return a < b ? a : b; }
inline VecI bits(VecF v) { return (VecI)v; }
inline VecF abs(VecF v) { return (VecF)((VecI)v & 0x7fffffff); }
inline float sum(VecF v) {
  float s = 0;
  for (int i = 0; i < kLanes; i++) s += v[i];
  return s;
}

}  // namespace er::ER_ISA
