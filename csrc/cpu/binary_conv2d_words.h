// A tile of pixels x filters with 32-bit lanes: one filter a lane, a word of each pixel broadcast, xor, popcount, add.
// No sum across lanes, no unfolded input. With VPOPCNTDQ that is three instructions for 512 pairs of bits; adders that
// save popcounts need three as well. Elsewhere a popcount is a few shifts and adds.
#pragma once
#include "binary_conv2d_rows.h"

#if defined(__aarch64__) && !defined(BASISCONV_VPOPCNTDQ)
#include <arm_neon.h>
#endif

namespace basisconv {
namespace BASISCONV_ISA {

#if defined(BASISCONV_VPOPCNTDQ)

struct Words {
  using Reg = __m512i;
  static constexpr int kLanes = 16;
  static constexpr int kMostVectors = 2;
  static constexpr int kPixels = 7;
  static BASISCONV_INLINE Reg zero() { return _mm512_setzero_si512(); }
  static BASISCONV_INLINE Reg load(const void* p) { return _mm512_loadu_si512(p); }
  static BASISCONV_INLINE Reg broadcast(uint32_t word) { return _mm512_set1_epi32(static_cast<int>(word)); }
  static BASISCONV_INLINE Reg add_count(Reg sum, Reg a, Reg w) {
    return _mm512_add_epi32(sum, _mm512_popcnt_epi32(_mm512_xor_si512(a, w)));
  }
  static BASISCONV_INLINE void store(int32_t* p, Reg v) { _mm512_storeu_si512(p, v); }
};

#else

struct Words {
  typedef uint32_t Reg __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr int kMostVectors = 2;
  static constexpr int kPixels = 2;
  static BASISCONV_INLINE Reg zero() { return Reg{0, 0, 0, 0}; }
  static BASISCONV_INLINE Reg load(const void* p) {
    Reg v;
    memcpy(&v, p, 16);
    return v;
  }
  static BASISCONV_INLINE Reg broadcast(uint32_t word) { return Reg{word, word, word, word}; }
  static BASISCONV_INLINE Reg add_count(Reg sum, Reg a, Reg w) {
#if defined(__aarch64__)
    const uint8x16_t bytes = vcntq_u8(vreinterpretq_u8_u32((uint32x4_t)(a ^ w)));
    return sum + (Reg)vpaddlq_u16(vpaddlq_u8(bytes));
#else
    Reg x = a ^ w;  // counts of 2, 4, 8 and 16 bits, then of the word
    x -= (x >> 1) & 0x55555555u;
    x = (x & 0x33333333u) + ((x >> 2) & 0x33333333u);
    x = (x + (x >> 4)) & 0x0f0f0f0fu;
    x += x >> 8;
    x += x >> 16;
    return sum + (x & 0x3fu);
#endif
  }
  static BASISCONV_INLINE void store(int32_t* p, Reg v) { memcpy(p, &v, 16); }
};

#endif

// raw[pixel][filter] of one plane and one block of filters.
template <int P, int F>
static BASISCONV_INLINE void count_words(const Taps& taps, const uint8_t* bits, int32_t* raw) {
  constexpr int kBlock = F * Words::kLanes;
  Words::Reg sums[P][F];
  BASISCONV_UNROLL for (int i = 0; i < P; i++) {
    BASISCONV_UNROLL for (int f = 0; f < F; f++) sums[i][f] = Words::zero();
  }
  const uint32_t* w = reinterpret_cast<const uint32_t*>(bits);
  for (int64_t r = 0; r < taps.count; r++) {
    for (int64_t run = 0; run < taps.runs; run++) {
      const uint8_t* a = taps.rows[r] + taps.offset + run * taps.run_step;
      for (int64_t u = 0; u < taps.run_units; u++, a += 4, w += kBlock) {
        Words::Reg filters[F];
        BASISCONV_UNROLL for (int f = 0; f < F; f++) filters[f] = Words::load(w + f * Words::kLanes);
        BASISCONV_UNROLL for (int i = 0; i < P; i++) {
          uint32_t word;
          memcpy(&word, a + i * taps.pixel_step, 4);
          const Words::Reg pixel = Words::broadcast(word);
          BASISCONV_UNROLL for (int f = 0; f < F; f++) sums[i][f] = Words::add_count(sums[i][f], pixel, filters[f]);
        }
      }
    }
  }
  BASISCONV_UNROLL for (int i = 0; i < P; i++) {
    BASISCONV_UNROLL for (int f = 0; f < F; f++) Words::store(raw + i * kBlock + f * Words::kLanes, sums[i][f]);
  }
}

}  // namespace BASISCONV_ISA
}  // namespace basisconv
