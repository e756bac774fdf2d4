// Sums of the second stage of the matrix kernel become outputs: bias, residual, activation, one rounding.
#pragma once
#include "basis_conv2d_amx_band.h"

namespace basisconv {
namespace BASISCONV_ISA {

// Sums [count][16 pixels][32 outputs] of outputs k ... k+outputs-1; NCHW: [count][16 outputs][16 pixels, and as
// many places that nobody reads].
struct Block {
  const float* sums;
  const PixelTile* tiles;
  int64_t count, image, k, outputs;
};

template <Activation ACTIVATION>
static BASISCONV_INLINE Vec::Reg activate(Vec::Reg value) {
  if constexpr (ACTIVATION != Activation::none) value = Vec::max(Vec::zero(), value);
  if constexpr (ACTIVATION == Activation::relu6) value = Vec::min(Vec::set1(6.0f), value);
  return value;
}

// channels_last.
template <Activation ACTIVATION, bool RESIDUAL>
static void store_pixels(const BasisConv2dParams& params, const Block& block) {
  const int64_t K = params.weights.K, k = block.k;
  const int64_t low = block.outputs < kSide ? block.outputs : kSide, high = block.outputs - low;
  const __mmask32 real = static_cast<__mmask32>((uint64_t{1} << block.outputs) - 1);
  const Vec::Reg bias0 = Vec::load_n(params.bias + k, low), bias1 = Vec::load_n(params.bias + k + low, high);
  for (int64_t t = 0; t < block.count; t++) {
    int64_t at = (block.image * params.OH * params.OW + block.tiles[t].output) * K + k;
    for (uint32_t valid = block.tiles[t].valid; valid; valid &= valid - 1, at += K) {
      const float* row = block.sums + t * kBlock + __builtin_ctz(valid) * kOutputs;
      Vec::Reg value0 = Vec::add(Vec::load(row), bias0), value1 = Vec::add(Vec::load(row + kSide), bias1);
      if constexpr (RESIDUAL) {
        const bf16* residual = static_cast<const bf16*>(params.residual) + at;
        value0 = Vec::add(value0, Vec::load_n(residual, low));
        value1 = Vec::add(value1, Vec::load_n(residual + low, high));
      }
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(activate<ACTIVATION>(value1), activate<ACTIVATION>(value0));
      _mm512_mask_storeu_epi16(static_cast<bf16*>(params.output) + at, real, both);
    }
  }
}

// NCHW: the valid pixels of a tile are neighbours in their plane.
template <Activation ACTIVATION>
static void store_planes(const BasisConv2dParams& params, const Block& block) {
  const int64_t plane = params.OH * params.OW;
  for (int64_t t = 0; t < block.count; t++) {
    const __mmask16 valid = static_cast<__mmask16>(block.tiles[t].valid);
    const int64_t pixels = __builtin_popcount(valid);
    for (int64_t i = 0; i < block.outputs; i++) {
      const int64_t k = block.k + i, at = (block.image * params.weights.K + k) * plane + block.tiles[t].output;
      Vec::Reg value = _mm512_maskz_compress_ps(valid, Vec::load(block.sums + t * kBlock + i * kOutputs));
      value = Vec::add(value, Vec::set1(params.bias[k]));
      if (params.residual) value = Vec::add(value, Vec::load_n(static_cast<const bf16*>(params.residual) + at, pixels));
      Vec::store_n(static_cast<bf16*>(params.output) + at, activate<ACTIVATION>(value), pixels);
    }
  }
}

using Store = void (*)(const BasisConv2dParams& params, const Block& block);

template <Activation ACTIVATION>
static Store store_for(const BasisConv2dParams& params) {
  if (!params.channels_last) return store_planes<ACTIVATION>;
  return params.residual ? store_pixels<ACTIVATION, true> : store_pixels<ACTIVATION, false>;
}
static inline Store store_for(const BasisConv2dParams& params) {
  switch (params.activation) {
    case Activation::relu:
      return store_for<Activation::relu>(params);
    case Activation::relu6:
      return store_for<Activation::relu6>(params);
    default:
      return store_for<Activation::none>(params);
  }
}

}  // namespace BASISCONV_ISA
}  // namespace basisconv
