// Stage 1 of a 3x3, stride 1 basis as Winograd F(2x2, 3x3), in the same pass as the recombination.
//
// For a 4x4 input tile d and a filter g, the 2x2 outputs are  AT [ (G g GT) . (BT d B) ] A  with
//
//        1  0 -1  0             1    0    0           1  1  1  0
//   BT = 0  1  1  0       G =  1/2  1/2  1/2     AT = 0  1 -1 -1
//        0 -1  1  0            1/2 -1/2  1/2
//        0  1  0 -1             0    0    1
//
// The sum over channels moves inside the brackets: 16 products a channel and filter serve 4 outputs instead of 36. Each
// of the 16 positions is a small matrix product over channels, run by the same register tile as a direct 1x1; pixels
// are tiles there. Tiles are gathered across rows and images until a pass is full, so that the packed weights, 16/9
// larger than the filters, are read once for many tiles even on small maps. The four rows of BT d B are made one after
// the other: a row needs two rows of d only, and its transformed tiles stay in a nearer cache than all 16 positions.
// NaN spreads as in direct convolution; Inf may become NaN (Inf - Inf): `precise` runs direct.
#pragma once
#include "basis_conv2d_recombine.h"
#include "basis_conv2d_rows.h"

namespace basisconv {
namespace BASISCONV_ISA {

constexpr int64_t kBlock = 16;  // channels in a channel block

// The two rows of a 4x4 input tile that one row of BT d B needs: column j, channel block b at first[j] + b * block.
struct InputRows {
  const float *first[4], *second[4];
  int64_t block;
};

// Row ROW of BT d B for every channel: out[position in the row][block][tile][channel].
template <int ROW>
static BASISCONV_INLINE void transform_input_row(const InputRows& in, int64_t blocks, int64_t position_stride,
                                                 int64_t block_stride, float* out) {
  const float *a0 = in.first[0], *a1 = in.first[1], *a2 = in.first[2], *a3 = in.first[3];
  const float *b0 = in.second[0], *b1 = in.second[1], *b2 = in.second[2], *b3 = in.second[3];
  int64_t at = 0;
  for (int64_t b = 0; b < blocks; b++) {
    BASISCONV_UNROLL for (int64_t c = 0; c < kBlock; c += kWidth) {
      const auto column = [at, c](const float* first, const float* second) BASISCONV_LAMBDA {
        const Vec::Reg x = Vec::load(first + at + c), y = Vec::load(second + at + c);
        return ROW == 1 ? Vec::add(x, y) : Vec::sub(x, y);
      };
      const Vec::Reg e0 = column(a0, b0), e1 = column(a1, b1), e2 = column(a2, b2), e3 = column(a3, b3);
      Vec::store(out + c, Vec::sub(e0, e2));
      Vec::store(out + position_stride + c, Vec::add(e1, e2));
      Vec::store(out + 2 * position_stride + c, Vec::sub(e2, e1));
      Vec::store(out + 3 * position_stride + c, Vec::sub(e1, e3));
    }
    at += in.block;
    out += block_stride;
  }
}

// AT m A for `n` <= width maps of one tile: up to 2x2 pixels of z.
static BASISCONV_INLINE void transform_output(const float* m, int64_t position_stride, float* z, int64_t z_pixel,
                                              int64_t z_row, int64_t rows, int64_t columns, int64_t n) {
  Vec::Reg e[2][4];
  const bool full = n == kWidth;
  BASISCONV_UNROLL for (int j = 0; j < 4; j++) {
    Vec::Reg column[4];
    BASISCONV_UNROLL for (int i = 0; i < 4; i++) {
      const float* from = m + (4 * i + j) * position_stride;
      column[i] = full ? Vec::load(from) : Vec::load_n(from, n);
    }
    e[0][j] = Vec::add(Vec::add(column[0], column[1]), column[2]);
    e[1][j] = Vec::sub(Vec::sub(column[1], column[2]), column[3]);
  }
  BASISCONV_UNROLL for (int i = 0; i < 2; i++) {
    if (i >= rows) break;
    const Vec::Reg left = Vec::add(Vec::add(e[i][0], e[i][1]), e[i][2]);
    const Vec::Reg right = Vec::sub(Vec::sub(e[i][1], e[i][2]), e[i][3]);
    float* to = z + i * z_row;
    if (full) {
      Vec::store(to, left);
      if (columns > 1) Vec::store(to + z_pixel, right);
    } else {
      Vec::store_n(to, left, n);
      if (columns > 1) Vec::store_n(to + z_pixel, right, n);
    }
  }
}

struct TileAt {
  int64_t n, row, column;  // image; tile row and tile column
  int64_t ring_row;        // of the tile's first row, when rows go through the ring
};

template <typename T>
struct Winograd {
  const BasisConv2dParams& params;
  const CpuPlan& plan;
  const float* filters;
  Ring ring;
  Recombination<T> recombination;
  const float* zeros;  // one pixel of all channels
  float *transformed, *products, *z;

