// Stage 1 of a 3x3 basis as a Winograd convolution, in the same pass as the recombination; the algebra is that of
// basis_conv2d_winograd_forms.h.
//
// Each position is a small matrix product over channels, run by the same register tile as a direct 1x1; pixels are
// tiles there. Tiles are gathered across rows and images until a pass is full, so that the packed weights, 16/9 to 25/9
// times as large as the filters, are read once for many tiles even on small maps. The rows of BT d C are made one after
// the other: a row needs one or two rows of d only, and its transformed tiles stay in a nearer cache than all
// positions. Where filters are large and passes few (CpuPlan::from_taps), filters are read as taps instead
// and transformed beside the products: more work, far less to fetch.
//
// NaN spreads as in direct convolution, with F(2x4, 3x3) up to two columns further; Inf may become NaN (Inf - Inf):
// `precise` runs direct.
#pragma once
#include "basis_conv2d_recombine.h"
#include "basis_conv2d_rows.h"
#include "basis_conv2d_winograd_tiles.h"

namespace basisconv {
namespace BASISCONV_ISA {

// Positions of a row that a register tile runs through before the next one takes its turn. Large passes (see
// basis_conv2d_plan.cpp) take the positions one by one: the tiles of one position then stay in the first-level cache
// for all filter blocks, and a filter block for all its tiles.
constexpr bool kPositionsTogether = kWidth == 16;

constexpr int64_t kLine = 64;  // bytes

struct TileAt {
  int64_t n, row, column;  // image; tile row and tile column
  int64_t ring_row;        // of the tile's first row, when rows go through the ring
};

template <typename T, typename F>
struct Winograd {
  static constexpr int64_t W = F::kOutputs, kColumns = F::kColumns;

  const BasisConv2dParams& params;
  const CpuPlan& plan;
  const float *filters, *taps;
  Ring ring;
  Recombination<T> recombination;
  const float* zeros;  // one pixel of all channels
  float *transformed, *row_filters, *partial, *products, *z;

  int64_t wrapped(int64_t ring_row) const { return ring_row < plan.ring_rows ? ring_row : ring_row - plan.ring_rows; }

  // A row piece: neighbouring tiles first ... last-1 of one row of tiles, whose pixels lie as [rows][columns] in z.
  struct Piece {
    int64_t first, last, rows, columns;
  };
  Piece piece_at(const TileAt* at, int64_t first, int64_t tiles) const {
    int64_t last = first + 1;
    while (last < tiles && at[last].n == at[first].n && at[last].row == at[first].row) last++;
    const int64_t rest_rows = params.OH - 2 * at[first].row, rest_columns = params.OW - W * at[first].column;
    const int64_t columns = W * (last - first);
    return Piece{first, last, rest_rows < 2 ? rest_rows : 2, rest_columns < columns ? rest_columns : columns};
  }

  // Rows `first` and `second` of the tiles in the row of tiles of `at`; outside the image they are zeros.
  InputRows input_rows(const TileAt& at, int64_t first, int64_t second) const {
    if (!plan.in_place) {
      return InputRows{ring.row(wrapped(at.ring_row + first)),
                       ring.row(wrapped(at.ring_row + second)),
                       kBlock,
                       kBlock,
                       ring.plane,
                       0,
                       plan.ring_columns};
    }
    const int64_t y = F::kNextRow * at.row - params.pad_top;
    const float* image = static_cast<const float*>(params.input) + at.n * params.input_stride_n;
    InputRows in{zeros, zeros, 0, 0, kBlock, 0, params.W};
    if (y + first >= 0 && y + first < params.H) {
      in.first = image + (y + first) * params.input_stride_h;
      in.first_pixel = params.input_stride_w;
    }
    if (y + second >= 0 && y + second < params.H) {
      in.second = image + (y + second) * params.input_stride_h;
      in.second_pixel = params.input_stride_w;
    }
    return in;
  }

  // Row ROW of BT d C of the gathered tiles for channel blocks first_block ... first_block + blocks - 1.
  template <int ROW>
  void transform(const TileAt* at, int64_t tiles, int64_t first_block, int64_t blocks, float* to) const {
    const int64_t left = plan.in_place ? params.pad_left : 0;  // the ring holds the padding
    const int64_t plane = plan.tiles * kBlock;
    for (int64_t t = 0; t < tiles;) {
      const Piece piece = piece_at(at, t, tiles);
      InputRows in = input_rows(at[t], F::first(ROW), F::second(ROW));
      in.first += first_block * in.block;
      in.second += first_block * in.block;
      transform_input<F, ROW>(in, F::kNextColumn * at[t].column - left, piece.last - t, blocks, plan.chunk * plane,
                              plane, to + t * kBlock);
      t = piece.last;
    }
  }

