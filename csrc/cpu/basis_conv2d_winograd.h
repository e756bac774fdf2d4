// Stage 1 of a 3x3 basis as a Winograd convolution, in the same pass as the recombination; the algebra is that of
// basis_conv2d_winograd_forms.h.
//
// Each position is a small matrix product over channels, run by the same register tile as a direct 1x1; pixels are
// tiles there. Tiles are gathered across rows and images until a pass is full, so that the packed weights, 16/9 to 25/9
// times as large as the filters, are read once for many tiles even on small maps. The rows of BT d C are made one after
// the other: a row needs one or two rows of d only, and its transformed tiles stay in a nearer cache than all
// positions. NaN spreads as in direct convolution, with F(2x4, 3x3) up to two columns further; Inf may become NaN
// (Inf - Inf): `precise` runs direct.
#pragma once
#include "basis_conv2d_recombine.h"
#include "basis_conv2d_rows.h"
#include "basis_conv2d_winograd_forms.h"

namespace basisconv {
namespace BASISCONV_ISA {

constexpr int64_t kBlock = 16;  // channels in a channel block

// Positions of a row that a register tile runs through before the next one takes its turn. Large passes (see
// basis_conv2d_plan.cpp) take the positions one by one: the tiles of one position then stay in the first-level cache
// for all filter blocks, and a filter block for all its tiles.
constexpr bool kPositionsTogether = kWidth == 16;

// The two rows of the padded input that one row of BT d C needs, for a row of neighbouring tiles: column x of channel
// block b lies at first + x * first_pixel + b * block; columns outside begin ... end-1 are zeros.
struct InputRows {
  const float *first, *second;
  int64_t first_pixel, second_pixel, block;
  int64_t begin, end;
};

// Row ROW of BT d C for one register of channels of neighbouring tiles begin ... end-1, the first tile's first column
// at x; neighbours share columns. EDGE: columns outside the image are zeros.
template <typename F, int ROW, bool EDGE>
static BASISCONV_INLINE void transform_tiles(const InputRows& in, const float* first, const float* second, int64_t x,
                                             int64_t begin, int64_t end, int64_t position_stride, float* out) {
  constexpr int kShared = F::kColumns - F::kNextColumn;
  const auto column = [&](int64_t at) BASISCONV_LAMBDA {
    const Vec::Reg a = Vec::load(first + at * in.first_pixel);
    if constexpr (F::first(ROW) == F::second(ROW)) return a;
    const Vec::Reg b = Vec::load(second + at * in.second_pixel);
    return F::kStride == 1 && ROW == 1 ? Vec::add(a, b) : Vec::sub(a, b);
  };
  const auto column_or_zero = [&](int64_t at) BASISCONV_LAMBDA {
    Vec::Reg value = Vec::zero();
    if (!EDGE || (at >= in.begin && at < in.end)) value = column(at);
    return value;
  };
  if (begin >= end) return;
  Vec::Reg d[F::kColumns];
  BASISCONV_UNROLL for (int j = 0; j < kShared; j++) d[j] = column_or_zero(x + F::kNextColumn * begin + j);
  for (int64_t t = begin; t < end; t++) {
    BASISCONV_UNROLL for (int j = kShared; j < F::kColumns; j++) d[j] = column_or_zero(x + F::kNextColumn * t + j);
    transform_columns<F>(d, out + t * kBlock, position_stride);
    BASISCONV_UNROLL for (int j = 0; j < kShared; j++) d[j] = d[F::kNextColumn + j];
  }
}

// Row ROW of BT d C for `tiles` neighbouring tiles, the first at column x, and `blocks` channel blocks:
// out[position in the row][block][tile][channel].
template <typename F, int ROW>
static inline void transform_input(const InputRows& in, int64_t x, int64_t tiles, int64_t blocks,
                                   int64_t position_stride, int64_t block_stride, float* out) {
  // Tiles inside ... outside-1 have all their columns in the image.
  int64_t inside = x < in.begin ? (in.begin - x + F::kNextColumn - 1) / F::kNextColumn : 0;
  int64_t outside = in.end - x < F::kColumns ? 0 : (in.end - x - F::kColumns) / F::kNextColumn + 1;
  if (inside > tiles) inside = tiles;
  if (outside > tiles) outside = tiles;
  if (outside < inside) outside = inside;
  for (int64_t b = 0; b < blocks; b++) {
    for (int64_t c = 0; c < kBlock; c += kWidth) {
      const float *first = in.first + b * in.block + c, *second = in.second + b * in.block + c;
      float* to = out + b * block_stride + c;
      transform_tiles<F, ROW, true>(in, first, second, x, 0, inside, position_stride, to);
      transform_tiles<F, ROW, false>(in, first, second, x, inside, outside, position_stride, to);
      transform_tiles<F, ROW, true>(in, first, second, x, outside, tiles, position_stride, to);
    }
  }
}

// AT m D for `n` <= width maps of one tile: up to 2xW pixels of z.
template <typename F>
static BASISCONV_INLINE void transform_output(const float* m, int64_t position_stride, float* z, int64_t z_pixel,
                                              int64_t z_row, int64_t rows, int64_t columns, int64_t n) {
  Vec::Reg e[2][F::kColumns];
  const bool full = n == kWidth;
  BASISCONV_UNROLL for (int j = 0; j < F::kColumns; j++) {
    Vec::Reg column[F::kRows];
    BASISCONV_UNROLL for (int i = 0; i < F::kRows; i++) {
      const float* from = m + (F::kColumns * i + j) * position_stride;
      column[i] = full ? Vec::load(from) : Vec::load_n(from, n);
    }
    transform_products_down<F>(column, e[0][j], e[1][j]);
  }
  BASISCONV_UNROLL for (int i = 0; i < 2; i++) {
    if (i >= rows) break;
    Vec::Reg pixel[F::kOutputs];
    transform_products_across<F>(e[i], pixel);
    float* to = z + i * z_row;
    BASISCONV_UNROLL for (int j = 0; j < F::kOutputs; j++) {
      if (j >= columns) break;
      if (full) {
        Vec::store(to + j * z_pixel, pixel[j]);
      } else {
        Vec::store_n(to + j * z_pixel, pixel[j], n);
      }
    }
  }
}

struct TileAt {
  int64_t n, row, column;  // image; tile row and tile column
  int64_t ring_row;        // of the tile's first row, when rows go through the ring
};

template <typename T, typename F>
struct Winograd {
  static constexpr int64_t W = F::kOutputs, kColumns = F::kColumns;

