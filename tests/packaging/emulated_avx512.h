// In the place of <immintrin.h>: AVX-512 by SIMDe's portable functions, so that kernels for it run on any processor.
// Test only. It proves values and reads, not speed, and nothing about instructions that SIMDe lacks, which are here.
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#define SIMDE_X86_AVX512F_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <cstring>

#include "dtype.h"  // of csrc/common

typedef simde__mmask16 __mmask16;
typedef simde__mmask8 __mmask8;

namespace emulated {

template <typename Register, typename T>
inline Register load(const T* from, unsigned mask) {
  constexpr int kCount = sizeof(Register) / sizeof(T);
  T values[kCount] = {};
  for (int i = 0; i < kCount; i++) {
    if (mask >> i & 1) values[i] = from[i];
  }
  Register out;
  std::memcpy(&out, values, sizeof(out));
  return out;
}

template <typename Register, typename T>
inline void store(T* to, unsigned mask, Register from) {
  constexpr int kCount = sizeof(Register) / sizeof(T);
  T values[kCount];
  std::memcpy(values, &from, sizeof(from));
  for (int i = 0; i < kCount; i++) {
    if (mask >> i & 1) to[i] = values[i];
  }
}

template <typename To, typename Lane, typename From, typename Source, typename Function>
inline To map(From from, Function function) {
  constexpr int kCount = sizeof(To) / sizeof(Lane);
  Source source[kCount];
  Lane lanes[kCount];
  std::memcpy(source, &from, sizeof(source));
  for (int i = 0; i < kCount; i++) lanes[i] = function(source[i]);
  To out;
  std::memcpy(&out, lanes, sizeof(out));
  return out;
}

}  // namespace emulated

inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const float* from) { return emulated::load<__m512>(from, mask); }
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* from) {
  return emulated::load<__m256i>(static_cast<const uint16_t*>(from), mask);
}
inline void _mm512_mask_storeu_ps(float* to, __mmask16 mask, __m512 from) { emulated::store(to, mask, from); }
inline void _mm256_mask_storeu_epi16(void* to, __mmask16 mask, __m256i from) {
  emulated::store(static_cast<uint16_t*>(to), mask, from);
}
inline __m512i _mm512_cvtepu16_epi32(__m256i from) {
  return emulated::map<__m512i, uint32_t, __m256i, uint16_t>(from, [](uint16_t x) { return uint32_t{x}; });
}
inline __m256i _mm512_cvtepi32_epi16(__m512i from) {
  return emulated::map<__m256i, uint16_t, __m512i, uint32_t>(from, [](uint32_t x) { return static_cast<uint16_t>(x); });
}
inline __m512 _mm512_cvtph_ps(__m256i from) {
  return emulated::map<__m512, float, __m256i, uint16_t>(
      from, [](uint16_t x) { return basisconv::to_float(basisconv::f16{x}); });
}
inline __m256i emulated_cvtps_ph(__m512 from) {
  return emulated::map<__m256i, uint16_t, __m512, float>(from, [](float x) {
    basisconv::f16 half;
    basisconv::from_float(x, &half);
    return half.bits;
  });
}
#define _mm512_cvtps_ph(from, rounding) emulated_cvtps_ph(from)  // to nearest, ties to even
inline __m512 _mm512_permute_ps(__m512 from, int picks) {
  float source[16], to[16];
  std::memcpy(source, &from, sizeof(source));
  for (int i = 0; i < 16; i++) to[i] = source[i / 4 * 4 + (picks >> i % 4 * 2 & 3)];
  return emulated::load<__m512>(to, 0xffff);
}
inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int picks) {
  float first[16], second[16], to[16];
  std::memcpy(first, &a, sizeof(first));
  std::memcpy(second, &b, sizeof(second));
  for (int i = 0; i < 16; i++) {
    // A pointer, since GCC 12 under UBSan computes the index of (condition ? array : array)[index] in one branch alone.
    const float* from = i < 8 ? first : second;
    to[i] = from[(picks >> i / 4 * 2 & 3) * 4 + i % 4];
  }
  return emulated::load<__m512>(to, 0xffff);
}
