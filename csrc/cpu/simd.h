// One vector of floats on the instruction set that this translation unit is compiled for.
//
// `Vec` is the whole vocabulary of the kernels: zero, load, store, fma, broadcast of L neighbouring floats, loads and
// stores of n < kWidth elements, and conversions from and to the 16-bit types. Everything lives in a namespace named
// after the instruction set (BASISCONV_ISA: avx512, avx2 or base), so that no symbol of one set can be linked into
// another. `base` uses the compiler's vector extension and serves every other processor.
#pragma once
#include <cstdint>
#include <cstring>

#include "../common/dtype.h"

#if defined(BASISCONV_AVX512) || defined(BASISCONV_AVX2)
#include <immintrin.h>
#endif

#define BASISCONV_UNROLL _Pragma("GCC unroll 32")
#define BASISCONV_INLINE inline __attribute__((always_inline))
#define BASISCONV_LAMBDA __attribute__((always_inline))
#define BASISCONV_NOINLINE __attribute__((noinline))

namespace basisconv {
namespace BASISCONV_ISA {

#if defined(BASISCONV_AVX512)

static const int32_t kEvenThenOdd[32] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                         1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};

struct Vec {
  using Reg = __m512;
  static constexpr int kWidth = 16;
  static constexpr int kAccumulators = 28;  // of 32 registers; the rest hold weights and one broadcast
  static BASISCONV_INLINE __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static BASISCONV_INLINE Reg zero() { return _mm512_setzero_ps(); }
  static BASISCONV_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static BASISCONV_INLINE Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static BASISCONV_INLINE Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static BASISCONV_INLINE Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  // NaN-keeping clamps: the second operand is returned when one is NaN.
  static BASISCONV_INLINE Reg max(Reg bound, Reg a) { return _mm512_max_ps(bound, a); }
  static BASISCONV_INLINE Reg min(Reg bound, Reg a) { return _mm512_min_ps(bound, a); }
  static BASISCONV_INLINE Reg set1(float a) { return _mm512_set1_ps(a); }

