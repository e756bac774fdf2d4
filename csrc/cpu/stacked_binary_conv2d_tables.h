// Tables of signed sums: filled once a pixel, picked by the bits of every filter that reads the pixel.
//
//   AVX-512  T[i] = ±x0 ± x1 ± x2 ± x3, 16 entries; 4 bits of a filter pick one: VPERMPS + add do 64 products
//   AVX2     T[i] = ±x0 ± x1 + x2, 4 entries; 2 bits pick one, the third flips its sign: VPERMILPS + XOR + add do 24
//   base     T = x0; a bit flips its sign
//
// A table of zeros is exact padding.
#pragma once
#include "simd.h"

namespace basisconv {
namespace BASISCONV_ISA {

#if defined(BASISCONV_AVX512)

struct Lookup {
  static constexpr int kStep = 4, kEntry = 16, kPixels = 14, kAccumulators = 28;
  using Words = __m512i;
  using Pick = __m512i;
  static BASISCONV_INLINE Words load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static BASISCONV_INLINE Words next(Words w) { return _mm512_srli_epi32(w, 4); }
  static BASISCONV_INLINE Pick pick(Words w) { return w; }
  static BASISCONV_INLINE Vec::Reg table(const float* p) { return _mm512_loadu_ps(p); }
  // Half of the additions as multiply-adds by one: they use ports that permutes and additions leave idle.
  static BASISCONV_INLINE Vec::Reg add(Vec::Reg table, Pick pick, Vec::Reg sum, Vec::Reg one, bool odd) {
    const Vec::Reg value = _mm512_permutexvar_ps(pick, table);
    return odd ? _mm512_fmadd_ps(value, one, sum) : _mm512_add_ps(value, sum);
  }
  // The four bits of channels 0..3, 1 for +.
  static uint32_t code(const bool* positive) {
    return static_cast<uint32_t>(positive[0] | positive[1] << 1 | positive[2] << 2 | positive[3] << 3);
  }

