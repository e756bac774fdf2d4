// Stands in front of the compiler's <immintrin.h>: AVX-512 and AMX of the binary kernels on processors that lack them.
// SIMDe (MIT, Debian's libsimde-dev) has most of it; here is what its release lacks. For test_binary_without_torch.py
// only.
#pragma once
#include_next <immintrin.h>
#define SIMDE_ENABLE_NATIVE_ALIASES
#define SIMDE_NO_INLINE  // calls compile in seconds; inline, the unrolled kernels take minutes
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include <simde/x86/avx512.h>

namespace emulated {

template <typename To, typename From>
inline To each(const From& from) {  // elements of `From` to those of `To`
  To to;
  for (size_t i = 0; i < sizeof(to.at) / sizeof(to.at[0]); i++) to.at[i] = from.at[i];
  return to;
}
template <typename T, int N>
struct Lanes {
  T at[N];
};
template <typename To, typename From>
inline To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline __m512i widen(__m256i value) {
  return same_bits<__m512i>(each<Lanes<uint32_t, 16>>(same_bits<Lanes<uint16_t, 16>>(value)));
}
inline __m256i narrow(__m512i value) {
  return same_bits<__m256i>(each<Lanes<uint16_t, 16>>(same_bits<Lanes<uint32_t, 16>>(value)));
}
// Nothing is read or written behind a mask.
template <typename T, typename Register>
inline Register load(uint64_t mask, const void* from) {
  Lanes<T, sizeof(Register) / sizeof(T)> lanes{};
  for (size_t i = 0; i < sizeof(Register) / sizeof(T); i++) {
    if (mask >> i & 1) std::memcpy(lanes.at + i, static_cast<const T*>(from) + i, sizeof(T));
  }
  return same_bits<Register>(lanes);
}
template <typename T, typename Register>
inline void store(void* to, uint64_t mask, Register value) {
  const auto lanes = same_bits<Lanes<T, sizeof(Register) / sizeof(T)>>(value);
  for (size_t i = 0; i < sizeof(Register) / sizeof(T); i++) {
    if (mask >> i & 1) std::memcpy(static_cast<T*>(to) + i, lanes.at + i, sizeof(T));
  }
}
inline __m512 from_f16(__m256i value) {
  const Lanes<__m256, 2> halves{
      {_mm256_cvtph_ps(_mm256_castsi256_si128(value)), _mm256_cvtph_ps(_mm256_extracti128_si256(value, 1))}};
  return same_bits<__m512>(halves);
}
inline __m256i to_f16(__m512 value) {
  const auto halves = same_bits<Lanes<__m256, 2>>(value);
  return _mm256_set_m128i(_mm256_cvtps_ph(halves.at[1], 0), _mm256_cvtps_ph(halves.at[0], 0));
}

inline __m512 to_floats(__m512i value) {
  return same_bits<__m512>(each<Lanes<float, 16>>(same_bits<Lanes<int32_t, 16>>(value)));
}

}  // namespace emulated

#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepi32_epi16
#undef _mm512_cvtph_ps
#undef _mm512_cvtps_ph
#undef _mm256_maskz_loadu_epi16
#undef _mm512_maskz_loadu_ps
#undef _mm256_mask_storeu_epi16
#undef _mm512_mask_storeu_ps
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps(value) emulated::to_floats(value)
#define _mm512_cvtepu16_epi32(value) emulated::widen(value)
#define _mm512_cvtepi32_epi16(value) emulated::narrow(value)
#define _mm512_cvtph_ps(value) emulated::from_f16(value)
#define _mm512_cvtps_ph(value, rounding) emulated::to_f16(value)  // the kernels ask for the nearest only
#define _mm256_maskz_loadu_epi16(mask, from) emulated::load<uint16_t, __m256i>(mask, from)
#define _mm512_maskz_loadu_ps(mask, from) emulated::load<float, __m512>(mask, from)
#define _mm256_mask_storeu_epi16(to, mask, value) emulated::store<uint16_t>(to, mask, value)
#define _mm512_mask_storeu_ps(to, mask, value) emulated::store<float>(to, mask, value)

#include "../emulated/amx.h"
