// How binary_conv2d runs on a CPU: packed layout, counts or products, rows in a pass. Pure functions of sizes and
// instruction set, compiled once, tested without running a kernel.
#pragma once
#include <cstdint>

#include "../ops/binary_conv2d.h"
#include "isa.h"

namespace basisconv {

// The two ways to count bits, and what a register holds:
//   words    32 bits of one filter a lane; xor with a broadcast word of the pixel, then popcount.
//   nibbles  8 bits of one filter a lane. The four bits of the pixel choose a table of the 16 values of popc(a ^ i),
//            those of the filter index it: one byte shuffle for the four channels of as many filters as lanes.
enum class BinaryVariant : int32_t { words = 0, nibbles = 1 };

// Layout of the packed weights, behind the header:
//   counts [groups][R * S][padded filters]        int32, set bits of one tap of a filter
//   bits   [groups][blocks][R * S][units][block]  words: uint32; nibbles: bytes of 8 channels, in the order `place`
struct BinaryPack {
  BinaryVariant variant;
  int32_t lanes;    // filters in a register
  int32_t vectors;  // registers of filters in a tile
  int32_t pixels;   // pixels in a tile, at most
  int64_t block;    // filters in a tile: lanes * vectors
  int64_t blocks;   // of one group
  int64_t padded;   // filters of one group, a multiple of block
  int64_t units;    // words or bytes that hold the channels of a group
  int64_t unit_bytes;
  int64_t counts_bytes, bits_bytes;
};

struct BinaryPackHeader {
  char magic[8];
  int64_t version, isa, C, K, R, S, groups;
};
static_assert(sizeof(BinaryPackHeader) == 64, "bits behind it stay aligned to a cache line");

constexpr int64_t kBinaryPackVersion = 2;

// The set for which weights are packed when `isa` is in use: those with products of bfloat16 have no layout of their
// own, and the matrix unit reads the words of avx512_vpopcntdq.
Isa binary_isa_for(Isa isa);
BinaryPack binary_pack(const BinaryConv2dWeights& weights, Isa isa);
BinaryPackHeader binary_pack_header(const BinaryConv2dWeights& weights, Isa isa);
int64_t binary_packed_bytes(const BinaryConv2dWeights& weights, Isa isa);
// The largest of all instruction sets, so that one size holds for a program that was traced elsewhere.
int64_t binary_packed_bytes(const BinaryConv2dWeights& weights);

// Where filter f of a register stands among its bytes. Widening the counts of a register from bytes to 16 bits takes
// the low and the high halves of its 16-byte parts; in this order the results are filters in sequence.
inline int64_t binary_place(const BinaryPack& pack, int64_t f) {
  if (pack.variant == BinaryVariant::words) return f;
  const int64_t half = pack.lanes / 2, high = f / half, within = f % half;
  return within / 8 * 16 + high * 8 + within % 8;
}

constexpr int64_t kMostPassRows = 16;
constexpr int64_t kTileChannels = 64;  // of a pixel or filter in a tile of the matrix unit, a byte each

// One batch and map. A unit of work is a pass: `rows` output rows of one image. Scratch is each thread's own: a ring of
// input rows in the form that the tiles read, and one row of words.
//
// Products: a band of bytes in place of the ring, expanded filters, sums that wait, where each product finds its
// operands, and the row.
struct BinaryPlan {
  BinaryPack pack;
  BinaryRaw raw;        // what a tile sums up
  int64_t rows;         // output rows in a pass
  int64_t passes;       // of one image
  int64_t units;        // N * passes
  int64_t columns;      // pixels in a row of the ring, padding included
  int64_t pixel_bytes;  // of one group and plane
  int64_t plane_bytes;  // of one row: groups * columns * pixel_bytes
  int64_t row_bytes;    // of all planes
  int64_t ring_rows;
  int64_t line_words;  // the row of words, and one of a group
  int64_t pointers;    // to rows of the ring, for the taps of all rows in a pass
  int64_t scratch_bytes;
  // Products have rows, passes, units, columns (of one phase), line_words and scratch_bytes of these, and:
  int64_t chunks;       // of 64 channels, in a group
  int64_t products;     // of a tile of pixels with one of filters: taps * chunks
  int64_t block;        // products added to a tile of sums in one visit: all, or those of some chunks
  int64_t sums_bytes;   // of all tiles of pixels, where they wait between visits
  int64_t kept;         // expanded tiles of filters: all of a block, or a power of two of them in turn
  int64_t phase_bytes;  // every stride-th column of every stride-th row of a pass, of one chunk
  int64_t chunk_bytes;  // all phases
  int64_t band_bytes;   // all chunks of all groups
};
// Products where `isa` has the matrix unit and they are quicker, else counts.
BinaryPlan binary_plan(const BinaryConv2dParams& params, const BinaryPack& pack, Isa isa, int64_t threads);
BinaryPlan binary_counts_plan(const BinaryConv2dParams& params, const BinaryPack& pack, int64_t threads);
BinaryPlan binary_products_plan(const BinaryConv2dParams& params, const BinaryPack& pack, int64_t threads);

}  // namespace basisconv