  const BasisConv2dParams& params;
  const CpuPlan& plan;
  const float* filters;
  Ring ring;
  Recombination<T> recombination;
  const float* zeros;  // one pixel of all channels
  float *transformed, *partial, *products, *z;

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
  void transform(const TileAt* at, int64_t tiles, int64_t first_block, int64_t blocks) const {
    const CpuPack& pack = plan.pack;
    const int64_t left = plan.in_place ? params.pad_left : 0;  // the ring holds the padding
    const int64_t plane = plan.tiles * kBlock;
    for (int64_t t = 0; t < tiles;) {
      const Piece piece = piece_at(at, t, tiles);
      InputRows in = input_rows(at[t], F::first(ROW), F::second(ROW));
      in.first += first_block * in.block;
      in.second += first_block * in.block;
      transform_input<F, ROW>(in, F::kNextColumn * at[t].column - left, piece.last - t, blocks, pack.chunk * plane,
                              plane, transformed + t * kBlock);
      t = piece.last;
    }
  }

  void prefetch_output(const TileAt& at) const {
    if (!params.channels_last) return;
    const int64_t bytes = params.weights.K * static_cast<int64_t>(sizeof(T));
    const int64_t rest = params.OW - W * at.column, columns = rest < W ? rest : W;
    for (int64_t y = 2 * at.row; y < 2 * at.row + 2 && y < params.OH; y++) {
      const char* lines =
          static_cast<const char*>(params.output) + ((at.n * params.OH + y) * params.OW + W * at.column) * bytes;
      for (int64_t b = 0; b < columns * bytes; b += 64) __builtin_prefetch(lines + b, 1, 2);
    }
  }

