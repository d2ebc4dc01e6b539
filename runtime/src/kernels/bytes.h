// Bytes to and from the lanes of vectors. Written with intrinsics on x86: GCC 12 turns __builtin_convertvector between
// bytes and wider lanes into one instruction a lane. (The zero-masked forms, since it also warns of its own header in
// the others.)
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../simd.h"

namespace er::ER_ISA {

// Lane i = p[i] for i < left, else 0. Reads no byte beyond.
inline VecI load_bytes(const uint8_t* p, int64_t left) {
  alignas(16) uint8_t bytes[16] = {};
  std::memcpy(bytes, p, left >= kLanes ? kLanes : static_cast<size_t>(left));
#if ER_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (VecI)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
#elif ER_VECTOR_BYTES == 32 && defined(__AVX2__)
  return (VecI)_mm256_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
#else
  VecI v;
  for (int i = 0; i < kLanes; i++) v[i] = bytes[i];
  return v;
#endif
}

// The low byte of each of the first min(left, kLanes) lanes, which hold 0 … 255.
inline void store_bytes(uint8_t* p, VecI v, int64_t left) {
  alignas(16) uint8_t bytes[16];
#if ER_VECTOR_BYTES == 64 && defined(__AVX512F__)
  _mm_store_si128(reinterpret_cast<__m128i*>(bytes), _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v));
#elif ER_VECTOR_BYTES == 32 && defined(__AVX2__)
  const __m256i wide = (__m256i)v;
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_store_si128(reinterpret_cast<__m128i*>(bytes), _mm_packus_epi16(words, words));
#else
  for (int i = 0; i < kLanes; i++) bytes[i] = static_cast<uint8_t>(v[i]);
#endif
  std::memcpy(p, bytes, left >= kLanes ? kLanes : static_cast<size_t>(left));
}

// Lane i = nibble i of the kLanes/2 bytes from p on, low nibble first; `count` bytes exist.
inline VecI load_nibbles(const uint8_t* p, int64_t count) {
  alignas(16) uint8_t bytes[16] = {};
  std::memcpy(bytes, p, count >= kLanes / 2 ? kLanes / 2 : static_cast<size_t>(count));
#if ER_VECTOR_BYTES == 64 && defined(__AVX512F__)
  const VecU64 pair = (VecU64)_mm512_maskz_cvtepu8_epi64(0xff, _mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
#elif ER_VECTOR_BYTES == 32 && defined(__AVX2__)
  const VecU64 pair = (VecU64)_mm256_cvtepu8_epi64(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
#else
  VecU64 pair;
  for (int i = 0; i < kLanes / 2; i++) pair[i] = bytes[i];
#endif
  // A byte in each u64: the low nibble goes to the even lane, the high one to the odd lane.
  return (VecI)((pair & 15) | (pair >> 4 << 32));
}

}  // namespace er::ER_ISA