  static BASISCONV_INLINE Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static BASISCONV_INLINE Reg load(const bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static BASISCONV_INLINE Reg load(const f16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static BASISCONV_INLINE Reg load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static BASISCONV_INLINE Reg load_n(const bf16* p, int64_t n) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static BASISCONV_INLINE Reg load_n(const f16* p, int64_t n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
  }

  static BASISCONV_INLINE __m256i to_bf16(Reg v) {
#if defined(BASISCONV_PAIRS)
    return (__m256i)_mm512_cvtneps_pbh(v);  // subnormal numbers become zero
#else
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
  }
  static BASISCONV_INLINE __m256i to_f16(Reg v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  static BASISCONV_INLINE void store(float* p, Reg v) { _mm512_storeu_ps(p, v); }
  static BASISCONV_INLINE void store(bf16* p, Reg v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(v)); }
  static BASISCONV_INLINE void store(f16* p, Reg v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16(v)); }
  static BASISCONV_INLINE void store_n(float* p, Reg v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }
  static BASISCONV_INLINE void store_n(bf16* p, Reg v, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), to_bf16(v)); }
  static BASISCONV_INLINE void store_n(f16* p, Reg v, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), to_f16(v)); }

  // L floats at p, repeated over the register.
  template <int L>
  static BASISCONV_INLINE Reg broadcast(const float* p) {
    if constexpr (L == 1) return _mm512_set1_ps(*p);
    if constexpr (L == 2) {
      double both;
      memcpy(&both, p, 8);
      return _mm512_castpd_ps(_mm512_set1_pd(both));
    }
    if constexpr (L == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
    if constexpr (L == 8) return _mm512_broadcast_f32x8(_mm256_loadu_ps(p));
    return load(p);
  }

  // Sums of L neighbouring lanes, in the first kWidth/L lanes.
  template <int L>
  static BASISCONV_INLINE Reg sums(Reg s) {
    if constexpr (L == 1) return s;
    constexpr __mmask16 keep = L == 2 ? 0x5555 : L == 4 ? 0x1111 : 0x0101;
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0xB1));
    if constexpr (L >= 4) s = _mm512_add_ps(s, _mm512_permute_ps(s, 0x4E));
    if constexpr (L >= 8) s = _mm512_add_ps(s, _mm512_shuffle_f32x4(s, s, 0xB1));
    return _mm512_maskz_compress_ps(keep, s);
  }
  // Sums of two neighbouring lanes of s, then of t.
  static BASISCONV_INLINE Reg sums_of_pairs(Reg s, Reg t) {
    // Loaded when they are needed: in registers all the time, they would push accumulators out.
    const int32_t* places = kEvenThenOdd;
    asm volatile("" : "+r"(places));
    const __m512i even = _mm512_loadu_si512(places), odd = _mm512_loadu_si512(places + 16);
    return _mm512_add_ps(_mm512_permutex2var_ps(s, even, t), _mm512_permutex2var_ps(s, odd, t));
  }
  // Sums of L neighbouring lanes: kWidth/L results, stored contiguously.
  template <int L>
  static BASISCONV_INLINE void store_sums(float* p, Reg s) {
    s = sums<L>(s);
    if constexpr (L == 1) store(p, s);
    if constexpr (L == 2) _mm256_storeu_ps(p, _mm512_castps512_ps256(s));
    if constexpr (L == 4) _mm_storeu_ps(p, _mm512_castps512_ps128(s));
    if constexpr (L == 8) _mm_storel_pi(reinterpret_cast<__m64*>(p), _mm512_castps512_ps128(s));
  }
  // The same for two registers, stored one after the other; cheaper than twice one.
  template <int L>
  static BASISCONV_INLINE void store_sums(float* p, Reg s, Reg t) {
    if constexpr (L == 1) {
      store(p, s);
      store(p + kWidth, t);
    } else {
      store_sums<L / 2>(p, sums_of_pairs(s, t));
    }
  }
};

#elif defined(BASISCONV_AVX2)

struct Vec {
  using Reg = __m256;
  static constexpr int kWidth = 8;
  static constexpr int kAccumulators = 12;  // of 16 registers
  static BASISCONV_INLINE Reg zero() { return _mm256_setzero_ps(); }
  static BASISCONV_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static BASISCONV_INLINE Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static BASISCONV_INLINE Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static BASISCONV_INLINE Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static BASISCONV_INLINE Reg max(Reg bound, Reg a) { return _mm256_max_ps(bound, a); }
  static BASISCONV_INLINE Reg min(Reg bound, Reg a) { return _mm256_min_ps(bound, a); }
  static BASISCONV_INLINE Reg set1(float a) { return _mm256_set1_ps(a); }