  // Transform and matrix products of the positions of row ROW: products[group][position][tile][map]. Channels go
  // by chunks, so that what a chunk transforms is still near when it is multiplied.
  template <int ROW>
  void multiply(const TileAt* at, int64_t tiles) const {
    const CpuPack& pack = plan.pack;
    const int64_t blocks = pack.channel_blocks, registers = pack.vectors * kWidth;
    const int64_t tile = even_tile(tiles, stage1_pixels(pack.vectors));
    const int64_t none = 0;
    const Stage1Function* stage1 = stage1_functions(pack.lanes, pack.vectors, kBlock);
    Stage1 s{};
    s.offset = s.tap_weights = &none;
    s.taps = 1;
    s.plane = plan.tiles * kBlock;
    s.block_weights = kBlock / pack.lanes * registers;
    s.z_stride = pack.maps;
    s.times = kPositionsTogether ? kColumns : 1;
    s.next_pixels = pack.chunk * s.plane;
    s.next_z = plan.tiles * pack.maps;
    s.next_partial = plan.tiles * registers;
    for (int64_t group = 0; group < params.weights.groups; group++) {
      for (int64_t begin = 0; begin < blocks; begin += pack.chunk) {
        s.blocks = blocks - begin < pack.chunk ? blocks - begin : pack.chunk;
        s.first = begin == 0;
        s.last = begin + s.blocks == blocks;
        s.next_weights = s.blocks * s.block_weights;
        transform<ROW>(at, tiles, group * blocks + begin, s.blocks);
        for (int64_t i = 0; i < kColumns; i += s.times) {
          for (int64_t f = 0; f < pack.filter_blocks; f++) {
            s.weights = filters + group * pack.group_size + winograd_filters_at(pack, kColumns * ROW + i, f, begin);
            s.ahead = plan.fetches_filters ? kColumns * s.next_weights : 0;  // to the next chunk or filter block
            for (int64_t t = 0; t < tiles; t += tile) {
              s.pixels = transformed + i * s.next_pixels + t * kBlock;
              s.z = products + (((group * F::kRows + ROW) * kColumns + i) * plan.tiles + t) * pack.maps +
                    f * pack.filters;
              s.partial = partial + ((f * kColumns + i) * plan.tiles + t) * registers;
              stage1[tiles - t < tile ? tiles - t : tile](s);
              s.ahead = 0;
            }
          }
        }
      }
    }
  }

  // All groups of the gathered tiles: products, output transform, recombination.
  void finish(const TileAt* at, int64_t tiles) const {
    const CpuPack& pack = plan.pack;
    const int64_t all_maps = params.weights.groups * pack.maps;
    multiply<0>(at, tiles);
    multiply<1>(at, tiles);
    multiply<2>(at, tiles);
    multiply<3>(at, tiles);
    if constexpr (F::kRows == 5) multiply<4>(at, tiles);
    int64_t filled = 0;  // pixels of z
    for (int64_t group = 0; group < params.weights.groups; group++) {
      filled = 0;
      for (int64_t t = 0; t < tiles;) {
        const Piece piece = piece_at(at, t, tiles);
        for (; t < piece.last; t++) {
          const int64_t x = W * (t - piece.first);
          const float* from = products + (group * F::kRows * kColumns * plan.tiles + t) * pack.maps;
          float* to = z + (filled + x) * all_maps + group * pack.maps;
          for (int64_t q = 0; q < pack.maps; q += kWidth) {
            const int64_t n = pack.maps - q < kWidth ? pack.maps - q : kWidth;
            transform_output<F>(from + q, plan.tiles * pack.maps, to + q, all_maps, piece.columns * all_maps,
                                piece.rows, piece.columns - x, n);
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
        prefetch_output(tile);
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
  float* zeros = scratch + plan.ring_size;
  float* transformed = zeros + plan.zeros_size;
  float* partial = transformed + plan.transformed_size;
  float* products = partial + plan.partial_size;
  float* z = products + plan.products_size;
  memset(zeros, 0, plan.zeros_size * sizeof(float));
  const Recombination<T> recombination{params, pack, coefficients, coefficients + pack.coefficients_size,
                                       z + plan.maps_size};
  const Ring ring = make_ring(params, plan, 1, scratch);
  Winograd<T, F>{params, plan, filters, ring, recombination, zeros, transformed, partial, products, z}.run(begin, end);
}

}  // namespace BASISCONV_ISA
}  // namespace basisconv
