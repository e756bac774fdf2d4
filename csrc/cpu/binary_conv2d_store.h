// From the counts or products of a tile to the result: whole numbers, floats with scales, bias and activation, or bits
// for the next layer, in the same pass.
#pragma once
#include "binary_conv2d_plan.h"
#include "simd.h"

namespace basisconv {
namespace BASISCONV_ISA {

// One output pixel and one block of filters.
struct Spot {
  int64_t n, y, x;
  int64_t k;             // the first filter, among K
  int64_t count;         // real filters of the block
  const int32_t* table;  // of the pixel's class, at the block's first filter
  const int32_t* flip;   // likewise
};

// One bit a number: raw[i] <= limit[i], inverted where flip[i] is -1; n is a multiple of the lanes, at most 32.
BASISCONV_INLINE uint32_t compare(const int32_t* raw, const int32_t* limit, const int32_t* flip, int64_t n) {
  uint32_t bits = 0;
#if defined(BASISCONV_AVX512)
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i inverted = _mm512_loadu_si512(flip + i);
    const __mmask16 above = _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(raw + i), _mm512_loadu_si512(limit + i));
    const __mmask16 found = static_cast<__mmask16>(~above ^ _mm512_movepi32_mask(inverted));
    bits |= static_cast<uint32_t>(found) << i;
  }
#elif defined(BASISCONV_AVX2)
  for (int64_t i = 0; i < n; i += 8) {
    const __m256i counts = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(raw + i));
    const __m256i limits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(limit + i));
    const __m256i inverted = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(flip + i));
    const __m256i above = _mm256_xor_si256(_mm256_cmpgt_epi32(counts, limits), inverted);
    bits |= (~static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(above))) & 0xffu) << i;
  }
#else
  for (int64_t i = 0; i < n; i++) bits |= static_cast<uint32_t>((raw[i] <= limit[i]) ^ (flip[i] != 0)) << i;
#endif
  return bits;
}

// Bits from place k of a pixel's words on; a group may start within a word. The words are zero before.
BASISCONV_INLINE void put_bits(uint32_t* words, int64_t k, uint32_t bits) {
  const int64_t shift = k % kWordBits;
  uint32_t* word = words + k / kWordBits;
  word[0] |= bits << shift;
  if (shift != 0 && bits >> (kWordBits - shift) != 0) word[1] |= bits >> (kWordBits - shift);
}

static BASISCONV_INLINE void store_bits(const BinaryConv2dParams& p, const Spot& at, const int32_t* raw,
                                        int64_t block) {
  uint32_t* words = static_cast<uint32_t*>(p.output) + ((at.n * p.OH + at.y) * p.OW + at.x) * words_for(p.weights.K);
  for (int64_t i = 0; i < at.count; i += kWordBits) {
    const int64_t size = block - i < kWordBits ? block - i : kWordBits, left = at.count - i;
    uint32_t bits = compare(raw + i, at.table + i, at.flip + i, size);
    if (left < kWordBits) bits &= (1u << left) - 1u;
    put_bits(words, at.k + i, bits);
  }
}

// Where the result of output k stands, in elements, and how far the next k is.
static BASISCONV_INLINE int64_t place_of(const BinaryConv2dParams& p, const Spot& at, int64_t& step) {
  if (p.channels_last) {
    step = 1;
    return ((at.n * p.OH + at.y) * p.OW + at.x) * p.weights.K + at.k;
  }
  step = p.OH * p.OW;
  return ((at.n * p.weights.K + at.k) * p.OH + at.y) * p.OW + at.x;
}

static BASISCONV_INLINE void store_sums(const BinaryConv2dParams& p, const Spot& at, const int32_t* raw) {
  int64_t step;
  int32_t* to = static_cast<int32_t*>(p.output) + place_of(p, at, step);
  if (step == 1) {
    for (int64_t i = 0; i < at.count; i++) to[i] = at.table[i] - p.factor * raw[i];
  } else {
    for (int64_t i = 0; i < at.count; i++) to[i * step] = at.table[i] - p.factor * raw[i];
  }
}

template <typename T>
static BASISCONV_INLINE void store_floats(const BinaryConv2dParams& p, const Spot& at, const int32_t* raw,
                                          float* values) {
  const float pixel = p.pixel_scale == nullptr ? 1.0f : p.pixel_scale[(at.n * p.OH + at.y) * p.OW + at.x];
  const float *scale = p.scale + at.k, *bias = p.bias + at.k;
  for (int64_t i = 0; i < at.count; i++) {
    values[i] = static_cast<float>(at.table[i] - p.factor * raw[i]) * scale[i] * pixel + bias[i];
  }
  // Clamps that keep a NaN, which scale or bias may hold.
  if (p.activation != BinaryActivation::none) {
    for (int64_t i = 0; i < at.count; i++) values[i] = values[i] < 0.0f ? 0.0f : values[i];
  }
  if (p.activation == BinaryActivation::relu6) {
    for (int64_t i = 0; i < at.count; i++) values[i] = values[i] > 6.0f ? 6.0f : values[i];
  }
  int64_t step;
  T* to = static_cast<T*>(p.output) + place_of(p, at, step);
  if (step == 1) {
    int64_t i = 0;
    for (; i + kWidth <= at.count; i += kWidth) Vec::store(to + i, Vec::load(values + i));
    if (i < at.count) Vec::store_n(to + i, Vec::load_n(values + i, at.count - i), at.count - i);
  } else {
    for (int64_t i = 0; i < at.count; i++) from_float(values[i], to + i * step);
  }
}

