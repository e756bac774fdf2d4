// A tile of pixels x filters with byte lanes, for processors that have a byte shuffle but count no bits.
//
// popc(a ^ w) of four channels is a value of a table of 16 that only a chooses; w is the index. So for each pixel one
// table is loaded for four channels and one shuffle serves as many filters as a register has bytes: two instructions,
// shuffle and add, for 128 pairs of bits (AVX2). Bytes hold the sums of up to 31 units of 8 channels, then they are
// widened to 16 bits, and those to 32 before they could overflow.
#pragma once
#include "binary_conv2d_rows.h"

namespace basisconv {
namespace BASISCONV_ISA {

// `keep` stops the compiler from adding two look-ups before it adds them to a sum: it then has too few registers for
// the sums of a tile and keeps half of them in memory.
#if defined(BASISCONV_AVX512)

struct Bytes {
  using Reg = __m512i;
  static constexpr int kLanes = 64, kMostVectors = 1;
  static BASISCONV_INLINE Reg zero() { return _mm512_setzero_si512(); }
  static BASISCONV_INLINE Reg low_bits() { return _mm512_set1_epi8(15); }
  static BASISCONV_INLINE Reg load(const void* p) { return _mm512_loadu_si512(p); }
  static BASISCONV_INLINE void store(void* p, Reg v) { _mm512_storeu_si512(p, v); }
  static BASISCONV_INLINE Reg both(Reg a, Reg b) { return _mm512_and_si512(a, b); }
  static BASISCONV_INLINE Reg high(Reg v) { return _mm512_srli_epi16(v, 4); }
  static BASISCONV_INLINE Reg add8(Reg a, Reg b) { return _mm512_add_epi8(a, b); }
  static BASISCONV_INLINE void keep(Reg& v) {
#if defined(__AVX512F__)  // not where the set is emulated
    asm("" : "+v"(v));
#else
    (void)v;
#endif
  }
  static BASISCONV_INLINE Reg add16(Reg a, Reg b) { return _mm512_add_epi16(a, b); }
  static BASISCONV_INLINE Reg table(const uint8_t* p) {
    return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static BASISCONV_INLINE Reg look_up(Reg table, Reg index) { return _mm512_shuffle_epi8(table, index); }
  static BASISCONV_INLINE Reg widen_low(Reg v) { return _mm512_unpacklo_epi8(v, zero()); }
  static BASISCONV_INLINE Reg widen_high(Reg v) { return _mm512_unpackhi_epi8(v, zero()); }
  // 32 numbers of 16 bits to int32, `add`ed to what is there or stored.
  static BASISCONV_INLINE void widen_to(int32_t* p, Reg v, bool add) {
    __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(v));
    __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(v, 1));
    if (add) {
      low = _mm512_add_epi32(low, _mm512_loadu_si512(p));
      high = _mm512_add_epi32(high, _mm512_loadu_si512(p + 16));
    }
    _mm512_storeu_si512(p, low);
    _mm512_storeu_si512(p + 16, high);
  }
};

#else

struct Bytes {
  using Reg = __m256i;
  static constexpr int kLanes = 32, kMostVectors = 2;
  static BASISCONV_INLINE Reg zero() { return _mm256_setzero_si256(); }
  static BASISCONV_INLINE Reg low_bits() { return _mm256_set1_epi8(15); }
  static BASISCONV_INLINE Reg load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static BASISCONV_INLINE void store(void* p, Reg v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static BASISCONV_INLINE Reg both(Reg a, Reg b) { return _mm256_and_si256(a, b); }
  static BASISCONV_INLINE Reg high(Reg v) { return _mm256_srli_epi16(v, 4); }
  static BASISCONV_INLINE Reg add8(Reg a, Reg b) { return _mm256_add_epi8(a, b); }
  static BASISCONV_INLINE void keep(Reg& v) { asm("" : "+x"(v)); }
  static BASISCONV_INLINE Reg add16(Reg a, Reg b) { return _mm256_add_epi16(a, b); }
  static BASISCONV_INLINE Reg table(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static BASISCONV_INLINE Reg look_up(Reg table, Reg index) { return _mm256_shuffle_epi8(table, index); }
  static BASISCONV_INLINE Reg widen_low(Reg v) { return _mm256_unpacklo_epi8(v, zero()); }
  static BASISCONV_INLINE Reg widen_high(Reg v) { return _mm256_unpackhi_epi8(v, zero()); }
  static BASISCONV_INLINE void widen_to(int32_t* p, Reg v, bool add) {
    __m256i low = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(v));
    __m256i high = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(v, 1));
    if (add) {
      low = _mm256_add_epi32(low, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
      high = _mm256_add_epi32(high, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8)));
    }
    store(p, low);
    store(p + 8, high);
  }
};

#endif

