// One row of pixels to words: what bitpack and the convolutions with a real input share.
//
// The bit is value >= 0: a comparison, not the sign bit, so that -0 counts as +0 and NaN gives 0. Where channels lie
// side by side a register of them becomes a mask; where pixels do, a register holds one word of several pixels and each
// channel adds its bit to it; any other layout is read number by number.
#pragma once
#include "../ops/bitpack.h"
#include "simd.h"

namespace basisconv {
namespace BASISCONV_ISA {

// One bit a lane, lowest first: v >= bound.
BASISCONV_INLINE uint32_t at_least(Vec::Reg v, Vec::Reg bound) {
#if defined(BASISCONV_AVX512)
  return _mm512_cmp_ps_mask(v, bound, _CMP_GE_OQ);
#elif defined(BASISCONV_AVX2)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, bound, _CMP_GE_OQ)));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kWidth; i++) mask |= static_cast<uint32_t>(v[i] >= bound[i]) << i;
  return mask;
#endif
}

// `count` <= 32 channels side by side.
template <typename T>
BASISCONV_INLINE uint32_t sign_word(const T* x, int64_t count) {
  const Vec::Reg zero = Vec::zero();
  uint32_t word = 0;
  int64_t c = 0;
  for (; c + kWidth <= count; c += kWidth) word |= at_least(Vec::load(x + c), zero) << c;
  // Lanes behind the last channel hold zeros, which count as +: masked off.
  if (c < count) word |= (at_least(Vec::load_n(x + c, count - c), zero) & ((1u << (count - c)) - 1u)) << c;
  return word;
}

// Words of `kWidth` neighbouring pixels, one lane each: bit c of lane i is x[c * stride_c + i] >= 0.
template <typename T>
BASISCONV_INLINE void sign_words_of_pixels(const T* x, int64_t stride_c, int64_t channels, uint32_t* lanes) {
#if defined(BASISCONV_AVX512)
  __m512i words = _mm512_setzero_si512();
  for (int64_t c = 0; c < channels; c++) {
    const __mmask16 plus = static_cast<__mmask16>(at_least(Vec::load(x + c * stride_c), Vec::zero()));
    words = _mm512_mask_or_epi32(words, plus, words, _mm512_set1_epi32(static_cast<int>(1u << c)));
  }
  _mm512_storeu_si512(lanes, words);
#elif defined(BASISCONV_AVX2)
  __m256i words = _mm256_setzero_si256();
  for (int64_t c = 0; c < channels; c++) {
    const __m256 plus = _mm256_cmp_ps(Vec::load(x + c * stride_c), Vec::zero(), _CMP_GE_OQ);
    words = _mm256_or_si256(words,
                            _mm256_and_si256(_mm256_castps_si256(plus), _mm256_set1_epi32(static_cast<int>(1u << c))));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), words);
#else
  uint32_t words[kWidth] = {};
  for (int64_t c = 0; c < channels; c++) {
    const uint32_t plus = at_least(Vec::load(x + c * stride_c), Vec::zero());
    for (int i = 0; i < kWidth; i++) words[i] |= ((plus >> i) & 1u) << c;
  }
  memcpy(lanes, words, sizeof(words));
#endif
}

// Signs of W pixels with C channels → out[W][words_for(C)].
template <typename T>
static void sign_row(const T* x, int64_t stride_c, int64_t stride_w, int64_t C, int64_t W, uint32_t* out) {
  const int64_t words = words_for(C);
  if (stride_c == 1) {
    for (int64_t w = 0; w < W; w++, x += stride_w) {
      for (int64_t c = 0; c < C; c += kWordBits) *out++ = sign_word(x + c, C - c < kWordBits ? C - c : kWordBits);
    }
    return;
  }
  int64_t w = 0;
  if (stride_w == 1) {
    uint32_t lanes[kWidth];
    for (; w + kWidth <= W; w += kWidth) {
      for (int64_t j = 0; j < words; j++) {
        const int64_t left = C - j * kWordBits, channels = left < kWordBits ? left : kWordBits;
        sign_words_of_pixels(x + w + j * kWordBits * stride_c, stride_c, channels, lanes);
        for (int i = 0; i < kWidth; i++) out[(w + i) * words + j] = lanes[i];
      }
    }
  }
  for (; w < W; w++) {
    for (int64_t j = 0; j < words; j++) {
      uint32_t word = 0;
      for (int64_t c = j * kWordBits; c < C && c < (j + 1) * kWordBits; c++) {
        word |= static_cast<uint32_t>(to_float(x[w * stride_w + c * stride_c]) >= 0.0f) << (c % kWordBits);
      }
      out[w * words + j] = word;
    }
  }
}

}  // namespace BASISCONV_ISA
}  // namespace basisconv
