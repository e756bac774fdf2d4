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
// larger than the filters, are read once for many tiles even on small maps.
// NaN spreads as in direct convolution; Inf may become NaN (Inf - Inf): `precise` runs direct.
#pragma once
#include "basis_conv2d_recombine.h"
#include "basis_conv2d_rows.h"

namespace basisconv {
namespace BASISCONV_ISA {

constexpr int64_t kBlock = 16;    // channels in a channel block
constexpr int64_t kRingRows = 4;  // the rows of one tile, a power of two

// A 4x4 input tile: column j of row i, channel block b, is at row[i] + j * pixel + b * block.
struct InputTile {
  const float* row[4];
  int64_t pixel, block;
};

// BT d B for every channel: out[position][block][tile][channel].
static BASISCONV_INLINE void transform_input(const InputTile& in, int64_t blocks, int64_t position_stride,
                                             int64_t block_stride, float* out) {
  const float *row0 = in.row[0], *row1 = in.row[1], *row2 = in.row[2], *row3 = in.row[3];
  for (int64_t b = 0; b < blocks; b++) {
    BASISCONV_UNROLL for (int64_t c = 0; c < kBlock; c += kWidth) {
      Vec::Reg e[4][4];
      BASISCONV_UNROLL for (int j = 0; j < 4; j++) {
        const int64_t at = j * in.pixel + c;
        const Vec::Reg d0 = Vec::load(row0 + at), d1 = Vec::load(row1 + at);
        const Vec::Reg d2 = Vec::load(row2 + at), d3 = Vec::load(row3 + at);
        e[0][j] = Vec::sub(d0, d2);
        e[1][j] = Vec::add(d1, d2);
        e[2][j] = Vec::sub(d2, d1);
        e[3][j] = Vec::sub(d1, d3);
      }
      float* to = out + c;
      BASISCONV_UNROLL for (int i = 0; i < 4; i++) {
        Vec::store(to, Vec::sub(e[i][0], e[i][2]));
        Vec::store(to + position_stride, Vec::add(e[i][1], e[i][2]));
        Vec::store(to + 2 * position_stride, Vec::sub(e[i][2], e[i][1]));
        Vec::store(to + 3 * position_stride, Vec::sub(e[i][1], e[i][3]));
        to += 4 * position_stride;
      }
    }
    row0 += in.block;
    row1 += in.block;
    row2 += in.block;
    row3 += in.block;
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
};

template <typename T>
struct Winograd {
  const BasisConv2dParams& params;
  const CpuPlan& plan;
  const float* filters;
  Ring ring;
  Recombination<T> recombination;
  float *border, *transformed, *products, *z;

  InputTile input_tile(const TileAt& at) const {
    InputTile in;
    if (!plan.in_place) {
      for (int64_t i = 0; i < 4; i++) in.row[i] = ring.row((2 * at.row + i) & (kRingRows - 1)) + 2 * at.column * kBlock;
      in.pixel = kBlock;
      in.block = ring.plane;
      return in;
    }
    const int64_t y = 2 * at.row - params.pad_top, x = 2 * at.column - params.pad_left;
    const float* image = static_cast<const float*>(params.input) + at.n * params.input_stride_n;
    in.pixel = params.input_stride_w;
    in.block = kBlock;
    for (int64_t i = 0; i < 4; i++) in.row[i] = image + (y + i) * params.input_stride_h + x * params.input_stride_w;
    if (y < 0 || y + 4 > params.H || x < 0 || x + 4 > params.W) stage_border(y, x, &in);
    return in;
  }

  // A tile that reaches over the border is copied, with zeros outside the image.
  void stage_border(int64_t y, int64_t x, InputTile* in) const {
    const int64_t channels = params.weights.C;
    for (int64_t i = 0; i < 4; i++) {
      float* to = border + 4 * i * channels;
      for (int64_t j = 0; j < 4; j++) {
        const bool inside = y + i >= 0 && y + i < params.H && x + j >= 0 && x + j < params.W;
        if (inside) {
          memcpy(to + j * channels, in->row[i] + j * in->pixel, channels * sizeof(float));
        } else {
          memset(to + j * channels, 0, channels * sizeof(float));
        }
      }
      in->row[i] = to;
    }
    in->pixel = channels;
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

  // The 16 matrix products of one group: products[position][tile][map].
  void multiply(int64_t group, int64_t tiles) const {
    const CpuPack& pack = plan.pack;
    const int64_t plane = plan.tiles * kBlock;
    const int64_t position_stride = params.weights.groups * pack.channel_blocks * plane;
    const int64_t block_weights = kBlock / pack.lanes * pack.vectors * kWidth;
    const Stage1Function* stage1 = stage1_functions(pack.lanes, pack.vectors, kBlock);
    const int64_t tile = even_tile(tiles, stage1_pixels(pack.vectors));
    const int64_t none = 0;
    for (int64_t f = 0; f < pack.filter_blocks; f++) {
      for (int64_t position = 0; position < 16; position++) {
        const Taps taps{transformed + position * position_stride + group * pack.channel_blocks * plane,
                        &none, &none, 1, plane, block_weights};
        const float* weights = filters + group * pack.group_size +
                               (f * 16 + position) * pack.channel_blocks * block_weights;
        for (int64_t t = 0; t < tiles; t += tile) {
          stage1[tiles - t < tile ? tiles - t : tile](
              taps, 0, pack.channel_blocks, t, weights, Partial{nullptr, true, true},
              products + (position * plan.tiles + t) * pack.maps + f * pack.filters, pack.maps);
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
    int64_t filled = 0;  // pixels of z
    for (int64_t group = 0; group < params.weights.groups; group++) {
      multiply(group, tiles);
      filled = 0;
      for (int64_t t = 0; t < tiles;) {
        const Piece piece = piece_at(at, t, tiles);
        for (; t < piece.last; t++) {
          const int64_t x = 2 * (t - piece.first);
          const float* from = products + t * pack.maps;
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

  void run(int64_t begin, int64_t end) const {
    const CpuPack& pack = plan.pack;
    const int64_t blocks = params.weights.groups * pack.channel_blocks;
    const int64_t plane = plan.tiles * kBlock;
    const int64_t tile_rows = (params.OH + 1) / 2;
    TileAt* at = new TileAt[plan.tiles];
    int64_t waiting = 0, image = -1, filled = 0;
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t n = unit / tile_rows, row = unit % tile_rows;
      if (!plan.in_place) {
        if (n != image) filled = 0;
        image = n;
        if (filled < 2 * row) filled = 2 * row;
        for (; filled < 2 * row + 4; filled++) {  // rows of the padded image
          const int64_t y = filled - params.pad_top, slot = filled & (kRingRows - 1);
          if (y >= 0 && y < params.H) {
            fill_row<T>(params, pack, ring, slot, n, y);
          } else {
            memset(ring.row(slot), 0, ring.row_size * sizeof(float));
          }
        }
      }
      for (int64_t column = 0; column < plan.tile_columns; column++) {
        at[waiting] = TileAt{n, row, column};
        prefetch_output(at[waiting]);
        transform_input(input_tile(at[waiting]), blocks, blocks * plane, plane, transformed + waiting * kBlock);
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
  float* border = scratch + plan.ring_size;
  float* transformed = border + plan.border_size;
  float* products = transformed + plan.transformed_size;
  float* z = products + plan.products_size;
  const Recombination<T> recombination{params, pack, coefficients, coefficients + pack.coefficients_size,
                                       z + plan.maps_size};
  const Ring ring = make_ring(params, plan, 1, scratch);
  Winograd<T>{params, plan, filters, ring, recombination, border, transformed, products, z}.run(begin, end);
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