  // The lines of the result, and those of the residual that is added to it.
  void prefetch_output(const TileAt& at) const {
    if (!params.channels_last) return;
    const int64_t bytes = params.weights.K * static_cast<int64_t>(sizeof(T));
    const int64_t rest = params.OW - W * at.column, columns = rest < W ? rest : W;
    for (int64_t y = 2 * at.row; y < 2 * at.row + 2 && y < params.OH; y++) {
      const int64_t from = ((at.n * params.OH + y) * params.OW + W * at.column) * bytes;
      const char* lines = static_cast<const char*>(params.output) + from;
      for (int64_t b = 0; b < columns * bytes; b += 64) __builtin_prefetch(lines + b, 1, 2);
      if (params.residual == nullptr) continue;
      lines = static_cast<const char*>(params.residual) + from;
      for (int64_t b = 0; b < columns * bytes; b += 64) __builtin_prefetch(lines + b, 0, 2);
    }
  }

  // What all runs of the register tile have in common: short sums at so many neighbouring positions.
  Stage1 stage1_at(int64_t positions) const {
    const CpuPack& pack = plan.pack;
    static constexpr int64_t kNone = 0;
    Stage1 s{};
    s.offset = s.tap_weights = &kNone;
    s.taps = 1;
    s.plane = plan.tiles * kBlock;
    s.block_weights = kBlock / pack.lanes * pack.vectors * kWidth;
    s.z_stride = plan.products_stride;
    s.times = positions;
    s.next_pixels = plan.chunk * s.plane;
    s.next_z = plan.products_position;
    s.next_partial = plan.partial_size ? plan.tiles * pack.vectors * kWidth : s.next_z;
    return s;
  }

  void take_chunk(Stage1& s, int64_t begin) const {
    const int64_t rest = plan.pack.channel_blocks - begin;
    s.blocks = rest < plan.chunk ? rest : plan.chunk;
    s.first = begin == 0;
    s.last = s.blocks == rest && !plan.sums_later;  // else sums wait as they are, lane by lane
    s.next_weights = s.blocks * s.block_weights + (plan.from_taps ? kRowFiltersApart : 0);
  }

  // Products of all tiles with filter block f at s.times positions; `pixels` are the first one's.
  void multiply_block(Stage1& s, int64_t group, int64_t position, int64_t f, int64_t tiles, const float* pixels) const {
    const CpuPack& pack = plan.pack;
    const Stage1Function* stage1 = stage1_functions(pack.lanes, pack.vectors, kBlock);
    const int64_t tile = even_tile(tiles, stage1_pixels(pack.vectors));
    float* to = products + (group * pack.positions + position) * s.next_z + f * plan.products_block;
    const int64_t waiting = plan.from_taps ? pack.positions : kColumns;
    float* sums = plan.partial_size ? partial + (f * waiting + position % waiting) * s.next_partial : to;
    for (int64_t t = 0; t < tiles; t += tile) {
      s.pixels = pixels + t * kBlock;
      s.z = to + t * s.z_stride;
      s.partial = sums + t * pack.vectors * kWidth;
      stage1[tiles - t < tile ? tiles - t : tile](s);
      s.fetched = nullptr;
    }
  }

  // Lets one of `runs` runs of the register tile fetch its share of the result's lines that the tiles will fill, with
  // the residual's, or of the input's lines that the next tiles will be the first to read: all at once they would hold
  // up the loads of those tiles. Where rows of tiles are cut, lines beside them come along.
  void fetch_maps(Stage1& s, const TileAt& at, int64_t tiles, int64_t run, int64_t runs) const {
    const int64_t pixels = 2 * W * tiles, lines = s.times * s.next_weights / 16;
    const int64_t first = (at.n * params.OH + 2 * at.row) * params.OW + W * at.column;
    const bool input = plan.fetches_input && run % 2 == 1;
    if (plan.fetches_input) {
      run /= 2;
      runs /= 2;
    }
    const int64_t pixel = (input ? params.weights.C : params.weights.K) * static_cast<int64_t>(sizeof(T));
    const int64_t share = pixels * pixel / runs;
    const char* output = static_cast<const char*>(params.output);
    // These tiles have read a row below their own.
    if (input) s.fetched = static_cast<const char*>(params.input) + (first + pixels + params.W) * pixel;
    if (!input) s.fetched = output + first * pixel;
    s.fetched += run * share;
    s.fetch_step = share / lines;
    const auto place = [](const void* p) { return reinterpret_cast<intptr_t>(p); };
    s.fetch_beside = input || params.residual == nullptr ? 0 : place(params.residual) - place(output);
  }

