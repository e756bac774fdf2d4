// Filling the ring of input rows in bfloat16: as it is, without a conversion. Included by basis_conv2d_rows.h.
#pragma once
#include "basis_conv2d_rows.h"

namespace basisconv {
namespace BASISCONV_ISA {

constexpr int64_t kMostChannels = 32;  // of a channel block: a register

// The first `channels` of a block at from, zeros behind them; a block is 16 or 32 channels.
static BASISCONV_INLINE void copy_pixel(const bf16* from, uint32_t valid, int64_t block, bf16* to) {
  if (block == kMostChannels) {
    _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(valid, from));
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_maskz_loadu_epi16(static_cast<__mmask16>(valid), from));
  }
}

// 16 pixels of up to 32 channels whose pixels are neighbours: pairs of channels as 32-bit values, turned.
static inline void turn_pixels(const bf16* from, int64_t channel_stride, int64_t channels, int64_t pixels, bf16* to) {
  Vec::Reg square[kWidth];
  const __mmask16 valid = Vec::first(pixels);
  for (int64_t i = 0; i < kWidth; i++) {
    const __mmask16 low = 2 * i < channels ? valid : 0, high = 2 * i + 1 < channels ? valid : 0;
    const bf16* row = from + 2 * i * channel_stride;
    const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(low, row));
    const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(high, row + channel_stride));
    square[i] = _mm512_castsi512_ps(_mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
  }
  transpose(square);
  for (int64_t i = 0; i < pixels; i++) Slots::store(to + i * kMostChannels, square[i]);
}

// Copy image row `y` of image `n` into a ring slot. The padding columns are zero since make_ring and stay so.
template <typename T>
static void fill_row(const BasisConv2dParams& params, const CpuPack& pack, const Ring& ring, int64_t slot, int64_t n,
                     int64_t y) {
  const int64_t group_channels = params.weights.C / params.weights.groups;
  const bf16* source = static_cast<const bf16*>(params.input) + n * params.input_stride_n + y * params.input_stride_h;
  for (int64_t group = 0; group < params.weights.groups; group++) {
    for (int64_t b = 0; b < pack.channel_blocks; b++) {
      const int64_t rest = group_channels - b * ring.block;
      const int64_t channels = rest < ring.block ? rest : ring.block;
      const uint32_t valid = channels == kMostChannels ? ~0u : (1u << channels) - 1u;
      const bf16* from = source + (group * group_channels + b * ring.block) * params.input_stride_c;
      bf16* to = ring.row(slot) + (group * pack.channel_blocks + b) * ring.plane;
      Ring::Walk walk(ring, params.pad_left);
      if (params.input_stride_c == 1) {
        for (int64_t x = 0; x < params.W; x++) {
          copy_pixel(from + x * params.input_stride_w, valid, ring.block, to + walk.next());
        }
      } else if (params.input_stride_w == 1) {
        alignas(64) bf16 staged[kWidth * kMostChannels];
        for (int64_t x = 0; x < params.W; x += kWidth) {
          const int64_t pixels = params.W - x < kWidth ? params.W - x : kWidth;
          turn_pixels(from + x, params.input_stride_c, channels, pixels, staged);
          for (int64_t i = 0; i < pixels; i++) {
            memcpy(to + walk.next(), staged + i * kMostChannels, ring.block * sizeof(bf16));
          }
        }
      } else {
        for (int64_t x = 0; x < params.W; x++) {
          bf16* pixel = to + walk.next();
          for (int64_t c = 0; c < channels; c++) pixel[c] = from[x * params.input_stride_w + c * params.input_stride_c];
        }
      }
    }
  }
}

}  // namespace BASISCONV_ISA
}  // namespace basisconv