#if defined(BASISCONV_AVX512)

// A tile of registers of 16 filters that start at a multiple of 16: bits go to memory as the compare gives them, and
// whole numbers and float32 of channels_last stay in the register. False where the general way must do it.
static BASISCONV_INLINE bool store_registers(const BinaryConv2dParams& p, const Spot& at, int64_t pixels,
                                             const int32_t* raw, int64_t block, const int32_t* table_of_row,
                                             int64_t class_size) {
  if (block > 32) return false;
  const int64_t place = (at.n * p.OH + at.y) * p.OW + at.x;
  const int32_t* classes = p.column_class + at.x;
  if (p.output_type == BinaryOutput::packed) {
    if (at.k % 16 != 0) return false;
    const int64_t step = words_for(p.weights.K) * 4;
    for (int64_t f = 0; f < at.count; f += 16) {
      uint8_t* to = static_cast<uint8_t*>(p.output) + place * step + (at.k + f) / 8;
      const __mmask16 flipped = _mm512_movepi32_mask(_mm512_loadu_si512(at.flip + f));
      const uint32_t real = at.count - f < 16 ? (1u << (at.count - f)) - 1u : 0xffffu;
      for (int64_t i = 0; i < pixels; i++, to += step) {
        const __m512i limit = _mm512_loadu_si512(table_of_row + classes[i] * class_size + f);
        const __mmask16 below = _mm512_cmple_epi32_mask(_mm512_loadu_si512(raw + i * block + f), limit);
        const uint16_t bits = static_cast<uint16_t>((below ^ flipped) & real);
        memcpy(to, &bits, 2);
      }
    }
    return true;
  }
  if (at.count % 16 != 0 || !p.channels_last) return false;
  const int shift = p.factor == 2 ? 1 : 0;
  const auto sums = [&](int64_t i, int64_t f) {
    const __m512i table = _mm512_loadu_si512(table_of_row + classes[i] * class_size + f);
    return _mm512_sub_epi32(table, _mm512_slli_epi32(_mm512_loadu_si512(raw + i * block + f), shift));
  };
  const int64_t K = p.weights.K;
  if (p.output_type == BinaryOutput::i32) {
    for (int64_t f = 0; f < at.count; f += 16) {
      int32_t* to = static_cast<int32_t*>(p.output) + place * K + at.k + f;
      for (int64_t i = 0; i < pixels; i++) _mm512_storeu_si512(to + i * K, sums(i, f));
    }
    return true;
  }
  if (p.output_type != BinaryOutput::f32) return false;
  const __m512 zero = _mm512_setzero_ps(), six = _mm512_set1_ps(6.0f);
  for (int64_t f = 0; f < at.count; f += 16) {
    float* to = static_cast<float*>(p.output) + place * K + at.k + f;
    const __m512 scale = _mm512_loadu_ps(p.scale + at.k + f), bias = _mm512_loadu_ps(p.bias + at.k + f);
    for (int64_t i = 0; i < pixels; i++) {
      // As in `store_floats` the sum is one of a product with `pixel`, so that a compiler that joins the two rounds
      // what has no such factor as two operations all the same.
      const __m512 pixel = _mm512_set1_ps(p.pixel_scale == nullptr ? 1.0f : p.pixel_scale[place + i]);
      __m512 values = _mm512_mul_ps(_mm512_cvtepi32_ps(sums(i, f)), scale);
      values = _mm512_add_ps(_mm512_mul_ps(values, pixel), bias);
      // The second operand of these is the result where one is NaN.
      if (p.activation != BinaryActivation::none) values = _mm512_max_ps(zero, values);
      if (p.activation == BinaryActivation::relu6) values = _mm512_min_ps(six, values);
      _mm512_storeu_ps(to + i * K, values);
    }
  }
  return true;
}

#endif

// All of a tile's pixels; raw [pixels][block].
static void store_tile(const BinaryConv2dParams& p, Spot at, int64_t pixels, const int32_t* raw, int64_t block,
                       const int32_t* table_of_row, int64_t class_size, float* values) {
#if defined(BASISCONV_AVX512)
  if (store_registers(p, at, pixels, raw, block, table_of_row, class_size)) return;
#endif
  for (int64_t i = 0; i < pixels; i++, at.x++, raw += block) {
    at.table = table_of_row + p.column_class[at.x] * class_size;
    switch (p.output_type) {
      case BinaryOutput::packed:
        store_bits(p, at, raw, block);
        break;
      case BinaryOutput::i32:
        store_sums(p, at, raw);
        break;
      case BinaryOutput::f32:
        store_floats<float>(p, at, raw, values);
        break;
      case BinaryOutput::bf16:
        store_floats<bf16>(p, at, raw, values);
        break;
      case BinaryOutput::f16:
        store_floats<f16>(p, at, raw, values);
        break;
    }
  }
}

}  // namespace BASISCONV_ISA
}  // namespace basisconv
