// What becomes of a tile: bias, residual, activation, one rounding and the store, from the fragments of m16n8
// accumulators. Also the maps that the backward keeps.
#pragma once
#include "basis_conv2d_problem.h"

namespace basisconv::cuda {

constexpr int kStagedColumns = 32;
// Pixels of the staging of single elements lie `32 floats + 32 bytes` apart: its 8-byte stores never meet in a bank.
constexpr int kStagingPitch = kStagedColumns * 4 + 32;
constexpr int kStagingBytes = 16 * kStagingPitch;  // of a warp

// The 16 pixels of a warp: two rows of eight, in one image.
struct Pixels {
  int n, y, x;  // of the first, in the output

  BASISCONV_DEVICE bool inside(const Problem& p, int pixel) const {
    return y + pixel / kTileX < p.OH && x + pixel % kTileX < p.OW;
  }
  BASISCONV_DEVICE int64_t at(const Strides& s, int pixel) const {
    return n * s.n + (y + pixel / kTileX) * s.h + (x + pixel % kTileX) * s.w;
  }
};

// NaN where the packed weights are those of another problem, 0 where they are this one's. Z starts from it: a NaN there
// is one everywhere.
BASISCONV_DEVICE float poison(const Problem& p) { return *p.tag == p.expected_tag ? 0.0f : float_of(0x7FC00000u); }

// Zeros for the maps of eight that only fill up a tile, in an m16n8 accumulator; q is the first of them in its group.
// An infinite pixel times their filters of zeros is NaN, and that times their coefficients of zero is NaN in every
// output.
BASISCONV_DEVICE void clear_filling(const Problem& p, float* z, int q) {
  if (q + 8 <= p.Q) return;
  const int real = p.Q - q - threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) z[i] = i % 2 < real ? z[i] : 0.0f;
}

// Two values of T side by side.
template <class T>
struct Two {
  float low, high;

  BASISCONV_DEVICE explicit Two(uint32_t word)
      : low(widen(T{static_cast<uint16_t>(word)})), high(widen(T{static_cast<uint16_t>(word >> 16)})) {}
};

// Bias of a lane's columns in `columns` outputs: of eight after the other the pair 2t, 2t + 1. Zeros where there is
// none.
template <int columns>
struct BiasPairs {
  uint32_t words[columns / 8];

  template <class T>
  BASISCONV_DEVICE void load(const Problem& p, int first) {
    const T* bias = static_cast<const T*>(p.bias) + static_cast<int64_t>(blockIdx.y) * p.K + first;
#pragma unroll
    for (int j = 0; j < columns / 8; ++j) {
      const bool some = p.bias != nullptr && p.output_in_16_bytes && first + j * 8 < p.K;
      words[j] = some ? *reinterpret_cast<const uint32_t*>(bias + j * 8 + threadIdx.x % 4 * 2) : 0;
    }
  }
};

// 16 pixels x `columns` outputs where these lie in pieces of 16 bytes. A lane finishes what it holds, rounds it, and
// the warp turns it through its staging, so that it stores whole pieces, those of a pixel one behind the other.
template <class T, int columns>
BASISCONV_DEVICE void store_pieces(const Problem& p, float (&y)[columns / 2], const BiasPairs<columns>& bias,
                                   char* staging, const Pixels& pixels, int first) {
  constexpr int row_bytes = columns * 2, pieces = columns / 8;
  const int lane = threadIdx.x % 32;
  const int64_t channel = static_cast<int64_t>(blockIdx.y) * p.K + first;
  if (p.bias != nullptr) {
#pragma unroll
    for (int j = 0; j < pieces; ++j) {
      const Two<T> pair(bias.words[j]);
      y[j * 4] += pair.low, y[j * 4 + 1] += pair.high;
      y[j * 4 + 2] += pair.low, y[j * 4 + 3] += pair.high;
    }
  }
  if (p.residual != nullptr) {
    uint32_t words[2][pieces] = {};  // all loads are under way before the first is used
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = lane / 4 + 8 * half;
      const bool inside = pixels.inside(p, pixel);
      const T* from = static_cast<const T*>(p.residual) + pixels.at(p.out, pixel) + channel + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < pieces; ++j) {
        if (inside && first + j * 8 < p.K) words[half][j] = *reinterpret_cast<const uint32_t*>(from + j * 8);
      }
    }
#pragma unroll
    for (int j = 0; j < pieces * 2; ++j) {
      const Two<T> pair(words[j % 2][j / 2]);
      y[j * 2] += pair.low, y[j * 2 + 1] += pair.high;
    }
  }
  const uint32_t sixes = round2<T>(6.0f, 6.0f);
  warp_reuses(staging, 16 * row_bytes);
  const uint32_t row = swizzled(lane / 4 * row_bytes, row_bytes) + lane % 4 * 4;  // eight rows below it is the same
