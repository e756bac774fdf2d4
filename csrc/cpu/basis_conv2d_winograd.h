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
#include "basis_conv2d_rows.h"
#include "basis_conv2d_tiles.h"

namespace basisconv {
namespace BASISCONV_ISA {

constexpr int64_t kBlock = 16;  // channels in a channel block

// The 16 pixels of one 4x4 input tile: channel block b of pixel i is at pixel[i] + b * step[i].
struct InputTile {
  const float* pixel[16];
  int64_t step[16];
};

// BT d B for every channel: out[position][block][tile][channel].
static BASISCONV_INLINE void transform_input(const InputTile& in, int64_t blocks, int64_t position_stride,
                                             int64_t block_stride, float* out) {
  for (int64_t b = 0; b < blocks; b++, out += block_stride) {
    for (int64_t c = 0; c < kBlock; c += kWidth) {
      Vec::Reg d[4][4], e[4][4];
      BASISCONV_UNROLL for (int i = 0; i < 16; i++) d[i / 4][i % 4] = Vec::load(in.pixel[i] + b * in.step[i] + c);
      BASISCONV_UNROLL for (int j = 0; j < 4; j++) {
        e[0][j] = Vec::sub(d[0][j], d[2][j]);
        e[1][j] = Vec::add(d[1][j], d[2][j]);
        e[2][j] = Vec::sub(d[2][j], d[1][j]);
        e[3][j] = Vec::sub(d[1][j], d[3][j]);
      }
      BASISCONV_UNROLL for (int i = 0; i < 4; i++) {
        float* to = out + 4 * i * position_stride + c;
        Vec::store(to, Vec::sub(e[i][0], e[i][2]));
        Vec::store(to + position_stride, Vec::add(e[i][1], e[i][2]));
        Vec::store(to + 2 * position_stride, Vec::sub(e[i][2], e[i][1]));
        Vec::store(to + 3 * position_stride, Vec::sub(e[i][1], e[i][3]));
      }
    }
  }
}

// AT m A for `n` <= width maps of one tile: two pixels in each of two rows of z.
static BASISCONV_INLINE void transform_output(const float* m, int64_t position_stride, float* z, int64_t z_pixel,
                                              int64_t z_row, int64_t n) {
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
    const Vec::Reg left = Vec::add(Vec::add(e[i][0], e[i][1]), e[i][2]);
    const Vec::Reg right = Vec::sub(Vec::sub(e[i][1], e[i][2]), e[i][3]);
    float* to = z + i * z_row;
    if (full) {
      Vec::store(to, left);
      Vec::store(to + z_pixel, right);
    } else {
      Vec::store_n(to, left, n);
      Vec::store_n(to + z_pixel, right, n);
    }
  }
}

struct TileAt {
  int64_t n, row, column;  // image; tile row and tile column
};

template <typename T, int NK>
struct Winograd {
  const BasisConv2dParams& params;
  const CpuPlan& plan;
  const float* filters;
  const float* coefficients;
  Ring ring;
  float *transformed, *products, *z;

  // float and channels_last with whole channel blocks are read where they lie, everything else through the ring.
  bool reads_in_place() const {
    return sizeof(T) == 4 && params.input_stride_c == 1 && params.weights.C / params.weights.groups % kBlock == 0;
  }

  InputTile input_tile(const TileAt& at) const {
    alignas(64) static const float zeros[kBlock] = {};
    InputTile in;
    const int64_t y = 2 * at.row - params.pad_top, x = 2 * at.column - params.pad_left;
    for (int64_t i = 0; i < 16; i++) {
      const int64_t yy = y + i / 4, xx = x + i % 4;
      const bool inside = yy >= 0 && yy < params.H && xx >= 0 && xx < params.W;
      in.step[i] = inside ? ring.plane : 0;
      in.pixel[i] = inside ? ring.row(yy % plan.ring_rows) + ring.column(xx + params.pad_left) : zeros;
      if (reads_in_place()) {
        in.step[i] = inside ? kBlock : 0;
        in.pixel[i] = inside ? static_cast<const float*>(params.input) + at.n * params.input_stride_n +
                                   yy * params.input_stride_h + xx * params.input_stride_w
                             : zeros;
      }
    }
    return in;
  }

  void prefetch_output(const TileAt& at) const {
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

  // All groups of the gathered tiles: products, output transform, recombination, row piece by row piece.
  void finish(const TileAt* at, int64_t tiles) const {
    const CpuPack& pack = plan.pack;
    const int64_t all_maps = params.weights.groups * pack.maps;
    const int64_t z_row = 2 * plan.tiles * all_maps;
    for (int64_t group = 0; group < params.weights.groups; group++) {
      multiply(group, tiles);
      for (int64_t t = 0; t < tiles; t++) {
        const float* from = products + t * pack.maps;
        float* to = z + 2 * t * all_maps + group * pack.maps;
        for (int64_t q = 0; q < pack.maps; q += kWidth) {
          const int64_t n = pack.maps - q < kWidth ? pack.maps - q : kWidth;
          transform_output(from + q, plan.tiles * pack.maps, to + q, all_maps, z_row, n);
        }
      }
    }
    if (!params.weights.precise) round_maps<T>(z, z_row + 2 * tiles * all_maps);
    for (int64_t t = 0; t < tiles;) {
      int64_t next = t + 1;  // tiles t ... next-1 are neighbours in one row of tiles
      while (next < tiles && at[next].n == at[t].n && at[next].row == at[t].row) next++;
      const int64_t x = 2 * at[t].column;
      const int64_t pixels = x + 2 * (next - t) <= params.OW ? 2 * (next - t) : params.OW - x;
      for (int64_t i = 0; i < 2 && 2 * at[t].row + i < params.OH; i++) {
        const int64_t first = (at[t].n * params.OH + 2 * at[t].row + i) * params.OW + x;
        recombine<T, NK>(pack, params, coefficients, z + i * z_row + 2 * t * all_maps, all_maps, first, pixels);
      }
      t = next;
    }
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
      if (!reads_in_place()) {
        if (n != image) filled = 0;
        image = n;
        const int64_t first = 2 * row - params.pad_top;
        if (filled < first) filled = first;
        for (; filled < first + 4 && filled < params.H; filled++) {
          fill_row<T>(params, pack, ring, filled % plan.ring_rows, n, filled);
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

template <typename T, int NK>
static void run_winograd(const BasisConv2dParams& params, const CpuPlan& plan, float* scratch, int64_t begin,
                         int64_t end) {
  const float* filters = static_cast<const float*>(params.packed);
  float* transformed = scratch + plan.ring_size;
  float* products = transformed + plan.transformed_size;
  const Winograd<T, NK> winograd{params,
                                 plan,
                                 filters,
                                 filters + plan.pack.filters_size,
                                 make_ring(params, plan, 1, scratch),
                                 transformed,
                                 products,
                                 products + plan.products_size};
  winograd.run(begin, end);
}

// G g GT of one filter and channel, at position 4*i + j.
static inline float transformed_filter(const float* g, int64_t position) {
  static const double G[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
  double sum = 0;
  for (int a = 0; a < 3; a++) {
    for (int b = 0; b < 3; b++) sum += G[position / 4][a] * G[position % 4][b] * static_cast<double>(g[3 * a + b]);
  }
  return static_cast<float>(sum);
}

}  // namespace BASISCONV_ISA
}  // namespace basisconv
