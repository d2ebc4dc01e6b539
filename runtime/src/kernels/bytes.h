// Lanes of one, two and four bytes, and nibbles, to and from one another. Written with intrinsics on x86: GCC 12 turns
// __builtin_convertvector between bytes and wider lanes into one instruction a lane, and takes 7 where one would do for
// halves. (The zero-masked forms, since it also warns of its own header in the others.)
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../simd.h"

// Moving the bytes of a vector that a mask selects together, and apart again (AVX-512 VBMI2), and counting the bits of
// its lanes (VPOPCNTDQ). Not all processors with AVX-512 have these, so functions that use them are compiled for them
// by themselves and called where byte_masks is true.
#if ER_VECTOR_BYTES == 64 && defined(__AVX512BW__)
#define ER_BYTE_MASKS __attribute__((noinline, target("avx512vbmi2,avx512vpopcntdq")))
namespace er {
extern bool byte_masks;  // isa.cpp: settled before any kernel is found
}
#endif

namespace er::ER_ISA {

inline VecI widen(VecB v) {
#if ER_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (VecI)_mm512_maskz_cvtepi8_epi32(0xffff, (__m128i)v);
#elif ER_VECTOR_BYTES == 32 && defined(__AVX2__)
  return (VecI)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)v));
#else
  return __builtin_convertvector(v, VecI);
#endif
}
inline VecU widen(VecH v) {
#if ER_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (VecU)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
#elif ER_VECTOR_BYTES == 32 && defined(__AVX2__)
  return (VecU)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, VecU);
#endif
}
// The low byte, or the low half, of each lane.
inline VecB narrow_to_bytes(VecI v) {
#if ER_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (VecB)_mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v);
#elif ER_VECTOR_BYTES == 32 && defined(__AVX2__)
  const __m256i low = _mm256_shuffle_epi8((__m256i)v, _mm256_set1_epi32(0x0c080400));
  return (VecB)_mm_cvtsi128_si64(_mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
#else
  return __builtin_convertvector(v, VecB);
#endif
}
inline VecH narrow_to_halves(VecU v) {
#if ER_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (VecH)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v);
#elif ER_VECTOR_BYTES == 32 && defined(__AVX2__)
  const __m256i low = _mm256_shuffle_epi8((__m256i)v, _mm256_set1_epi64x(0x0d0c090805040100));
  return (VecH)_mm_unpacklo_epi64(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
#else
  return __builtin_convertvector(v, VecH);
#endif
}

// Lane i = p[i], a bf16, for i < left, else 0. Reads no element beyond.
inline VecF load_bf16(const uint16_t* p, int64_t left) {
  VecH half{};
  if (left >= kLanes)
    std::memcpy(&half, p, sizeof half);
  else
    std::memcpy(&half, p, static_cast<size_t>(left) * sizeof *p);
  return (VecF)(widen(half) << 16);
}

// Lane i = p[i] for i < left, else 0. Reads no byte beyond.
inline VecI load_bytes(const uint8_t* p, int64_t left) {
#if ER_VECTOR_BYTES == 64 && defined(__AVX512F__)
  const __mmask16 inside = static_cast<__mmask16>(left >= kLanes ? 0xffff : (1u << left) - 1);
  return (VecI)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_maskz_loadu_epi8(inside, p));
#else
  VecB bytes{};
  if (left >= kLanes)
    std::memcpy(&bytes, p, sizeof bytes);
  else  // in a register: what was stored in pieces is waited for when it is loaded as one
    for (int64_t i = 0; i < left; i++) bytes[i] = static_cast<int8_t>(p[i]);
#if ER_VECTOR_BYTES == 32 && defined(__AVX2__)
  return (VecI)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)bytes));
#else
  return __builtin_convertvector(bytes, VecI) & 255;
#endif
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
  uint64_t bytes = 0;  // in a register: what was stored in pieces is waited for when it is loaded as one
  if (count >= kLanes / 2)
    std::memcpy(&bytes, p, kLanes / 2);
  else
    for (int64_t i = 0; i < count; i++) bytes |= uint64_t{p[i]} << 8 * i;
#if ER_VECTOR_BYTES == 64 && defined(__AVX512F__)
  const VecU64 pair = (VecU64)_mm512_maskz_cvtepu8_epi64(0xff, _mm_cvtsi64_si128(static_cast<int64_t>(bytes)));
#elif ER_VECTOR_BYTES == 32 && defined(__AVX2__)
  const VecU64 pair = (VecU64)_mm256_cvtepu8_epi64(_mm_cvtsi64_si128(static_cast<int64_t>(bytes)));
#else
  VecU64 pair;
  for (int i = 0; i < kLanes / 2; i++) pair[i] = bytes >> 8 * i & 255;
#endif
  // A byte in each u64: the low nibble goes to the even lane, the high one to the odd lane.
  return (VecI)((pair & 15) | (pair >> 4 << 32));
}

// The reverse, of lanes 0 … 15; the first min(bytes, kLanes / 2) bytes are stored.
inline void store_nibbles(uint8_t* p, VecI v, int64_t bytes) {
  VecU64 pair = (VecU64)v;  // two lanes: the even one in the low half
  pair = pair | (pair >> 28);
  typedef uint8_t Bytes __attribute__((vector_size(kLanes / 2)));
#if ER_VECTOR_BYTES == 64 && defined(__AVX512F__)
  const Bytes packed = (Bytes)_mm_cvtsi128_si64(_mm512_maskz_cvtepi64_epi8(0xff, (__m512i)pair));
#else
  const Bytes packed = __builtin_convertvector(pair, Bytes);
#endif
  std::memcpy(p, &packed, bytes >= kLanes / 2 ? kLanes / 2 : static_cast<size_t>(bytes));
}

}  // namespace er::ER_ISA
