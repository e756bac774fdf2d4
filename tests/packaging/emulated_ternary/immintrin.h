// Stands in front of tests/packaging/emulated/immintrin.h: what the kernel of ternary_conv2d needs of AVX-512 besides.
#pragma once
#include_next <immintrin.h>

namespace emulated {

inline __m512i widened(__m256i numbers) {
  int16_t narrow[16];
  int32_t wide[16];
  memcpy(narrow, &numbers, sizeof(narrow));
  for (int i = 0; i < 16; i++) wide[i] = narrow[i];
  __m512i result;
  memcpy(&result, wide, sizeof(result));
  return result;
}

inline __m512 as_floats(__m512i numbers) {
  int32_t whole[16];
  float real[16];
  memcpy(whole, &numbers, sizeof(whole));
  for (int i = 0; i < 16; i++) real[i] = static_cast<float>(whole[i]);
  __m512 result;
  memcpy(&result, real, sizeof(result));
  return result;
}

}  // namespace emulated

#define _mm512_cvtepi16_epi32(numbers) emulated::widened(numbers)
#define _mm512_cvtepi32_ps(numbers) emulated::as_floats(numbers)