  int64_t wrapped(int64_t ring_row) const { return ring_row < plan.ring_rows ? ring_row : ring_row - plan.ring_rows; }

  // Where rows `first` and `second` of a tile lie; outside the image they are zeros.
  InputRows input_rows(const TileAt& at, int64_t first, int64_t second) const {
    InputRows in;
    if (!plan.in_place) {
      const float* rows[2] = {ring.row(wrapped(at.ring_row + first)), ring.row(wrapped(at.ring_row + second))};
      for (int64_t j = 0; j < 4; j++) {
        in.first[j] = rows[0] + (2 * at.column + j) * kBlock;
        in.second[j] = rows[1] + (2 * at.column + j) * kBlock;
      }
      in.block = ring.plane;
      return in;
    }
    in.block = kBlock;
    const int64_t y = 2 * at.row - params.pad_top, x = 2 * at.column - params.pad_left;
    const float* image = static_cast<const float*>(params.input) + at.n * params.input_stride_n;
    const float* rows[2] = {image + (y + first) * params.input_stride_h + x * params.input_stride_w,
                            image + (y + second) * params.input_stride_h + x * params.input_stride_w};
    for (int64_t j = 0; j < 4; j++) {
      in.first[j] = rows[0] + j * params.input_stride_w;
      in.second[j] = rows[1] + j * params.input_stride_w;
    }
    if (y < 0 || y + 4 > params.H || x < 0 || x + 4 > params.W) {
      const bool inside[2] = {y + first >= 0 && y + first < params.H, y + second >= 0 && y + second < params.H};
      for (int64_t j = 0; j < 4; j++) {
        const bool column = x + j >= 0 && x + j < params.W;
        if (!column || !inside[0]) in.first[j] = zeros;
        if (!column || !inside[1]) in.second[j] = zeros;
      }
    }
    return in;
  }

  template <int ROW>
  void transform_row(const TileAt* at, int64_t tiles) const {
    constexpr int64_t kFirst[] = {0, 1, 2, 1}, kSecond[] = {2, 2, 1, 3};
    const int64_t blocks = params.weights.groups * plan.pack.channel_blocks, plane = plan.tiles * kBlock;
    for (int64_t t = 0; t < tiles; t++) {
      transform_input_row<ROW>(input_rows(at[t], kFirst[ROW], kSecond[ROW]), blocks, blocks * plane, plane,
                               transformed + t * kBlock);
    }
  }

  void prefetch_output(const TileAt& at) const {
    if (!params.channels_last) return;
    const int64_t bytes = params.weights.K * static_cast<int64_t>(sizeof(T));
    const int64_t columns = 2 * at.column + 2 <= params.OW ? 2 : 1;
    for (int64_t y = 2 * at.row; y < 2 * at.row + 2 && y < params.OH; y++) {
      const char* lines =
          static_cast<const char*>(params.output) + ((at.n * params.OH + y) * params.OW + 2 * at.column) * bytes;
      for (int64_t b = 0; b < columns * bytes; b += 64) __builtin_prefetch(lines + b, 1, 2);
    }
  }

  // The matrix products of the four positions of row `row`, all groups: products[group][position][tile][map].
  void multiply(int64_t row, int64_t tiles) const {
    const CpuPack& pack = plan.pack;
    const int64_t plane = plan.tiles * kBlock, blocks = pack.channel_blocks;
    const int64_t position_stride = params.weights.groups * blocks * plane;
    const int64_t block_weights = kBlock / pack.lanes * pack.vectors * kWidth, panel = blocks * block_weights;
    const Stage1Function* stage1 = stage1_functions(pack.lanes, pack.vectors, kBlock);
    const int64_t tile = even_tile(tiles, stage1_pixels(pack.vectors));
    const int64_t none = 0;
    for (int64_t group = 0; group < params.weights.groups; group++) {
      for (int64_t f = 0; f < pack.filter_blocks; f++) {
        for (int64_t position = 4 * row; position < 4 * row + 4; position++) {
          const Taps taps{transformed + position % 4 * position_stride + group * blocks * plane,
                          &none, &none, 1, plane, block_weights};
          const float* weights = filters + group * pack.group_size + (f * 16 + position) * panel;
          float* to = products + (group * 16 + position) * plan.tiles * pack.maps + f * pack.filters;
          for (int64_t t = 0; t < tiles; t += tile) {
            const float* ahead = t + tile < tiles ? weights : weights + panel;
            stage1[tiles - t < tile ? tiles - t : tile](taps, 0, blocks, t, weights, ahead, Partial{nullptr, true, true},
                                                        to + t * pack.maps, pack.maps);
          }
        }
      }
    }
  }

  // A row piece: neighbouring tiles first ... last-1 of one row of tiles, whose pixels lie as [rows][columns] in z.
  struct Piece {
    int64_t first, last, rows, columns;
  };
  Piece piece_at(const TileAt* at, int64_t first, int64_t tiles) const {
    int64_t last = first + 1;
    while (last < tiles && at[last].n == at[first].n && at[last].row == at[first].row) last++;
    const int64_t rest_rows = params.OH - 2 * at[first].row, rest_columns = params.OW - 2 * at[first].column;
    const int64_t columns = 2 * (last - first);
    return Piece{first, last, rest_rows < 2 ? rest_rows : 2, rest_columns < columns ? rest_columns : columns};
  }