  static BASISCONV_INLINE Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static BASISCONV_INLINE Reg load(const bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static BASISCONV_INLINE Reg load(const f16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <typename T>
  static BASISCONV_INLINE Reg load_n(const T* p, int64_t n) {
    float staged[kWidth] = {};
    for (int64_t i = 0; i < n; i++) staged[i] = to_float(p[i]);
    return load(staged);
  }

  static BASISCONV_INLINE __m128i to_bf16(Reg v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
    rounded = _mm256_srli_epi32(rounded, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  }
  static BASISCONV_INLINE void store(float* p, Reg v) { _mm256_storeu_ps(p, v); }
  static BASISCONV_INLINE void store(bf16* p, Reg v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(v)); }
  static BASISCONV_INLINE void store(f16* p, Reg v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  template <typename T>
  static BASISCONV_INLINE void store_n(T* p, Reg v, int64_t n) {
    T staged[kWidth];
    store(staged, v);
    memcpy(p, staged, n * sizeof(T));
  }

  template <int L>
  static BASISCONV_INLINE Reg broadcast(const float* p) {
    if constexpr (L == 1) return _mm256_broadcast_ss(p);
    if constexpr (L == 2) {
      double both;
      memcpy(&both, p, 8);
      return _mm256_castpd_ps(_mm256_set1_pd(both));
    }
    if constexpr (L == 4) return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
    return load(p);
  }

  template <int L>
  static BASISCONV_INLINE void store_sums(float* p, Reg s) {
    if constexpr (L == 1) {
      store(p, s);
    } else {
      s = _mm256_add_ps(s, _mm256_permute_ps(s, 0xB1));
      if constexpr (L >= 4) {
        s = _mm256_add_ps(s, _mm256_permute_ps(s, 0x4E));
        p[0] = _mm256_cvtss_f32(s);
        p[1] = _mm_cvtss_f32(_mm256_extractf128_ps(s, 1));
      } else {
        const __m256 even = _mm256_permutevar8x32_ps(s, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
        _mm_storeu_ps(p, _mm256_castps256_ps128(even));
      }
    }
  }
  template <int L>
  static BASISCONV_INLINE void store_sums(float* p, Reg s, Reg t) {
    if constexpr (L == 1) {
      store(p, s);
      store(p + kWidth, t);
    } else {
      const __m256d sums = _mm256_castps_pd(_mm256_hadd_ps(s, t));  // pairs of s, t, s, t
      s = _mm256_castpd_ps(_mm256_permute4x64_pd(sums, 0xD8));
      if constexpr (L == 2) {
        store(p, s);
      } else {
        store_sums<L / 2>(p, s);
      }
    }
  }
};

#else

struct Vec {
  typedef float Reg __attribute__((vector_size(16)));
  static constexpr int kWidth = 4;
#if defined(__aarch64__)
  static constexpr int kAccumulators = 24;  // of 32 registers
#else
  static constexpr int kAccumulators = 10;  // of 16 registers; without FMA a product needs one
#endif
  static BASISCONV_INLINE Reg zero() { return Reg{0, 0, 0, 0}; }
  static BASISCONV_INLINE Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static BASISCONV_INLINE Reg mul(Reg a, Reg b) { return a * b; }
  static BASISCONV_INLINE Reg add(Reg a, Reg b) { return a + b; }
  static BASISCONV_INLINE Reg sub(Reg a, Reg b) { return a - b; }
  static BASISCONV_INLINE Reg max(Reg bound, Reg a) { return bound > a ? bound : a; }
  static BASISCONV_INLINE Reg min(Reg bound, Reg a) { return bound < a ? bound : a; }
  static BASISCONV_INLINE Reg set1(float a) { return Reg{a, a, a, a}; }

  static BASISCONV_INLINE Reg load(const float* p) {
    Reg v;
    memcpy(&v, p, 16);
    return v;
  }
  template <typename T>
  static BASISCONV_INLINE Reg load(const T* p) {
    return Reg{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
  }
  template <typename T>
  static BASISCONV_INLINE Reg load_n(const T* p, int64_t n) {
    Reg v = zero();
    for (int64_t i = 0; i < n; i++) v[i] = to_float(p[i]);
    return v;
  }
  static BASISCONV_INLINE void store(float* p, Reg v) { memcpy(p, &v, 16); }
  template <typename T>
  static BASISCONV_INLINE void store(T* p, Reg v) {
    for (int i = 0; i < kWidth; i++) from_float(v[i], p + i);
  }
  template <typename T>
  static BASISCONV_INLINE void store_n(T* p, Reg v, int64_t n) {
    for (int64_t i = 0; i < n; i++) from_float(v[i], p + i);
  }
  template <int L>
  static BASISCONV_INLINE Reg broadcast(const float* p) {
    if constexpr (L == 1) return Reg{*p, *p, *p, *p};
    if constexpr (L == 2) return Reg{p[0], p[1], p[0], p[1]};
    return load(p);
  }
  template <int L>
  static BASISCONV_INLINE void store_sums(float* p, Reg s) {
    if constexpr (L == 1) {
      store(p, s);
    } else if constexpr (L == 2) {
      p[0] = s[0] + s[1];
      p[1] = s[2] + s[3];
    } else {
      p[0] = (s[0] + s[1]) + (s[2] + s[3]);
    }
  }
  template <int L>
  static BASISCONV_INLINE void store_sums(float* p, Reg s, Reg t) {
    store_sums<L>(p, s);
    store_sums<L>(p + kWidth / L, t);
  }
};

#endif

constexpr int kWidth = Vec::kWidth;

// block[i][j] becomes block[j][i] for a square of registers.
BASISCONV_INLINE void transpose(Vec::Reg* block) {
#if defined(BASISCONV_AVX512)
  __m512 t[16];
  BASISCONV_UNROLL for (int i = 0; i < 16; i += 4) {  // 4x4 within 128-bit lanes
    const __m512 a = _mm512_unpacklo_ps(block[i], block[i + 1]), b = _mm512_unpackhi_ps(block[i], block[i + 1]);
    const __m512 c = _mm512_unpacklo_ps(block[i + 2], block[i + 3]), d = _mm512_unpackhi_ps(block[i + 2], block[i + 3]);
    t[i] = _mm512_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm512_shuffle_ps(a, c, 0xEE);
    t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm512_shuffle_ps(b, d, 0xEE);
  }
  BASISCONV_UNROLL for (int j = 0; j < 4; j++) {  // 4x4 of lanes
    const __m512 a = _mm512_shuffle_f32x4(t[j], t[j + 4], 0x88), b = _mm512_shuffle_f32x4(t[j], t[j + 4], 0xDD);
    const __m512 c = _mm512_shuffle_f32x4(t[j + 8], t[j + 12], 0x88),
                 d = _mm512_shuffle_f32x4(t[j + 8], t[j + 12], 0xDD);
    block[j] = _mm512_shuffle_f32x4(a, c, 0x88);
    block[j + 8] = _mm512_shuffle_f32x4(a, c, 0xDD);
    block[j + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    block[j + 12] = _mm512_shuffle_f32x4(b, d, 0xDD);
  }
#elif defined(BASISCONV_AVX2)
  __m256 t[8];
  BASISCONV_UNROLL for (int i = 0; i < 8; i += 4) {
    const __m256 a = _mm256_unpacklo_ps(block[i], block[i + 1]), b = _mm256_unpackhi_ps(block[i], block[i + 1]);
    const __m256 c = _mm256_unpacklo_ps(block[i + 2], block[i + 3]), d = _mm256_unpackhi_ps(block[i + 2], block[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm256_shuffle_ps(a, c, 0xEE);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm256_shuffle_ps(b, d, 0xEE);
  }
  BASISCONV_UNROLL for (int j = 0; j < 4; j++) {
    block[j] = _mm256_permute2f128_ps(t[j], t[j + 4], 0x20);
    block[j + 4] = _mm256_permute2f128_ps(t[j], t[j + 4], 0x31);
  }
#else
  Vec::Reg t[4];
  for (int i = 0; i < 4; i++) t[i] = Vec::Reg{block[0][i], block[1][i], block[2][i], block[3][i]};
  for (int i = 0; i < 4; i++) block[i] = t[i];
#endif
}

// Replace each float by what storing it as T and loading it again gives: the one rounding of the basis maps.
template <typename T>
BASISCONV_INLINE void round_maps(float* values, int64_t count) {
  if constexpr (sizeof(T) == 2) {
    T staged[kWidth];
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) {
      Vec::store(staged, Vec::load(values + i));
      Vec::store(values + i, Vec::load(staged));
    }
    for (; i < count; i++) {
      from_float(values[i], staged);
      values[i] = to_float(staged[0]);
    }
  }
}

}  // namespace BASISCONV_ISA
}  // namespace basisconv
