// What the register tiles of basis_conv2d multiply: 32-bit slots of operands, a register of them at a time.
//
// A slot is one float; or, on a set with products of bfloat16 pairs (BASISCONV_PAIRS), two bfloat16 values that lie
// side by side: multiply_add(a, b, c) is then c[i] + a[2i]*b[2i] + a[2i+1]*b[2i+1], summed in float, where subnormal
// numbers count as zero. z is kept in the same form, as it is the operand of the second stage.
#pragma once
#include "simd.h"

namespace basisconv {
namespace BASISCONV_ISA {

#if defined(BASISCONV_PAIRS)

struct Slots {
  using Value = bf16;
  using Reg = Vec::Reg;
  static constexpr int kValues = 2;  // of a slot
  static BASISCONV_INLINE Reg load(const bf16* p) { return _mm512_loadu_ps(reinterpret_cast<const float*>(p)); }
  static BASISCONV_INLINE void store(bf16* p, Reg v) { _mm512_storeu_ps(reinterpret_cast<float*>(p), v); }
  // Value `which` of each slot of a register, as floats.
  static BASISCONV_INLINE Reg values(const bf16* p, int64_t which) {
    const __m512i pairs = _mm512_castps_si512(load(p));
    return _mm512_castsi512_ps(which == 0 ? _mm512_slli_epi32(pairs, 16)
                                          : _mm512_and_si512(pairs, _mm512_set1_epi32(-65536)));
  }
  // L slots at p, repeated over the register.
  template <int L>
  static BASISCONV_INLINE Reg broadcast(const bf16* p) {
    if constexpr (L == 1) {
      int32_t pair;
      memcpy(&pair, p, 4);
      return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
    } else {
      return Vec::broadcast<L>(reinterpret_cast<const float*>(p));
    }
  }
  static BASISCONV_INLINE Reg multiply_add(Reg a, Reg b, Reg c) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
  // The sums of one or two registers over L neighbouring lanes, rounded, one after the other.
  template <int L>
  static BASISCONV_INLINE void store_sums(bf16* p, Reg s) {
    const __m256i sums = Vec::to_bf16(Vec::sums<L>(s));
    if constexpr (L == 1) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), sums);
    if constexpr (L == 2) _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(sums));
    if constexpr (L >= 4) memcpy(p, &sums, 2 * Vec::kWidth / L);
  }
  template <int L>
  static BASISCONV_INLINE void store_sums(bf16* p, Reg s, Reg t) {
    if constexpr (L == 1) {
      store_sums<1>(p, s);
      store_sums<1>(p + Vec::kWidth, t);
    } else {
      store_sums<L / 2>(p, Vec::sums_of_pairs(s, t));
    }
  }
  // Two registers of two pixels.
  template <int L>
  static BASISCONV_INLINE void store_sums(bf16* p, Reg s, bf16* q, Reg t) {
    if constexpr (L == 1) {
      store_sums<1>(p, s);
      store_sums<1>(q, t);
    } else {
      constexpr int kBytes = 2 * Vec::kWidth / L;
      const __m256i sums = Vec::to_bf16(Vec::sums<L / 2>(Vec::sums_of_pairs(s, t)));
      memcpy(p, &sums, kBytes);
      memcpy(q, reinterpret_cast<const char*>(&sums) + kBytes, kBytes);
    }
  }
};

#else

struct Slots {
  using Value = float;
  using Reg = Vec::Reg;
  static constexpr int kValues = 1;
  static BASISCONV_INLINE Reg load(const float* p) { return Vec::load(p); }
  static BASISCONV_INLINE void store(float* p, Reg v) { Vec::store(p, v); }
  static BASISCONV_INLINE Reg values(const float* p, int64_t) { return Vec::load(p); }
  template <int L>
  static BASISCONV_INLINE Reg broadcast(const float* p) {
    return Vec::broadcast<L>(p);
  }
  static BASISCONV_INLINE Reg multiply_add(Reg a, Reg b, Reg c) { return Vec::fma(a, b, c); }
  template <int L>
  static BASISCONV_INLINE void store_sums(float* p, Reg s) {
    Vec::store_sums<L>(p, s);
  }
  template <int L>
  static BASISCONV_INLINE void store_sums(float* p, Reg s, Reg t) {
    Vec::store_sums<L>(p, s, t);
  }
  template <int L>
  static BASISCONV_INLINE void store_sums(float* p, Reg s, float* q, Reg t) {
    Vec::store_sums<L>(p, s);
    Vec::store_sums<L>(q, t);
  }
};

#endif

// Values in a register of slots.
constexpr int kRegisterValues = Slots::kValues * kWidth;

}  // namespace BASISCONV_ISA
}  // namespace basisconv