  // All groups of the gathered tiles: products, output transform, recombination.
  void finish(const TileAt* at, int64_t tiles) const {
    const CpuPack& pack = plan.pack;
    const int64_t all_maps = params.weights.groups * pack.maps;
    transform_row<0>(at, tiles);
    multiply(0, tiles);
    transform_row<1>(at, tiles);
    multiply(1, tiles);
    transform_row<2>(at, tiles);
    multiply(2, tiles);
    transform_row<3>(at, tiles);
    multiply(3, tiles);
    int64_t filled = 0;  // pixels of z
    for (int64_t group = 0; group < params.weights.groups; group++) {
      filled = 0;
      for (int64_t t = 0; t < tiles;) {
        const Piece piece = piece_at(at, t, tiles);
        for (; t < piece.last; t++) {
          const int64_t x = 2 * (t - piece.first);
          const float* from = products + (group * 16 * plan.tiles + t) * pack.maps;
          float* to = z + (filled + x) * all_maps + group * pack.maps;
          for (int64_t q = 0; q < pack.maps; q += kWidth) {
            const int64_t n = pack.maps - q < kWidth ? pack.maps - q : kWidth;
            transform_output(from + q, plan.tiles * pack.maps, to + q, all_maps, piece.columns * all_maps, piece.rows,
                             piece.columns - x, n);
          }
        }
        filled += piece.rows * piece.columns;
      }
    }
    if (!params.weights.precise) round_maps<T>(z, filled * all_maps);
    // Recombine runs of pixels that are neighbours in the result: whole rows join, row pieces stand alone.
    int64_t begin = 0, pixels = 0, run_n = 0, run_pixel = 0;
    for (int64_t t = 0; t < tiles;) {
      const Piece piece = piece_at(at, t, tiles);
      for (int64_t row = 0; row < piece.rows; row++) {
        const int64_t pixel = (2 * at[t].row + row) * params.OW + 2 * at[t].column;
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

  // Copies the four padded rows of a tile row into the ring behind those of the tile row before, whose last two rows
  // it shares in the same image.
  void fill_ring(const TileAt& before, TileAt* at) const {
    const bool next = before.n == at->n && before.row + 1 == at->row;
    at->ring_row = wrapped(before.ring_row + (next ? 2 : 4));
    for (int64_t i = next ? 2 : 0; i < 4; i++) {
      const int64_t y = 2 * at->row + i - params.pad_top, slot = wrapped(at->ring_row + i);
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

template <typename T>
static void run_winograd(const BasisConv2dParams& params, const CpuPlan& plan, float* scratch, int64_t begin,
                         int64_t end) {
  const CpuPack& pack = plan.pack;
  const float* filters = static_cast<const float*>(params.packed);
  const float* coefficients = filters + pack.filters_size;
  float* zeros = scratch + plan.ring_size;
  float* transformed = zeros + plan.zeros_size;
  float* products = transformed + plan.transformed_size;
  float* z = products + plan.products_size;
  memset(zeros, 0, plan.zeros_size * sizeof(float));
  const Recombination<T> recombination{params, pack, coefficients, coefficients + pack.coefficients_size,
                                       z + plan.maps_size};
  const Ring ring = make_ring(params, plan, 1, scratch);
  Winograd<T>{params, plan, filters, ring, recombination, zeros, transformed, products, z}.run(begin, end);
}

// G g: rows of three values become rows of four.
static BASISCONV_INLINE void transform_filter_row(const Vec::Reg* g, int64_t g_step, Vec::Reg* out, int64_t out_step) {
  const Vec::Reg half = Vec::set1(0.5f);
  const Vec::Reg ends = Vec::add(g[0], g[2 * g_step]);
  out[0] = g[0];
  out[out_step] = Vec::mul(half, Vec::add(ends, g[g_step]));
  out[2 * out_step] = Vec::mul(half, Vec::sub(ends, g[g_step]));
  out[3 * out_step] = g[2 * g_step];
}

// G g GT for a register of filters: taps [9][width] → positions [16][width].
static inline void transform_filter(const float* taps, float* positions) {
  Vec::Reg g[9], rows[12], out[16];
  BASISCONV_UNROLL for (int i = 0; i < 9; i++) g[i] = Vec::load(taps + i * kWidth);
  BASISCONV_UNROLL for (int j = 0; j < 3; j++) transform_filter_row(g + j, 3, rows + j, 3);
  BASISCONV_UNROLL for (int i = 0; i < 4; i++) transform_filter_row(rows + 3 * i, 1, out + 4 * i, 1);
  BASISCONV_UNROLL for (int i = 0; i < 16; i++) Vec::store(positions + i * kWidth, out[i]);
}

}  // namespace BASISCONV_ISA
}  // namespace basisconv