  // Transform and matrix products of the positions of row ROW. Channels go by chunks, so that what a chunk transforms
  // is still near when it is multiplied.
  template <int ROW>
  void multiply(const TileAt* at, int64_t tiles) const {
    const CpuPack& pack = plan.pack;
    Stage1 s = stage1_at(kPositionsTogether ? kColumns : 1);
    s.fetch_step = kLine;
    const int64_t chunks = (pack.channel_blocks + plan.chunk - 1) / plan.chunk;
    const int64_t runs = params.weights.groups * chunks * (kColumns / s.times) * pack.filter_blocks;  // of a row
    int64_t run = ROW * runs;
    for (int64_t group = 0; group < params.weights.groups; group++) {
      for (int64_t begin = 0; begin < pack.channel_blocks; begin += plan.chunk) {
        take_chunk(s, begin);
        transform<ROW>(at, tiles, group * pack.channel_blocks + begin, s.blocks, transformed);
        for (int64_t i = 0; i < kColumns; i += s.times) {
          for (int64_t f = 0; f < pack.filter_blocks; f++) {
            s.weights = filters + group * pack.group_size + winograd_filters_at(pack, kColumns * ROW + i, f, begin);
            // The next chunk or filter block.
            if (plan.fetches_filters) s.fetched = reinterpret_cast<const char*>(s.weights + kColumns * s.next_weights);
            if (plan.fetches_output) fetch_maps(s, *at, tiles, run++, F::kRows * runs);
            multiply_block(s, group, kColumns * ROW + i, f, tiles, transformed + i * s.next_pixels);
          }
        }
      }
    }
  }

  // Row ROW of the positions of a filter block, transformed from its taps; a part of the taps behind them is fetched
  // meanwhile.
  template <int ROW>
  void multiply_taps(Stage1& s, const float* of_block, int64_t group, int64_t f, int64_t tiles) const {
    for (int64_t i = 0; i < s.block_weights; i += kWidth) {
      transform_filter<F, ROW>(of_block + 9 * i, row_filters + i, s.next_weights);
    }
    s.weights = row_filters;
    const int64_t lines = ROW * kColumns * s.block_weights / 16;
    s.fetched = reinterpret_cast<const char*>(of_block + 9 * s.block_weights) + lines * s.fetch_step;
    multiply_block(s, group, ROW * kColumns, f, tiles, transformed + ROW * kColumns * s.next_pixels);
  }

  // All positions of the gathered tiles, from taps, channel block by channel block.
  void multiply_from_taps(const TileAt* at, int64_t tiles) const {
    const CpuPack& pack = plan.pack;
    Stage1 s = stage1_at(kColumns);
    s.fetch_step = 9 * kLine / pack.positions;
    for (int64_t group = 0; group < params.weights.groups; group++) {
      for (int64_t b = 0; b < pack.channel_blocks; b++) {
        const int64_t block = group * pack.channel_blocks + b;
        take_chunk(s, b);
        each_row<F>([&](auto row) BASISCONV_LAMBDA {
          transform<row.value>(at, tiles, block, 1, transformed + row.value * kColumns * s.next_pixels);
        });
        for (int64_t f = 0; f < pack.filter_blocks; f++) {
          const float* of_block = taps + group * pack.taps_group_size + winograd_taps_at(pack, f, b);
          each_row<F>([&](auto row) BASISCONV_LAMBDA { multiply_taps<row.value>(s, of_block, group, f, tiles); });
        }
      }
    }
  }

  void multiply(const TileAt* at, int64_t tiles) const {
    if constexpr (kWidth == 16) {  // the plan offers it to no other
      if (plan.from_taps) return multiply_from_taps(at, tiles);
    }
    each_row<F>([&](auto row) BASISCONV_LAMBDA { multiply<row.value>(at, tiles); });
  }

