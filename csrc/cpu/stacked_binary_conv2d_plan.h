// How stacked_binary_conv2d runs on a CPU: tables, packed layout, tiles, scratch. Pure functions of sizes and
// instruction set, compiled once, tested without running a kernel.
#pragma once
#include <cstdint>

#include "../ops/stacked_binary_conv2d.h"
#include "band.h"
#include "isa.h"

namespace basisconv {

// A table holds the signed sums of `step` neighbouring channels of one pixel; a filter picks its sum by its bits. One
// register of words holds `per_word` such picks of `width` filters.
struct StackedTables {
  int32_t width;     // floats in a register
  int32_t step;      // channels of a table
  int32_t entry;     // floats of a table
  int32_t per_word;  // tables of a 32-bit word; each has step bits
};

// Layout of the packed words: [sets][blocks][R*S][words][vectors * width], then int32 rows [K][splits].
//
// Stacked: one set, the bank, runs over all slices of the channels (groups * splits of them), and output k adds up the
// maps rows[k][0..splits). On the matrix unit: see sign_products.h. Expanded: where
// stacking the filters costs less than stacking maps, each group is one slice with a set of its own, its K/groups full
// filters, and one map is one output.
struct StackedPack {
  StackedTables tables;
  bool matrix;  // the matrix unit multiplies; there are no tables
  bool expanded;
  int64_t slices;      // of the channels
  int64_t low;         // channels of one slice
  int64_t sets;        // of filters: 1, or one a slice
  int64_t filters;     // of one set
  int64_t splits;      // maps that one output adds up
  int64_t count;       // tables of one slice; matrix: channel blocks
  int64_t tile_words;  // matrix: of 16 filters and a channel block
  int64_t words;       // of one filter and tap
  int64_t per_word;    // tables of one word, as even as it goes: the loops over them have few lengths
  int32_t vectors;     // registers of filters in a tile
  int64_t blocks;      // of filters in a set
  int64_t slots;       // maps of one slice, padded: blocks * vectors * width
  int64_t set_size, words_size, rows_size;  // 32-bit words
  int64_t size() const { return words_size + rows_size; }
};

constexpr int64_t kMatrixDepth = 32;      // channels of a channel block
constexpr int64_t kMatrixMostTiles = 32;  // StackedPlan::tiles at most

struct StackedPlan {
  StackedPack pack;
  int64_t pixels;               // most in a register tile
  int64_t chunk;                // pixels of an output row between two merges
  int64_t columns;              // pixels of one ring row, padding included
  int64_t ring_rows, ring_row;  // rows of tables, and floats of one
  bool in_place;                // tables, or terms, are filled from where the input lies
  Band band;                    // matrix: input rows of a pass
  int64_t tiles;                // matrix: of 16 pixels between two merges
  int64_t terms;                // matrix: numbers of bfloat16 that an input is the sum of
  bool picks;                   // outputs pick their maps within registers, else maps are turned
  // Floats of scratch, each a multiple of 16: tables or terms, a staged input row, expanded filters, maps, what
  // stacks them.
  int64_t ring_size, staged_size, filters_size, maps_size, stacking_size;
  int64_t scratch() const { return ring_size + staged_size + filters_size + maps_size + stacking_size; }
};

// The filter of the bank that channel c of filter f of a set comes from.
int64_t filter_of_channel(const StackedBinaryWeights& weights, const StackedPack& pack, const int64_t* index,
                          int64_t set, int64_t f, int64_t c);
// The int32 rows behind the words.
void pack_rows(const StackedBinaryWeights& weights, const StackedPack& pack, const int64_t* index, uint32_t* packed);
// Whether they point nowhere else: a damaged packing must not be read with.
bool rows_fit(const StackedBinaryWeights& weights, const StackedPack& pack, const void* packed);

// Full filters for the matrix unit, tiles of so many words.
StackedPack expanded_matrix_pack(const StackedBinaryWeights& weights, int64_t tile_words);

// For tables; and behind that for the matrix unit where there is one and it is quicker, else one of no words. Maps are
// multiplied unless they are tiny.
StackedPack stacked_pack(const StackedBinaryWeights& weights, Isa isa);
StackedPack stacked_matrix_pack(const StackedBinaryWeights& weights, Isa isa);
bool stacked_multiplies(const StackedBinaryConv2dParams& params, const StackedPack& matrix);
StackedPlan stacked_plan(const StackedBinaryConv2dParams& params, const StackedPack& pack);

// The packed tensor starts with this header; the words follow at kStackedHeaderBytes.
struct StackedPackHeader {
  char magic[8];
  int64_t version;
  int64_t isa;
  int64_t sizes[7];  // C K n splits groups R S
};
constexpr int64_t kStackedHeaderBytes = 128;
constexpr int64_t kStackedPackVersion = 2;
static_assert(sizeof(StackedPackHeader) <= kStackedHeaderBytes, "the header must fit in front of the words");

// matrix: as stacked_matrix_pack gives it.
StackedPackHeader stacked_pack_header(const StackedBinaryWeights& weights, const StackedPack& matrix, Isa isa);

// Bytes of the packed tensor: the most that any instruction set needs, so that a traced graph keeps its sizes.
int64_t stacked_packed_bytes(const StackedBinaryWeights& weights);

}  // namespace basisconv
