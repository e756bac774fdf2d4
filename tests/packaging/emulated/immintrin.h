// Stands in front of the compiler's <immintrin.h>: 512-bit vectors, products of bfloat16 and the matrix unit on
// processors that have none, so that the sources for them run, bit for bit, where only AVX2 is. SIMDe (MIT, Debian's
// libsimde-dev) has most of it; here is what its release lacks, and what it would do by touching memory behind a mask.
// Slow, for tests only: test_kernels_without_torch.py.
#pragma once
#include_next <immintrin.h>
#define SIMDE_ENABLE_NATIVE_ALIASES
#define SIMDE_NO_INLINE  // calls compile in seconds; inline, the unrolled kernels take minutes
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include <simde/x86/avx512.h>

namespace emulated {

// Element by element, as lanes of T; nothing is read or written behind a mask.
template <typename T, int N>
struct Lanes {
  T at[N];
};
template <typename To, typename From>
inline To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
template <typename Register, typename T>
inline Register load(uint64_t mask, const void* from) {
  Lanes<T, sizeof(Register) / sizeof(T)> lanes{};
  for (size_t i = 0; i < sizeof(Register) / sizeof(T); i++) {
    if (mask >> i & 1) memcpy(lanes.at + i, static_cast<const T*>(from) + i, sizeof(T));
  }
  return same_bits<Register>(lanes);
}
template <typename T, typename Register>
inline void store(void* to, uint64_t mask, Register value) {
  const auto lanes = same_bits<Lanes<T, sizeof(Register) / sizeof(T)>>(value);
  for (size_t i = 0; i < sizeof(Register) / sizeof(T); i++) {
    if (mask >> i & 1) memcpy(static_cast<T*>(to) + i, lanes.at + i, sizeof(T));
  }
}
inline __m512 join(__m256 low, __m256 high) { return same_bits<__m512>(Lanes<__m256, 2>{{low, high}}); }

// Four lanes of 128 bits: two of a, then two of b.
template <int WHICH>
inline __m512 shuffle_lanes(__m512 a, __m512 b) {
  const auto of_a = same_bits<Lanes<__m128, 4>>(a), of_b = same_bits<Lanes<__m128, 4>>(b);
  return same_bits<__m512>(Lanes<__m128, 4>{
      {of_a.at[WHICH & 3], of_a.at[WHICH >> 2 & 3], of_b.at[WHICH >> 4 & 3], of_b.at[WHICH >> 6 & 3]}});
}
inline __m512i widen(__m256i value) {
  const auto from = same_bits<Lanes<uint16_t, 16>>(value);
  Lanes<uint32_t, 16> to;
  for (int i = 0; i < 16; i++) to.at[i] = from.at[i];
  return same_bits<__m512i>(to);
}
inline __m256i narrow(__m512i value) {
  const auto from = same_bits<Lanes<uint32_t, 16>>(value);
  Lanes<uint16_t, 16> to;
  for (int i = 0; i < 16; i++) to.at[i] = static_cast<uint16_t>(from.at[i]);
  return same_bits<__m256i>(to);
}
inline __m512 from_f16(__m256i value) {
  return join(_mm256_cvtph_ps(_mm256_castsi256_si128(value)), _mm256_cvtph_ps(_mm256_extracti128_si256(value, 1)));
}
inline __m256i to_f16(__m512 value) {
  const auto halves = same_bits<Lanes<__m256, 2>>(value);
  return _mm256_set_m128i(_mm256_cvtps_ph(halves.at[1], 0), _mm256_cvtps_ph(halves.at[0], 0));
}
// To nearest even; NaN stays one, and subnormal numbers become zero, as the instruction has it.
inline __m256i to_bf16(__m512 value) {
  const auto from = same_bits<Lanes<uint32_t, 16>>(value);
  Lanes<uint16_t, 16> to;
  for (int i = 0; i < 16; i++) {
    const uint32_t bits = from.at[i], magnitude = bits & 0x7fffffffu;
    const uint32_t rounded = magnitude > 0x7f800000u   ? bits | 0x400000u
                             : magnitude < 0x00800000u ? bits & 0x80000000u
                                                       : bits + 0x7fffu + (bits >> 16 & 1u);
    to.at[i] = static_cast<uint16_t>(rounded >> 16);
  }
  return same_bits<__m256i>(to);
}
inline __m512i to_bf16(__m512 high, __m512 low) {
  return same_bits<__m512i>(Lanes<__m256i, 2>{{to_bf16(low), to_bf16(high)}});
}

// sums[i] + both products of pair i, subnormal numbers as zero.
template <typename Pairs>
inline __m512 multiply_pairs(__m512 sums, Pairs a, Pairs b) {
  auto to = same_bits<Lanes<float, 16>>(sums);
  const auto left = same_bits<Lanes<uint16_t, 32>>(a), right = same_bits<Lanes<uint16_t, 32>>(b);
  const auto value = [](uint16_t bits) {
    return same_bits<float>(static_cast<uint32_t>((bits & 0x7f80u) == 0 ? bits & 0x8000u : bits) << 16);
  };
  for (int i = 0; i < 16; i++) {
    for (int j = 2 * i; j < 2 * i + 2; j++) to.at[i] += value(left.at[j]) * value(right.at[j]);
  }
  return same_bits<__m512>(to);
}

}  // namespace emulated

#undef _mm256_maskz_loadu_epi16
#undef _mm512_maskz_loadu_epi16
#undef _mm512_maskz_loadu_ps
#undef _mm256_mask_storeu_epi16
#undef _mm512_mask_storeu_epi16
#undef _mm512_mask_storeu_ps
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepi32_epi16
#undef _mm512_cvtph_ps
#undef _mm512_cvtps_ph
#undef _mm512_cvtneps_pbh
#undef _mm512_cvtne2ps_pbh
#undef _mm512_dpbf16_ps
#undef _mm512_permute_ps
#undef _mm512_shuffle_f32x4
#define _mm256_maskz_loadu_epi16(mask, from) emulated::load<__m256i, uint16_t>(mask, from)
#define _mm512_maskz_loadu_epi16(mask, from) emulated::load<__m512i, uint16_t>(mask, from)
#define _mm512_maskz_loadu_ps(mask, from) emulated::load<__m512, float>(mask, from)
#define _mm256_mask_storeu_epi16(to, mask, value) emulated::store<uint16_t>(to, mask, value)
#define _mm512_mask_storeu_epi16(to, mask, value) emulated::store<uint16_t>(to, mask, value)
#define _mm512_mask_storeu_ps(to, mask, value) emulated::store<float>(to, mask, value)
#define _mm512_cvtepu16_epi32(value) emulated::widen(value)
#define _mm512_cvtepi32_epi16(value) emulated::narrow(value)
#define _mm512_cvtph_ps(value) emulated::from_f16(value)
#define _mm512_cvtps_ph(value, rounding) emulated::to_f16(value)  // the kernels ask for the nearest only
#define _mm512_cvtneps_pbh(value) emulated::to_bf16(value)
#define _mm512_cvtne2ps_pbh(high, low) emulated::to_bf16(high, low)
#define _mm512_dpbf16_ps(sums, a, b) emulated::multiply_pairs(sums, a, b)
#define _mm512_permute_ps(value, which) simde_mm512_shuffle_ps(value, value, which)
#define _mm512_shuffle_f32x4(a, b, which) emulated::shuffle_lanes<which>(a, b)

#include "amx.h"
