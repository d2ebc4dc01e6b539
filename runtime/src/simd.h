// Vectors of ER_VECTOR_BYTES (64 for AVX-512, 32 for AVX2, 16 for SSE2 and NEON) in GCC/Clang vector extensions.
// Intrinsics only where the extensions have no word for it: partial loads and stores, and masks to bits.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace er::ER_ISA {

typedef float VecF __attribute__((vector_size(ER_VECTOR_BYTES)));
typedef int32_t VecI __attribute__((vector_size(ER_VECTOR_BYTES)));
typedef uint64_t VecU64 __attribute__((vector_size(ER_VECTOR_BYTES)));
typedef uint32_t VecU __attribute__((vector_size(ER_VECTOR_BYTES)));
// As many lanes of 2 bytes and of 1 byte.
typedef uint16_t VecH __attribute__((vector_size(ER_VECTOR_BYTES / 2)));
typedef int8_t VecB __attribute__((vector_size(ER_VECTOR_BYTES / 4)));
constexpr int kLanes = ER_VECTOR_BYTES / 4;
// Processors with AVX-512 have 1 to 2 MB of second-level cache, others 256 KB or more.
constexpr bool kLargeCache = kLanes == 16;

inline VecF load(const float* p) {
  VecF v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, VecF v) { std::memcpy(p, &v, sizeof v); }
inline VecF broadcast(float x) { return x - VecF{}; }
inline VecI broadcast(int32_t x) { return x - VecI{}; }
inline VecF select(VecI mask, VecF a, VecF b) { return mask ? a : b; }
// One instruction each on x86. If an operand is NaN, the result is b: pass the value that must stay NaN second.
inline VecF max(VecF a, VecF b) { return a > b ? a : b; }
inline VecF min(VecF a, VecF b) { return a < b ? a : b; }
inline VecI bits(VecF v) { return (VecI)v; }
inline VecF abs(VecF v) { return (VecF)((VecI)v & 0x7fffffff); }
template <int kStep, size_t... kLane>
inline VecF rotate(VecF v, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(v, v, ((kLane + kStep) % kLanes)...);
}
// All lanes in one: halves, then quarters, …, so that the chain is short.
template <int kStep = kLanes / 2, class F>
inline float fold(VecF v, F&& f) {
  v = f(v, rotate<kStep>(v, std::make_index_sequence<kLanes>()));
  if constexpr (kStep > 1)
    return fold<kStep / 2>(v, f);
  else
    return v[0];
}
inline float sum(VecF v) {
  return fold(v, [](VecF a, VecF b) { return a + b; });
}
// NaN if an operand is.
inline VecF max_or_nan(VecF a, VecF b) { return select((a > b) | (a != a), a, b); }
inline float highest(VecF v) { return fold(v, max_or_nan); }

