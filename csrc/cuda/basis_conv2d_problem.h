// What the CUDA kernels of basis_conv2d share: the problem as they see it, packed weights, the epilogue.
//
// Compact coefficients make each group a problem of its own, blockIdx.y says which. C, Q and K below are those of one
// group; a filter and its channels are padded inside: Q to Q16 (16, 32, 64, ...), C to slabs of 64, K to chunks of 64.
#pragma once
#include "basis_conv2d.h"
#include "device.h"
#include "encoders.h"

namespace basisconv::cuda {

constexpr int kSlab = 64;   // channels in shared memory at a time: a row of 128 bytes
constexpr int kChunk = 64;  // outputs that stage 2 makes at a time
constexpr int kTileX = 8;   // pixels of a tile in a row: the 16 rows of a matrix are two rows of pixels
constexpr int kTagBytes = 64;
constexpr int kLargestQ = 256;  // of one group

struct Strides {
  int64_t n, c, h, w;  // elements
};

struct Problem {
  const void* input;  // the first pixel of the first group
  Strides in;
  const uint64_t* tag;
  uint64_t expected_tag;
  const char* basis;     // [groups][slabs][taps] tiles of [Q16] rows of 128 bytes, swizzled
  const char* mixing;    // [groups][chunks][Q16 / width] tiles of [64] rows of `width` coefficients, swizzled
  const void* bias;      // [groups * K] or null
  const void* residual;  // like the output, or null
  void* output;
  Strides out;
  void* maps;  // or null
  Strides map;
  int64_t basis_bytes, mixing_bytes;  // of one group
  int N, H, W, OH, OW, C, Q, K, groups;
  int R, S, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
  int taps, slabs, chunks;
  int activation;
  bool input_in_16_bytes;    // channels lie side by side, pixels multiples of 16 bytes apart
  bool pixels_side_by_side;  // of the input: stride_w is 1
  bool output_in_8_bytes;    // outputs lie side by side, pixels multiples of four apart
};

// --- packed weights --------------------------------------------------------------------------------------------------

BASISCONV_EITHER int padded_filters(int64_t filters) {
  int padded = 16;
  while (padded < filters) padded *= 2;
  return padded;
}
BASISCONV_EITHER int64_t tiles_of(int64_t count, int64_t tile) { return (count + tile - 1) / tile; }
// Coefficients in a row of a tile: wgmma takes rows of at most 128 bytes.
BASISCONV_EITHER constexpr int mixing_width(int Q16) { return Q16 < 64 ? Q16 : 64; }

struct Packing {
  int Q16;
  int64_t C, Q, K, taps, slabs, chunks;  // C, Q, K of one group
  int64_t groups, basis_bytes, mixing_bytes;
};
inline Packing packing_of(const BasisConv2dWeights& w) {
  Packing p{};
  p.groups = w.mixing_groups;
  p.C = w.C / p.groups;
  p.Q = w.Q / p.groups;
  p.K = w.K / p.groups;
  p.Q16 = padded_filters(p.Q);
  p.taps = w.R * w.S;
  p.slabs = tiles_of(p.C, kSlab);
  p.chunks = tiles_of(p.K, kChunk);
  p.basis_bytes = p.slabs * p.taps * p.Q16 * kSlab * 2;
  p.mixing_bytes = p.chunks * kChunk * p.Q16 * 2;
  return p;
}
// Says of packed weights what they were made for. FNV-1a over everything that decides where a number lies.
inline uint64_t tag_of(const BasisConv2dWeights& w) {
  constexpr int64_t version = 1;
  uint64_t hash = 0xcbf29ce484222325ull;
  for (const int64_t value : {version, w.C, w.Q, w.K, w.R, w.S, w.groups, w.mixing_groups, int64_t(w.dtype)}) {
    for (int byte = 0; byte < 8; ++byte) {
      hash = (hash ^ (static_cast<uint64_t>(value) >> 8 * byte & 0xFF)) * 0x100000001b3ull;
    }
  }
  return hash;
}

// The problem of a call that cuda_variant accepts.
Problem problem_of(const CudaBasisConv2d& call);

// --- epilogue --------------------------------------------------------------------------------------------------------

constexpr int kStagedColumns = 32;
// Pixels of the staging lie `32 floats + 32 bytes` apart: neither the fragments' 8-byte stores nor the 16-byte loads of
// whole pixels ever meet in a bank.
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

// NaN where the packed weights are those of another problem, 0 where they are this one's.
BASISCONV_DEVICE float poison(const Problem& p) { return *p.tag == p.expected_tag ? 0.0f : float_of(0x7FC00000u); }

template <class T>
BASISCONV_DEVICE float finished(const Problem& p, float value, float offset, int64_t k, int64_t at) {
  value += offset;
  if (p.bias != nullptr) value += widen(static_cast<const T*>(p.bias)[k]);
  if (p.residual != nullptr) value += widen(static_cast<const T*>(p.residual)[at]);
  if (p.activation != static_cast<int>(Activation::none)) value = value < 0.0f ? 0.0f : value;  // NaN stays NaN
  if (p.activation == static_cast<int>(Activation::relu6)) value = value > 6.0f ? 6.0f : value;
  return value;
}

// Bias, residual, activation, one rounding and the store of 16 pixels x 32 outputs from the fragments of four m16n8
// accumulators. `first` is the first of the outputs in its group; whole warps call it.
template <class T>
BASISCONV_DEVICE void store_outputs(const Problem& p, const float (&y)[4][4], char* staging, const Pixels& pixels,
                                    int first, float offset) {
  const int lane = threadIdx.x % 32, group = blockIdx.y;
  warp_reuses(staging, kStagingBytes);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      char* to = staging + (lane / 4 + 8 * half) * kStagingPitch + (j * 8 + lane % 4 * 2) * 4;
      *reinterpret_cast<float2*>(to) = float2{y[j][2 * half], y[j][2 * half + 1]};
    }
  }
  __syncwarp();
  T* output = static_cast<T*>(p.output);
  if (p.output_in_8_bytes) {  // eight lanes a pixel, four outputs a lane
    const int k = first + lane % 8 * 4;
#pragma unroll 1
    for (int pixel = lane / 8; pixel < 16; pixel += 4) {
      if (k >= p.K || !pixels.inside(p, pixel)) continue;
      const float4 v = *reinterpret_cast<const float4*>(staging + pixel * kStagingPitch + lane % 8 * 16);
      const int64_t channel = static_cast<int64_t>(group) * p.K + k, at = pixels.at(p.out, pixel) + channel;
      uint2 words;
      words.x = round2<T>(finished<T>(p, v.x, offset, channel, at), finished<T>(p, v.y, offset, channel + 1, at + 1));
      words.y =
          round2<T>(finished<T>(p, v.z, offset, channel + 2, at + 2), finished<T>(p, v.w, offset, channel + 3, at + 3));
      *reinterpret_cast<uint2*>(output + at) = words;
    }
  } else {  // element by element, the one that lies closest first
    const bool outputs_first = p.out.c == 1;
#pragma unroll 1
    for (int i = lane; i < 16 * kStagedColumns; i += 32) {
      const int pixel = outputs_first ? i / kStagedColumns : i % 16;
      const int column = outputs_first ? i % kStagedColumns : i / 16, k = first + column;
      if (k >= p.K || !pixels.inside(p, pixel)) continue;
      const float v = *reinterpret_cast<const float*>(staging + pixel * kStagingPitch + column * 4);
      const int64_t channel = static_cast<int64_t>(group) * p.K + k, at = pixels.at(p.out, pixel) + channel * p.out.c;
      output[at] = T{static_cast<uint16_t>(round2<T>(finished<T>(p, v, offset, channel, at), 0.0f))};
    }
  }
  __syncwarp();
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
