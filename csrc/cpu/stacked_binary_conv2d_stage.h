// One input row as floats, pixel by pixel with its channels side by side: dtypes, memory layouts, signs and packed bits
// end here.
#pragma once
#include "simd.h"

namespace basisconv {
namespace BASISCONV_ISA {

// NaN is negative, as in x >= 0.
static BASISCONV_INLINE float sign_of(float x) { return x >= 0.0f ? 1.0f : -1.0f; }

template <typename T>
static void stage_real(const StackedBinaryConv2dParams& params, int64_t n, int64_t y, float* to) {
  const int64_t C = params.weights.C;
  const int64_t stride_c = params.input_stride_c, stride_w = params.input_stride_w;
  const T* from = static_cast<const T*>(params.input) + n * params.input_stride_n + y * params.input_stride_h;
  if (stride_c == 1) {
    for (int64_t x = 0; x < params.W; x++) {
      const T* pixel = from + x * stride_w;
      int64_t c = 0;
      for (; c + kWidth <= C; c += kWidth) Vec::store(to + x * C + c, Vec::load(pixel + c));
      for (; c < C; c++) to[x * C + c] = to_float(pixel[c]);
    }
  } else if (stride_w == 1) {  // squares of width channels by width pixels
    for (int64_t c = 0; c < C; c += kWidth) {
      const int64_t rows = C - c < kWidth ? C - c : kWidth;
      for (int64_t x = 0; x < params.W; x += kWidth) {
        const int64_t pixels = params.W - x < kWidth ? params.W - x : kWidth;
        Vec::Reg square[kWidth];
        BASISCONV_UNROLL for (int i = 0; i < kWidth; i++) {
          const T* row = from + (c + i) * stride_c + x;
          square[i] = i >= rows ? Vec::zero() : pixels == kWidth ? Vec::load(row) : Vec::load_n(row, pixels);
        }
        transpose(square);
        for (int64_t i = 0; i < pixels; i++) {
          float* pixel = to + (x + i) * C + c;
          if (rows == kWidth) {
            Vec::store(pixel, square[i]);
          } else {
            Vec::store_n(pixel, square[i], rows);
          }
        }
      }
    }
  } else {
    for (int64_t x = 0; x < params.W; x++) {
      for (int64_t c = 0; c < C; c++) to[x * C + c] = to_float(from[c * stride_c + x * stride_w]);
    }
  }
  if (params.mode == StackedMode::signs) {
    for (int64_t i = 0; i < params.W * C; i++) to[i] = sign_of(to[i]);
  }
}

// Words [N, planes, H, W, words]: signs, or the numbers whose bits the planes hold.
static inline void stage_packed(const StackedBinaryConv2dParams& params, int64_t n, int64_t y, float* to) {
  const int64_t C = params.weights.C, words = (C + 31) / 32, plane = params.H * params.W * words;
  const uint32_t* row = static_cast<const uint32_t*>(params.input) + n * params.planes * plane + y * params.W * words;
  const bool signs = params.mode == StackedMode::packed_signs;
  for (int64_t x = 0; x < params.W; x++) {
    for (int64_t c = 0; c < C; c++) {
      const uint32_t* word = row + x * words + c / 32;
      uint32_t value = 0;
      for (int64_t b = 0; b < params.planes; b++) value |= (word[b * plane] >> (c % 32) & 1u) << b;
      to[x * C + c] = signs ? 2.0f * static_cast<float>(value) - 1.0f : static_cast<float>(value);
    }
  }
}

}  // namespace BASISCONV_ISA
}  // namespace basisconv
