// What the CUDA kernels of binary_conv2d share: the problem as they see it, and packed weights.
//
// With a, w the bits of input and filters, zero bits outside the image and behind the last channel, and popc over the
// taps of a filter,
//
//   signs   v = 4 popc(a & w) - 2 popc(a) + T[k]     T = (1 + p) I[k] - p D[k]       p: padding_value
//   codes   v = sum over planes b of 2^b (2 popc(a_b & w) - popc(a_b))
//
// popc(a) is one more filter, of ones. d(r, s) = C - 2 popc(w(r, s)) is the sum of a filter's tap with its signs
// turned; I sums d over the taps that lie inside the image, a rectangle, and D over all: with sums from the first tap
// on
// (`totals`), which only the weights decide, I is four of them, and D one. No table depends on the map's size.
//
// The tensor cores take 256 bits a step: two *units* of 128. A unit is 128 channels of a tap, or for few channels the
// taps of 2 or 4 neighbouring columns with 64 or 32 channels each (`merged`). A slab is what the shared memory holds of
// each pixel: two units, or the only one.
#pragma once
#include "binary_conv2d.h"
#include "device.h"
#include "tags.h"

namespace basisconv::cuda::binary {

constexpr int kTagBytes = 64;
constexpr int kUnitBytes = 16;
constexpr int kUnitWords = 4;
constexpr int kMostChunkSteps = 4;  // steps whose filters travel together
constexpr int kFewFilters = 16;     // of a group: a narrower tile serves them

BASISCONV_EITHER int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Column n of the products of a tile of 64 filters has this one of them, by which row n of the packing is filled: lane
// t of four, which holds the columns 8 j + 2 t and 8 j + 2 t + 1, has eight neighbouring filters of each 32.
BASISCONV_EITHER int filter_of_column(int n) { return n / 32 * 32 + n / 2 % 4 * 8 + n / 8 % 4 * 2 + n % 2; }

struct Packing {
  int64_t C, K, groups, R, S;  // C and K of one group
  int64_t words;               // of the channels of a group
  int merged;                  // columns of taps in a unit
  int slab_units;              // units of a pixel in a slab: 1 or 2
  int columns;                 // filters in a tile
  int64_t blocks;              // tiles of a group
  int64_t slabs;
  int64_t across;     // units that the taps of a filter's row take
  int64_t positions;  // R * across
  int64_t steps;      // of a slab
  int64_t chunk_steps, chunks;
  int64_t padded;                    // filters of a group with those that fill the last tile
  int64_t totals_bytes, tile_bytes;  // of one group; of one tile
};
inline Packing packing_of(const BinaryConv2dWeights& w) {
  Packing p{};
  p.groups = w.groups;
  p.C = w.C / w.groups;
  p.K = w.K / w.groups;
  p.R = w.R;
  p.S = w.S;
  p.words = words_for(p.C);
  p.merged = p.words == 1 ? 4 : p.words == 2 ? 2 : 1;
  while (p.merged / 2 >= p.S) p.merged /= 2;
  p.slab_units = p.words > kUnitWords ? 2 : 1;
  p.columns = p.K <= kFewFilters ? kFewFilters : 64;
  p.blocks = ceil_div(p.K, p.columns);
  p.padded = p.blocks * p.columns;
  p.slabs = ceil_div(p.words, kUnitWords * p.slab_units);
  p.across = ceil_div(p.S, p.merged);
  p.positions = p.R * p.across;
  p.steps = ceil_div(p.positions * p.slab_units, 2);
  p.chunks = ceil_div(p.steps, kMostChunkSteps);
  p.chunk_steps = ceil_div(p.steps, p.chunks);
  p.totals_bytes = (p.R + 1) * (p.S + 1) * p.padded * 4;
  p.tile_bytes = p.slabs * p.steps * 2 * (p.columns + 1) * kUnitBytes;
  return p;
}
// Says of packed weights what they were made for: everything that decides where a bit lies.
inline uint64_t tag_of(const BinaryConv2dWeights& w) {
  constexpr int64_t version = 2;
  return fnv1a({version, w.C, w.K, w.R, w.S, w.groups});
}

struct Problem {
  const uint32_t* input;  // [N, planes, H, W, words]
  const uint64_t* tag;
  uint64_t expected_tag;
  const int32_t* totals;  // [groups][R + 1][S + 1][padded]
  // [groups][blocks][slabs][steps * 2] units of [columns + 1] rows of 16 bytes, the last row the filter of ones; of 64
  // columns in the order of filter_of_column
  const char* filters;
  CudaFactor scale, bias, pixel_scale;
  const int32_t* threshold;
  const bool* flip;
  void* output;
  int64_t tile_bytes;
  int N, H, W, OH, OW, C, K, groups, planes;  // C and K of one group
  int R, S, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
  int words, group_words;  // of a pixel; of a group's channels
  int merged, slab_units, slabs, across, positions, steps, chunk_steps, chunks, blocks, padded;
  int padding_value;
  BinaryActivation activation;
  BinaryOutput output_type;
  bool codes, channels_last;
  bool input_in_16_bytes;   // units of one pixel lie at multiples of 16 bytes
  bool output_in_16_bytes;  // outputs side by side, in whole pieces of 16 bytes
};

// The problem of a call for which there is no `cuda_binary_reason`.
Problem problem_of(const CudaBinaryConv2d& call);

const char* run_sm80(const Problem& problem, const CudaDevice& device, Stream stream);

}  // namespace basisconv::cuda::binary