  // All groups of the gathered tiles: products, output transform, recombination.
  void finish(const TileAt* at, int64_t tiles) const {
    const CpuPack& pack = plan.pack;
    const int64_t all_maps = params.weights.groups * pack.maps;
    multiply(at, tiles);
    int64_t filled = 0;  // pixels of z
    for (int64_t group = 0; group < params.weights.groups; group++) {
      filled = 0;
      for (int64_t t = 0; t < tiles;) {
        const Piece piece = piece_at(at, t, tiles);
        for (; t < piece.last; t++) {
          const int64_t x = W * (t - piece.first);
          const float* from = products + group * pack.positions * plan.products_position + t * plan.products_stride;
          TileOutput to{z + (filled + x) * all_maps + group * pack.maps, all_maps, piece.columns * all_maps, piece.rows,
                        piece.columns - x};
          if (plan.sums_later) {
            store_output_sums<F>(pack.lanes, from, plan.products_position, to);
            continue;
          }
          for (int64_t q = 0; q < pack.maps; q += kWidth, to.z += kWidth) {
            const int64_t n = pack.maps - q < kWidth ? pack.maps - q : kWidth;
            store_output<F>(from + q / pack.filters * plan.products_block + q % pack.filters, plan.products_position,
                            to, n);
          }
        }
        filled += piece.rows * piece.columns;
      }
    }
    if (!params.weights.precise) round_maps<T>(z, filled * all_maps);
    clear_filling(params.weights, plan.pack, z, filled * all_maps);
    // Recombine runs of pixels that are neighbours in the result: whole rows join, row pieces stand alone.
    int64_t begin = 0, pixels = 0, run_n = 0, run_pixel = 0;
    for (int64_t t = 0; t < tiles;) {
      const Piece piece = piece_at(at, t, tiles);
      for (int64_t row = 0; row < piece.rows; row++) {
        const int64_t pixel = (2 * at[t].row + row) * params.OW + W * at[t].column;
        if (pixels > 0 && (run_n != at[t].n || run_pixel + pixels != pixel)) {
          recombination.run(z + begin * all_maps, all_maps, run_n, run_pixel, pixels);
          begin += pixels;
          pixels = 0;
        }
        if (pixels == 0) {
          run_n = at[t].n;
          run_pixel = pixel;
        }
        pixels += piece.columns;
      }
      t = piece.last;
    }
    recombination.run(z + begin * all_maps, all_maps, run_n, run_pixel, pixels);
  }

  // Copies the padded rows of a tile row into the ring behind those of the tile row before, some of which it shares in
  // the same image.
  void fill_ring(const TileAt& before, TileAt* at) const {
    const bool next = before.n == at->n && before.row + 1 == at->row;
    at->ring_row = wrapped(before.ring_row + (next ? F::kNextRow : F::kRows));
    for (int64_t i = next ? F::kRows - F::kNextRow : 0; i < F::kRows; i++) {
      const int64_t y = F::kNextRow * at->row + i - params.pad_top, slot = wrapped(at->ring_row + i);
      if (y >= 0 && y < params.H) {
        fill_row<T>(params, plan.pack, ring, slot, at->n, y);
      } else {
        memset(ring.row(slot), 0, ring.row_size * sizeof(float));
      }
    }
  }

  void run(int64_t begin, int64_t end) const {
    const int64_t tile_rows = (params.OH + 1) / 2;
    TileAt* at = new TileAt[plan.tiles];
    TileAt before{-1, 0, 0, 0};
    int64_t waiting = 0;
    for (int64_t unit = begin; unit < end; unit++) {
      TileAt tile{unit / tile_rows, unit % tile_rows, 0, 0};
      if (!plan.in_place) fill_ring(before, &tile);
      before = tile;
      for (; tile.column < plan.tile_columns; tile.column++) {
        at[waiting] = tile;
        if (!plan.fetches_output) prefetch_output(tile);
        if (++waiting == plan.tiles) {
          finish(at, waiting);
          waiting = 0;
        }
      }
    }
    if (waiting) finish(at, waiting);
    delete[] at;
  }
};

template <typename T, typename F>
static void run_winograd(const BasisConv2dParams& params, const CpuPlan& plan, float* scratch, int64_t begin,
                         int64_t end) {
  const CpuPack& pack = plan.pack;
  const float* filters = static_cast<const float*>(params.packed);
  const float* coefficients = filters + pack.filters_size;
  const float* taps = coefficients + pack.coefficients_size + pack.planar_size;
  float* zeros = scratch + plan.ring_size;
  float* transformed = zeros + plan.zeros_size;
  float* row_filters = transformed + plan.transformed_size;
  float* partial = row_filters + plan.row_filters_size;
  float* products = partial + plan.partial_size;
  float* z = products + plan.products_size;
  memset(zeros, 0, plan.zeros_size * sizeof(float));
  const Recombination<T> recombination{params, pack, coefficients, coefficients + pack.coefficients_size,
                                       z + plan.maps_size};
  const Ring ring = make_ring(params, plan, 1, scratch);
  Winograd<T, F>{params, plan,        filters,     taps,    ring,     recombination,
                 zeros,  transformed, row_filters, partial, products, z}
      .run(begin, end);
}

}  // namespace BASISCONV_ISA
}  // namespace basisconv