#pragma unroll
  for (int j = 0; j < pieces; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t word = round2<T>(y[j * 4 + 2 * half], y[j * 4 + 2 * half + 1]);
      if (p.activation != static_cast<int>(Activation::none)) word = max2<T>(word, 0);
      if (p.activation == static_cast<int>(Activation::relu6)) word = min2<T>(word, sixes);
      *reinterpret_cast<uint32_t*>(staging + half * 8 * row_bytes + (row ^ static_cast<uint32_t>(j * 16))) = word;
    }
  }
  __syncwarp();
  // As many pixels at a time as there are lanes for their pieces: always in one row.
  constexpr int at_a_time = 32 / pieces;
  const int k = lane % pieces * 8, column = lane / pieces;
  const int left_x = first + k < p.K ? p.OW - pixels.x - column : 0, left_y = p.OH - pixels.y;
  T* to = static_cast<T*>(p.output) + pixels.at(p.out, column) + channel + k;
#pragma unroll
  for (int i = 0; i < 16 / at_a_time; ++i) {
    const int y = i * at_a_time / kTileX, x = i * at_a_time % kTileX;
    if (y >= left_y || x >= left_x) continue;
    const uint32_t from = swizzled((i * at_a_time + column) * row_bytes + k * 2, row_bytes);
    *reinterpret_cast<uint4*>(to + y * p.out.h + x * p.out.w) = *reinterpret_cast<const uint4*>(staging + from);
  }
  __syncwarp();
}

template <class T>
BASISCONV_DEVICE float finished(const Problem& p, float value, int64_t k, int64_t at) {
  if (p.bias != nullptr) value += widen(static_cast<const T*>(p.bias)[k]);
  if (p.residual != nullptr) value += widen(static_cast<const T*>(p.residual)[at]);
  if (p.activation != static_cast<int>(Activation::none)) value = value < 0.0f ? 0.0f : value;  // NaN stays NaN
  if (p.activation == static_cast<int>(Activation::relu6)) value = value > 6.0f ? 6.0f : value;
  return value;
}

// 16 pixels x 32 outputs however they lie: element by element, the one that lies closest first.
template <class T>
BASISCONV_DEVICE void store_elements(const Problem& p, const float* y, char* staging, const Pixels& pixels, int first) {
  const int lane = threadIdx.x % 32;
  warp_reuses(staging, kStagingBytes);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      char* to = staging + (lane / 4 + 8 * half) * kStagingPitch + (j * 8 + lane % 4 * 2) * 4;
      *reinterpret_cast<float2*>(to) = float2{y[j * 4 + 2 * half], y[j * 4 + 2 * half + 1]};
    }
  }
  __syncwarp();
  T* output = static_cast<T*>(p.output);
  const bool outputs_first = p.out.c == 1;
#pragma unroll 1
  for (int i = lane; i < 16 * kStagedColumns; i += 32) {
    const int pixel = outputs_first ? i / kStagedColumns : i % 16;
    const int column = outputs_first ? i % kStagedColumns : i / 16, k = first + column;
    if (k >= p.K || !pixels.inside(p, pixel)) continue;
    const float v = *reinterpret_cast<const float*>(staging + pixel * kStagingPitch + column * 4);
    const int64_t channel = static_cast<int64_t>(blockIdx.y) * p.K + k,
                  at = pixels.at(p.out, pixel) + channel * p.out.c;
    output[at] = T{static_cast<uint16_t>(round2<T>(finished<T>(p, v, channel, at), 0.0f))};
  }
  __syncwarp();
}

// Either of them. `first` is the first of the outputs in its group; whole warps call it.
template <class T, int columns>
BASISCONV_DEVICE void store_outputs(const Problem& p, float (&y)[columns / 2], const BiasPairs<columns>& bias,
                                    char* staging, const Pixels& pixels, int first) {
  if (p.output_in_16_bytes) return store_pieces<T, columns>(p, y, bias, staging, pixels, first);
#pragma unroll
  for (int part = 0; part < columns / kStagedColumns; ++part) {
    if (first + part * kStagedColumns >= p.K) break;
    store_elements<T>(p, y + part * kStagedColumns / 2, staging, pixels, first + part * kStagedColumns);
  }
}

// z for the backward, straight from the fragments of eight filters; q is the first of them in its group.
template <class T>
BASISCONV_DEVICE void store_maps(const Problem& p, const float* z, const Pixels& pixels, int q) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int pixel = lane / 4 + i / 2 * 8, filter = q + lane % 4 * 2 + i % 2;
    if (filter >= p.Q || !pixels.inside(p, pixel)) continue;
    const int64_t channel = static_cast<int64_t>(blockIdx.y) * p.Q + filter;
    static_cast<T*>(p.maps)[pixels.at(p.map, pixel) + channel * p.map.c] =
        T{static_cast<uint16_t>(round2<T>(z[i], 0.0f))};
  }
}

}  // namespace basisconv::cuda