// kCounts[a][i] = popc(a ^ i), both of four bits.
struct CountTables {
  alignas(64) uint8_t of[16][16];
};
constexpr CountTables count_tables() {
  CountTables t{};
  for (int a = 0; a < 16; a++) {
    for (int i = 0; i < 16; i++) {
      int count = 0;
      for (int bit = 0; bit < 4; bit++) count += ((a ^ i) >> bit) & 1;
      t.of[a][i] = static_cast<uint8_t>(count);
    }
  }
  return t;
}
static constexpr CountTables kCounts = count_tables();

constexpr int64_t kMostUnits = 31;            // 31 * 8 = 248 fits into a byte
constexpr int64_t kMostChunks = 65535 / 248;  // that many such sums fit into 16 bits

// The sums of a tile in 16 bits: in memory, since its registers hold the bytes.
template <int P, int F>
struct Sums {
  Bytes::Reg low[P][F], high[P][F];  // the first and the second half of a register's filters
  int64_t chunks;
  bool spilled;

  BASISCONV_INLINE void clear() {
    BASISCONV_UNROLL for (int i = 0; i < P; i++) {
      BASISCONV_UNROLL for (int f = 0; f < F; f++) low[i][f] = high[i][f] = Bytes::zero();
    }
    chunks = 0;
  }

  // To raw [P][F * lanes] in 32 bits.
  BASISCONV_INLINE void spill(int32_t* raw) {
    BASISCONV_UNROLL for (int i = 0; i < P; i++) {
      BASISCONV_UNROLL for (int f = 0; f < F; f++) {
        int32_t* to = raw + (i * F + f) * Bytes::kLanes;
        Bytes::widen_to(to, low[i][f], spilled);
        Bytes::widen_to(to + Bytes::kLanes / 2, high[i][f], spilled);
      }
    }
    spilled = true;
  }
};

// `units` <= kMostUnits units of a run into `sums`.
template <int P, int F>
static BASISCONV_INLINE void count_chunk(const uint8_t* a, int64_t pixel_step, int64_t units, const uint8_t* w,
                                         Sums<P, F>& sums) {
  const Bytes::Reg mask = Bytes::low_bits();
  Bytes::Reg bytes[P][F];
  BASISCONV_UNROLL for (int i = 0; i < P; i++) {
    BASISCONV_UNROLL for (int f = 0; f < F; f++) bytes[i][f] = Bytes::zero();
  }
  for (int64_t u = 0; u < units; u++, a += 2, w += F * Bytes::kLanes) {
    BASISCONV_UNROLL for (int half = 0; half < 2; half++) {
      Bytes::Reg index[F];
      BASISCONV_UNROLL for (int f = 0; f < F; f++) {
        const Bytes::Reg filters = Bytes::load(w + f * Bytes::kLanes);
        index[f] = Bytes::both(half == 0 ? filters : Bytes::high(filters), mask);
      }
      BASISCONV_UNROLL for (int i = 0; i < P; i++) {
        const Bytes::Reg table = Bytes::table(kCounts.of[0] + a[i * pixel_step + half]);
        BASISCONV_UNROLL for (int f = 0; f < F; f++) {
          bytes[i][f] = Bytes::add8(bytes[i][f], Bytes::look_up(table, index[f]));
          Bytes::keep(bytes[i][f]);
        }
      }
    }
  }
  BASISCONV_UNROLL for (int i = 0; i < P; i++) {
    BASISCONV_UNROLL for (int f = 0; f < F; f++) {
      sums.low[i][f] = Bytes::add16(sums.low[i][f], Bytes::widen_low(bytes[i][f]));
      sums.high[i][f] = Bytes::add16(sums.high[i][f], Bytes::widen_high(bytes[i][f]));
    }
  }
}

// All valid taps of one plane and one block of filters. What did not fit into 16 bits is in `raw` (sums.spilled).
template <int P, int F>
static BASISCONV_INLINE void count_nibbles(const Taps& taps, const uint8_t* w, Sums<P, F>& sums, int32_t* raw) {
  sums.clear();
  sums.spilled = false;
  const int64_t parts = (taps.run_units + kMostUnits - 1) / kMostUnits;
  const int64_t chunk = (taps.run_units + parts - 1) / parts;
  for (int64_t r = 0; r < taps.count; r++) {
    for (int64_t run = 0; run < taps.runs; run++) {
      const uint8_t* a = taps.rows[r] + taps.offset + run * taps.run_step;
      for (int64_t u = 0; u < taps.run_units; u += chunk) {
        const int64_t units = taps.run_units - u < chunk ? taps.run_units - u : chunk;
        if (sums.chunks == kMostChunks) {
          sums.spill(raw);
          sums.clear();
        }
        count_chunk<P, F>(a + 2 * u, taps.pixel_step, units, w, sums);
        sums.chunks++;
        w += units * F * Bytes::kLanes;
      }
    }
  }
}

}  // namespace BASISCONV_ISA
}  // namespace basisconv