  // The tables of 16 channels at x, or of the last few.
  template <bool whole>
  static BASISCONV_INLINE void fill(const float* x, int64_t channels, float* to) {
    const __m512 v = whole ? _mm512_loadu_ps(x) : _mm512_maskz_loadu_ps(Vec::first(channels), x);
    const __m512 low = _mm512_castsi512_ps(_mm512_set4_epi32(0, 0x80000000, 0, 0x80000000));
    const __m512 high = _mm512_castsi512_ps(_mm512_set4_epi32(0, 0, 0x80000000, 0x80000000));
    // Lane q, element i: the sums of channels 4q, 4q+1 (and 4q+2, 4q+3) with the signs that the bits of i say.
    const __m512 first =
        _mm512_add_ps(_mm512_xor_ps(_mm512_permute_ps(v, 0x00), low), _mm512_xor_ps(_mm512_permute_ps(v, 0x55), high));
    const __m512 second =
        _mm512_add_ps(_mm512_xor_ps(_mm512_permute_ps(v, 0xAA), low), _mm512_xor_ps(_mm512_permute_ps(v, 0xFF), high));
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512 copies[4] = {_mm512_shuffle_f32x4(first, first, 0x00), _mm512_shuffle_f32x4(first, first, 0x55),
                              _mm512_shuffle_f32x4(first, first, 0xAA), _mm512_shuffle_f32x4(first, first, 0xFF)};
    BASISCONV_UNROLL for (int q = 0; q < 4; q++) {
      if (!whole && 4 * q >= channels) break;
      const __m512i at = _mm512_add_epi32(lanes, _mm512_set1_epi32(4 * q));
      _mm512_storeu_ps(to + q * kEntry, _mm512_add_ps(copies[q], _mm512_permutexvar_ps(at, second)));
    }
  }
  static constexpr int kFill = 16;  // channels of one call of fill
};

#elif defined(BASISCONV_AVX2)

struct Lookup {
  static constexpr int kStep = 3, kEntry = 4, kPixels = 10, kAccumulators = 10;
  using Words = __m256i;
  struct Pick {
    __m256i at;
    __m256 flip;
  };
  static BASISCONV_INLINE Words load(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static BASISCONV_INLINE Words next(Words w) { return _mm256_srli_epi32(w, 3); }
  static BASISCONV_INLINE Pick pick(Words w) {
    const __m256i sign = _mm256_set1_epi32(static_cast<int>(0x80000000u));
    return {w, _mm256_castsi256_ps(_mm256_and_si256(_mm256_slli_epi32(w, 29), sign))};
  }
  static BASISCONV_INLINE Vec::Reg table(const float* p) {
    return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
  }
  static BASISCONV_INLINE Vec::Reg add(Vec::Reg table, Pick pick, Vec::Reg sum, Vec::Reg, bool) {
    return _mm256_add_ps(_mm256_xor_ps(_mm256_permutevar_ps(table, pick.at), pick.flip), sum);
  }
  // Two bits pick among the sums in which channel 2 is positive; the third says that the filter has their negative.
  static uint32_t code(const bool* positive) {
    const uint32_t two = static_cast<uint32_t>(positive[0] | positive[1] << 1);
    return positive[2] ? two : (two ^ 3u) | 4u;
  }

  template <bool whole>
  static BASISCONV_INLINE void fill(const float* x, int64_t channels, float* to) {
    const __m128 low = _mm_setr_ps(-1.0f, 1.0f, -1.0f, 1.0f), high = _mm_setr_ps(-1.0f, -1.0f, 1.0f, 1.0f);
    __m128 sum = whole ? _mm_broadcast_ss(x + 2) : _mm_setzero_ps();
    if (whole || channels > 1) sum = _mm_fmadd_ps(_mm_broadcast_ss(x + 1), high, sum);
    _mm_storeu_ps(to, _mm_fmadd_ps(_mm_broadcast_ss(x), low, sum));
  }
  static constexpr int kFill = 3;
};

#else

struct Lookup {
  static constexpr int kStep = 1, kEntry = 1, kPixels = 8, kAccumulators = 8;
  typedef uint32_t Words __attribute__((vector_size(16)));
  using Pick = Words;
  static BASISCONV_INLINE Words load(const uint32_t* p) {
    Words w;
    memcpy(&w, p, 16);
    return w;
  }
  static BASISCONV_INLINE Words next(Words w) { return w >> 1; }
  static BASISCONV_INLINE Pick pick(Words w) { return w << 31; }
  static BASISCONV_INLINE Vec::Reg table(const float* p) { return Vec::set1(*p); }
  static BASISCONV_INLINE Vec::Reg add(Vec::Reg table, Pick pick, Vec::Reg sum, Vec::Reg, bool) {
    return reinterpret_cast<Vec::Reg>(reinterpret_cast<Words>(table) ^ pick) + sum;
  }
  static uint32_t code(const bool* positive) { return positive[0] ? 0u : 1u; }
  template <bool whole>
  static BASISCONV_INLINE void fill(const float* x, int64_t, float* to) {
    *to = *x;
  }
  static constexpr int kFill = 1;
};

#endif

// Where the tables of a thread are: rows of the input, each [padded columns][slices][count][entry]. The tables that one
// filter reads of a pixel are neighbours, and streams of them for a prefetcher.
struct TableRing {
  float* rows;
  int64_t row_size, pixel;  // floats of a row, and between pixels
};

static inline TableRing make_table_ring(const StackedBinaryConv2dParams& params, const StackedPlan& plan,
                                        float* memory) {
  const TableRing ring{memory, plan.ring_row, plan.pack.slices * plan.pack.count * Lookup::kEntry};
  // The padding columns; the others are filled row by row.
  const int64_t left = params.pad_left < plan.columns ? params.pad_left : plan.columns;
  const int64_t end = left + params.W < plan.columns ? left + params.W : plan.columns;
  for (int64_t i = 0; i < plan.ring_rows; i++) {
    float* row = memory + i * ring.row_size;
    memset(row, 0, left * ring.pixel * sizeof(float));
    memset(row + end * ring.pixel, 0, (plan.columns - end) * ring.pixel * sizeof(float));
  }
  return ring;
}

// The tables of one input row, whose pixels lie `pixel` floats apart with their channels side by side.
static inline void fill_tables(const StackedBinaryConv2dParams& params, const StackedPack& pack, const TableRing& ring,
                               const float* from, int64_t pixel, float* row) {
  for (int64_t i = 0; i < params.W; i++) {
    float* to = row + (params.pad_left + i) * ring.pixel;
    for (int64_t slice = 0; slice < pack.slices; slice++, to += pack.count * Lookup::kEntry) {
      const float* x = from + i * pixel + slice * pack.low;
      float* table = to;
      int64_t c = 0;
      for (; c + Lookup::kFill <= pack.low;
           c += Lookup::kFill, table += Lookup::kFill / Lookup::kStep * Lookup::kEntry) {
        Lookup::fill<true>(x + c, Lookup::kFill, table);
      }
      if (c < pack.low) Lookup::fill<false>(x + c, pack.low - c, table);
    }
  }
}

}  // namespace BASISCONV_ISA
}  // namespace basisconv