// 0, 1, 2, … kLanes − 1.
inline VecI lane_index() {
  static constexpr int32_t kIndex[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  VecI v;
  std::memcpy(&v, kIndex, sizeof v);
  return v;
}

// Without masked loads and stores a tail is a loop over lanes: called, not inlined, or it is a third of the kernels'
// code.
#if ER_VECTOR_BYTES == 16
#define ER_PARTIAL inline __attribute__((noinline))
#else
#define ER_PARTIAL inline
#endif

// The first `count` (0 … kLanes) elements; the other lanes are 0 and their memory is not touched.
ER_PARTIAL VecF load_partial(const float* p, int count) {
#if ER_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (VecF)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#elif ER_VECTOR_BYTES == 32 && defined(__AVX__)
  return (VecF)_mm256_maskload_ps(p, (__m256i)(lane_index() < count));
#else
  VecF v{};
  for (int i = 0; i < count; i++) v[i] = p[i];
  return v;
#endif
}
ER_PARTIAL void store_partial(float* p, VecF v, int count) {
#if ER_VECTOR_BYTES == 64 && defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
#elif ER_VECTOR_BYTES == 32 && defined(__AVX__)
  _mm256_maskstore_ps(p, (__m256i)(lane_index() < count), (__m256)v);
#else
  for (int i = 0; i < count; i++) p[i] = v[i];
#endif
}
inline VecF load_upto(const float* p, int64_t left) {
  return left >= kLanes ? load(p) : load_partial(p, static_cast<int>(left));
}
inline void store_upto(float* p, VecF v, int64_t left) {
  if (left >= kLanes)
    store(p, v);
  else
    store_partial(p, v, static_cast<int>(left));
}

// Bit i is set where lane i of a comparison's result is true.
inline uint32_t mask_bits(VecI mask) {
#if ER_VECTOR_BYTES == 64 && defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif ER_VECTOR_BYTES == 32 && defined(__AVX__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#elif ER_VECTOR_BYTES == 16 && defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
#else
  uint32_t out = 0;
  for (int i = 0; i < kLanes; i++) out |= (static_cast<uint32_t>(mask[i]) & 1u) << i;
  return out;
#endif
}
// Bit i is set where lane i is `least` or more.
inline uint32_t bits_from(VecI v, int32_t least) {
#if ER_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return _mm512_cmpge_epi32_mask((__m512i)v, _mm512_set1_epi32(least));
#else
  return mask_bits(v >= least);
#endif
}
// Bit i is set where lane i is more than `most`.
inline uint32_t bits_above(VecI v, int32_t most) {
#if ER_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return _mm512_cmpgt_epi32_mask((__m512i)v, _mm512_set1_epi32(most));
#else
  return mask_bits(v > most);
#endif
}
// The reverse of mask_bits: lane i is true where bit i of `word` is set.
inline VecI bits_mask(uint32_t word) { return (broadcast(static_cast<int32_t>(word)) & (1 << lane_index())) != 0; }

// v where bit i of `word` is set, else 0, NaN or not.
inline VecF keep_lanes(uint32_t word, VecF v) {
#if ER_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (VecF)_mm512_maskz_mov_ps(static_cast<__mmask16>(word), (__m512)v);
#else
  return (VecF)(bits_mask(word) & (VecI)v);
#endif
}

// Moves the lanes with set bits to `out` in order and returns their number; nothing beyond them is written.
inline int64_t compress(VecF v, uint32_t keep, float* out) {
#if ER_VECTOR_BYTES == 64 && defined(__AVX512F__)
  const int n = __builtin_popcount(keep);
  store_partial(out, (VecF)_mm512_maskz_compress_ps(static_cast<__mmask16>(keep), (__m512)v), n);
  return n;
#else
  int64_t n = 0;
  for (; keep; keep &= keep - 1) out[n++] = v[__builtin_ctz(keep)];
  return n;
#endif
}

template <int kStep, size_t... kLane>
inline void swap_blocks(VecF& a, VecF& b, std::index_sequence<kLane...>) {
  VecF low = __builtin_shufflevector(a, b, ((kLane & kStep) ? kLanes + kLane - kStep : kLane)...);
  b = __builtin_shufflevector(a, b, ((kLane & kStep) ? kLanes + kLane : kLane + kStep)...);
  a = low;
}
template <int kStep>
inline void transpose_stages(VecF* v) {
  for (int r = 0; r < kLanes; r++)
    if (!(r & kStep)) swap_blocks<kStep>(v[r], v[r + kStep], std::make_index_sequence<kLanes>());
  if constexpr (kStep > 1) transpose_stages<kStep / 2>(v);
}
// Transposes the square of kLanes vectors in place.
inline void transpose(VecF* v) { transpose_stages<kLanes / 2>(v); }

// Nearest integer, ties to even, for |x| < 2^22.
inline VecF round_even(VecF x) {
  const VecF magic = broadcast(12582912.0f);  // 1.5 · 2^23
  return (x + magic) - magic;
}
inline VecI to_int(VecF x) { return __builtin_convertvector(x, VecI); }
inline VecF to_float(VecI x) { return __builtin_convertvector(x, VecF); }

// e^x, error about 1 ulp between −87 and 88; saturates outside (never 0, never infinite); NaN stays NaN.
inline VecF exp(VecF x) {
  x = min(broadcast(88.3f), max(broadcast(-87.3f), x));
  VecF n = round_even(x * 1.44269504088896341f);
  VecF r = x - n * 0.693359375f;  // ln 2 in two parts (Cody and Waite): n times the first is exact
  r = r + n * 2.12194440e-4f;
  VecF p = broadcast(1.9875691500e-4f);  // Cephes expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * (VecF)((to_int(n) + 127) << 23);
}

// tanh x, relative error about 2e-7. Near 0 a polynomial (Cephes tanhf), since 1 − 2/(e^2x + 1) cancels there.
inline VecF tanh(VecF x) {
  VecF a = abs(x), z = x * x;
  VecF p = broadcast(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  VecF small = x + x * z * p;
  VecF big = 1.0f - 2.0f / (exp(2.0f * a) + 1.0f);
  big = (VecF)((VecI)big | ((VecI)x & INT32_MIN));
  return select(a < 0.625f, small, big);
}

// The normal distribution: Φ(x) and e^(−x²/2), which Φ is made from and the density is 0.3989 times. Relative error of
// Φ 4e-7 for |x| ≤ 3 and 4e-6 in the far lower tail, nearly all of it the rounding of x²/2.
struct Normal {
  VecF cdf, bell;
};
inline Normal normal(VecF x) {
  const VecF bell = exp(x * x * -0.5f);
  // e^(z²)·erfc(z)/2, z = |x|/√2, as t·P(t), t = 1/(1 + z/2): minimax fit for z ≤ 9.4, relative error 4.2e-8.
  const VecF t = 1.0f / (1.0f + abs(x) * 0.35355339059327376f);
  VecF p = broadcast(-0.0294235219f);
  p = p * t + 0.141743673f;
  p = p * t - 0.242468159f;
  p = p * t + 0.137731175f;
  p = p * t - 0.0124095738f;
  p = p * t + 0.100958266f;
  p = p * t + 0.121650117f;
  p = p * t + 0.141174006f;
  p = p * t + 0.141043997f;
  const VecF tail = t * p * bell;
  return {select(x < 0.0f, tail, 1.0f - tail), bell};
}

}  // namespace er::ER_ISA
