// What the CUDA kernels of basis_conv2d share: the problem as they see it, and packed weights.
//
// Compact coefficients make each group a problem of its own, blockIdx.y says which. C, Q and K below are those of one
// group; a filter and its channels are padded inside: Q to Q16 (16, 32, 64, ...), C to slabs of 64, K to chunks of 64.
#pragma once
#include "basis_conv2d.h"
#include "device.h"
#include "encoders.h"
#include "tags.h"

namespace basisconv::cuda {

constexpr int kSlab = 64;   // channels in shared memory at a time: a row of 128 bytes
constexpr int kChunk = 64;  // outputs that stage 2 makes at a time
constexpr int kTileX = 8;   // pixels of a tile in a row: the 16 rows of a matrix are two rows of pixels
constexpr int kTagBytes = 64;
constexpr int kMostStages = 8;  // of a ring of tiles in shared memory
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
  bool output_in_16_bytes;   // so do outputs and, where there are any, residual and pairs of bias
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
// Says of packed weights what they were made for: everything that decides where a number lies.
inline uint64_t tag_of(const BasisConv2dWeights& w) {
  constexpr int64_t version = 1;
  return fnv1a({version, w.C, w.Q, w.K, w.R, w.S, w.groups, w.mixing_groups, int64_t(w.dtype)});
}

// The problem of a call that cuda_variant accepts.
Problem problem_of(const CudaBasisConv2d& call);

}  // namespace basisconv::cuda
