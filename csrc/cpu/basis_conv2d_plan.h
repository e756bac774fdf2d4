// How basis_conv2d runs on a CPU: tile shapes, packed layout, scratch. Pure functions of sizes and instruction set,
// compiled once, tested without running a kernel.
#pragma once
#include <cstdint>

#include "../ops/basis_conv2d.h"
#include "band.h"
#include "isa.h"

namespace basisconv {

enum class CpuVariant : int32_t { direct = 0, winograd = 1, amx = 2 };

// Layout of the packed weights. Per channel group of the R*S convolution:
//   filters [filter_blocks][channel_blocks][positions][block/lanes][vectors][width]      (direct)
//   filters [rows][chunks][filter_blocks][columns][chunk][block/lanes][vectors][width]   (winograd)
//   taps    [channel_blocks][filter_blocks][block/lanes][vectors][9][width]              (winograd, of large filters)
// where positions are the R*S taps, or the rows and columns of Winograd's, whose channel blocks come in chunks: the
// order in which the kernel walks through them. One register holds width/lanes filters times `lanes`
// channels: with few filters it is filled up by channels, and the lanes of a filter are summed once at the end.
// Where products take pairs of bfloat16 values (`values` 2), everything that is "side by side in a register" is a slot
// of two: two channels of a filter, or two maps of an output. Then per mixing group the coefficients twice, small
// beside the filters: [panels][slots][output_vectors * width] for a channels_last result, where registers hold outputs
// of one pixel, and [planar_panels][slots][planar_rows] for an NCHW result, where registers hold pixels of one output.
// Behind them the taps, a group after the other.
struct CpuPack {
  CpuVariant variant;
  int32_t width;           // floats in a register
  int32_t values;          // operands in the place of a float: 1, or 2 bfloat16
  int32_t lanes;           // channels side by side in a register: 1, 2, 4 or 8
  int32_t vectors;         // registers of filters in one tile
  int32_t output_vectors;  // registers of outputs in one tile of the second stage
  int64_t block;           // channels in a channel block: 16, or 4 for very few channels; pairs: 32 or 16
  int64_t channel_blocks;  // of one group
  int32_t tile_width;      // winograd: tiles of 2 x tile_width outputs, 2 or 4
  int32_t position_rows;   // winograd: inputs of a tile, and positions
  int32_t position_columns;
  int64_t chunk;  // winograd: channel blocks transformed and multiplied at a time; fewer in a last one
  int64_t positions;
  int64_t filters;          // in a filter block: vectors * width / lanes
  int64_t filter_blocks;    // of one group
  int64_t maps;             // of one group with padding: filter_blocks * filters
  int64_t slots;            // places of z that one mixing group reads, `values` maps each
  int64_t panels;           // of one mixing group
  int64_t planar_rows;      // outputs in one tile of the second stage for NCHW
  int64_t planar_panels;    // of one mixing group
  int64_t group_size;       // packed filters of one group, values
  int64_t taps_group_size;  // winograd: their taps, or none
  // Floats, whatever they hold.
  int64_t filters_size, coefficients_size, planar_size, taps_size;
};

// Winograd: floats from the start of a group's filters to those of one position, filter block and channel block.
inline int64_t winograd_filters_at(const CpuPack& p, int64_t position, int64_t filter_block, int64_t channel_block) {
  const int64_t begin = channel_block / p.chunk * p.chunk;
  const int64_t count = p.channel_blocks - begin < p.chunk ? p.channel_blocks - begin : p.chunk;
  const int64_t columns = p.position_columns;
  const int64_t row = position / columns * p.channel_blocks * columns * p.filter_blocks;
  const int64_t blocks = row + begin * columns * p.filter_blocks +
                         (filter_block * columns + position % columns) * count + channel_block - begin;
  return blocks * (p.block / p.lanes) * p.vectors * p.width;
}

// The same of taps: to those of one filter block and channel block.
inline int64_t winograd_taps_at(const CpuPack& p, int64_t filter_block, int64_t channel_block) {
  return (channel_block * p.filter_blocks + filter_block) * (p.block / p.lanes * p.vectors * 9 * p.width);
}

constexpr int64_t kRowFiltersApart = 16;  // floats between positions transformed from taps: not 4 KiB from each other

// The amx variant packs tiles of bfloat16 pairs instead: see basis_conv2d_amx.cpp.
constexpr int64_t kAmxSide = 16;       // rows of a tile
constexpr int64_t kAmxDepth = 32;      // bfloat16 of a row
constexpr int64_t kAmxTogether = 6;    // tiles of pixels that share each tile of weights
constexpr int64_t kAmxMostTiles = 18;  // CpuPlan::tiles, and tiles of a part in place, at most
constexpr int64_t kAmxColumns = 3;     // of taps, where they are summed apart

// Whether weights are packed ahead, all parts for calls of all sizes, or in the call and for it alone.
enum class Packing { ahead, in_call };

// Tile sizes for one batch and map. Scratch is each thread's own.
struct CpuPlan {
  CpuPack pack;
  int64_t units;         // rows of work that threads share, over the batch: output rows, or rows of Winograd tiles
  int64_t rows;          // direct: output rows in a pass; amx in place: in a part, at most
  int64_t chunk;         // channel blocks: direct: between two visits of a tile; winograd: a chunk; amx: all
  bool from_taps;        // winograd: filters are transformed when they are used, in each pass
  int64_t tiles;         // winograd: tiles in a pass; amx: tiles of 16 pixels that go through a stage together
  int64_t tile_columns;  // winograd: tiles in a row
  // winograd: products [group][position][filter block][tile][filter], or [group][position][tile][map] with several
  // lanes: values between tiles, between filter blocks and between positions.
  int64_t products_stride, products_block, products_position;
  // winograd: one register of filters with several lanes: products are kept lane by lane,
  // [group][position][tile][width], and the lanes of a filter added up behind the output transform.
  bool sums_later;
  // winograd: while the first pixels of a filter block are multiplied, the next block is fetched towards the core, or
  // the lines that the result will fill and the residual fills, and of the input what the next pass reads first.
  bool fetches_filters, fetches_output, fetches_input;
  // Read where the input lies, without a ring: operands as they are, channels_last, whole blocks; direct: and no
  // padding columns, or pairs of more than one block; amx: and columns of taps are summed apart.
  bool in_place;
  Band band;             // amx: input rows of a pass
  int64_t ring_rows;     // padded input rows kept
  int64_t ring_columns;  // pixels of one ring row and stride phase
  // Floats of scratch, each a multiple of 16: rows, z, z of one pixel block turned for NCHW, accumulators between
  // chunks or of columns of taps, one pixel of zeros, transformed input tiles, transformed filters of a row, products.
  int64_t ring_size, maps_size, turned_size, partial_size, zeros_size, transformed_size, row_filters_size,
      products_size;
  int64_t scratch() const {
    return ring_size + maps_size + turned_size + partial_size + zeros_size + transformed_size + row_filters_size +
           products_size;
  }
};

// The instruction set that these weights run on when `isa` is in use: products of bfloat16 take some of them only.
Isa isa_for(const BasisConv2dWeights& weights, Isa isa);
CpuPack cpu_pack(const BasisConv2dWeights& weights, Isa isa);
// Its `pack` is the one given; packed in the call, the parts that it does not read have no size there.
CpuPlan cpu_plan(const BasisConv2dParams& params, const CpuPack& pack, int64_t threads,
                 Packing packing = Packing::ahead);

// The packed tensor starts with this header; the floats follow at kCpuPackHeaderBytes.
struct CpuPackHeader {
  char magic[8];
  int64_t version;
  int64_t isa;
  // C Q K R S stride_h stride_w dilation_h dilation_w groups mixing_groups dtype precise
  int64_t sizes[13];
};
constexpr int64_t kCpuPackHeaderBytes = 128;
// Counts up with every change of the layout or its size; programs that were traced with another one are refused.
constexpr int64_t kCpuPackVersion = 6;
static_assert(sizeof(CpuPackHeader) <= kCpuPackHeaderBytes, "the header must fit in front of the floats");

CpuPackHeader cpu_pack_header(const BasisConv2dWeights& weights, Isa isa);

// Bytes of the packed tensor: the most that any instruction set needs, so that a traced graph keeps its sizes on
// another processor, where the header then makes the op refuse the foreign bytes.
int64_t cpu_packed_bytes(const BasisConv2dWeights& weights);
int64_t cpu_packed_bytes(const CpuPack& pack);  // what the kernels read in this layout: at most so many

// Floats of all parts: what the kernels read behind the header.
inline int64_t cpu_packed_floats(const CpuPack& p) {
  return p.filters_size + p.coefficients_size + p.planar_size + p.taps_size;
}

}  // namespace basisconv
