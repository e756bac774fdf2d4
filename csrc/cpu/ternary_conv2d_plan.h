// Packed lists and tiles of ternary_conv2d on the CPU: pure functions of sizes.
//
// A filter is the list of its taps with weight +1 and the list of those with weight -1. A tap is a number within its
// chunk of channels, (c * R + r) * S + s, in 16 bits; a table made for each call turns it into a distance in memory.
// Where tiles of a matrix unit can pay the weights are packed as such, too, two bits a place: those are filters of
// stacked_binary_conv2d with a third value. The packed bytes are the same for all instruction sets.
#pragma once
#include "../ops/ternary_conv2d.h"
#include "stacked_binary_conv2d_plan.h"

namespace basisconv {

constexpr int64_t kTernaryPackVersion = 2;
constexpr int64_t kTernaryTileWords = 2 * kTilePlaces;  // a plane of +1, then one of -1
constexpr int64_t kTernaryMostVectors = 8;  // registers of sums; more gave nothing where loads are the limit

struct TernaryPackHeader {
  int64_t version, C, K, R, S, groups;
  int64_t chunk;    // channels of one chunk
  int64_t entries;  // of all lists together
};

// Header, starts [chunks][K][2] and one more (uint32), tiles (uint32), entries (uint16): where list (chunk, k, sign)
// begins; it ends where the next one begins. Chunks are counted within a group. Tiles: words and rows of a StackedPack.
struct TernaryPack {
  int64_t chunk, chunks;
  int64_t chunk_taps;  // entries are below it
  int64_t lists;
  StackedPack tiles;                        // of no words where they cannot pay
  int64_t starts_at, tiles_at, entries_at;  // bytes

  int64_t bytes(int64_t entries) const { return entries_at + entries * 2; }
};

TernaryPack ternary_pack(const TernaryConv2dWeights& weights);
TernaryPackHeader ternary_pack_header(const TernaryConv2dWeights& weights, int64_t entries);
// Bytes that suffice for any planes: no weight is 0.
int64_t ternary_most_packed_bytes(const TernaryConv2dWeights& weights);
// planes [K, 2, R, S, words] → packed; returns the number of entries. Bits past the channels are not looked at. Without
// `tiles` their place is left as it is.
int64_t ternary_pack_planes(const TernaryConv2dWeights& weights, const int32_t* planes, char* packed,
                            bool tiles = true);
// Whether packed, of so many bytes, was made for these weights; and if so, whether the lists, or the rows behind the
// tiles, point nowhere else: a damaged packing must not be read with.
bool ternary_packed_fits(const TernaryConv2dWeights& weights, const char* packed, int64_t bytes);
bool ternary_lists_fit(const TernaryConv2dWeights& weights, const char* packed);
bool ternary_tiles_fit(const TernaryConv2dWeights& weights, const char* packed);

// A unit of work: a strip of rows and columns of the output, of one image and a range of filters. Its pixels lie in one
// line with `pitch` from row to row, so that tap (c, r, s) of all of them lies at one distance from the pixel; what the
// line holds between the rows' ends is computed too and not stored.
struct TernaryPlan {
  TernaryPack pack;
  int64_t rows, columns;  // of a strip of the output
  int64_t row_strips, column_strips;
  int64_t pitch;               // columns, and the widest shift to the right
  int64_t input_rows;          // rows, and the widest shift downwards, of one phase
  int64_t phases_h, phases_w;  // of the stride: pixels that are a multiple of it apart lie side by side
  int64_t plane;               // numbers of one channel: phases_h * phases_w * input_rows * pitch
  int64_t line;                // pixels of the line, rounded up to whole blocks
  int64_t vectors;             // registers of one block
  int64_t filter_parts;        // ranges of filters, so that there is work for all threads
  int64_t units;
  int64_t input_floats, sum_floats;  // of the scratch

  int64_t scratch() const { return input_floats + sum_floats; }
};

// The same call for the kernel that multiplies tiles, with its plan, and whether that is the quicker one where there is
// a matrix unit: it multiplies by weights of 0 too, and with two scales by both planes.
StackedBinaryConv2dParams ternary_as_stacked(const TernaryConv2dParams& params, const TernaryPack& pack);
StackedPlan ternary_tiles_plan(const TernaryConv2dParams& params, const TernaryPack& pack);
bool ternary_multiplies(const TernaryConv2dParams& params, const TernaryPack& pack);

// Whether the sums of packed activations fit 16 bits, with every weight there and every activation the largest.
bool ternary_sums_fit(const TernaryConv2dParams& params);
// width: numbers of a register. threads changes how the filters are shared, and no result.
TernaryPlan ternary_plan(const TernaryConv2dParams& params, int64_t width, int64_t threads);
// The distances [chunk_taps] of the taps from their pixel, in floats.
void ternary_offsets(const TernaryConv2dParams& params, const TernaryPlan& plan, int32_t* offsets);

}  // namespace basisconv
