// Tiles of a map into Winograd's positions and back: BT d C of neighbouring tiles, AT m D of one. The algebra is that
// of basis_conv2d_winograd_forms.h; which tiles, and where they lie, is the caller's (basis_conv2d_winograd.h).
#pragma once
#include "basis_conv2d_winograd_forms.h"

namespace basisconv {
namespace BASISCONV_ISA {

constexpr int64_t kBlock = 16;  // channels in a channel block

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

// AT m D for `n` <= width values of one tile: calls store(row, its pixels) for up to two rows of W pixels.
template <typename F, typename Store>
static BASISCONV_INLINE void transform_output(const float* m, int64_t position_stride, int64_t rows, int64_t n,
                                              const Store& store) {
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
    store(i, pixel);
  }
}

// Where z of a tile goes: its first pixel, floats between pixels and rows, and how many columns and rows are there.
struct TileOutput {
  float* z;
  int64_t pixel, row, rows, columns;
};

// z of `n` maps.
template <typename F>
static BASISCONV_INLINE void store_output(const float* m, int64_t position_stride, const TileOutput& to, int64_t n) {
  transform_output<F>(m, position_stride, to.rows, n, [&](int i, const Vec::Reg* pixel) BASISCONV_LAMBDA {
    float* z = to.z + i * to.row;
    BASISCONV_UNROLL for (int j = 0; j < F::kOutputs; j++) {
      if (j >= to.columns) break;
      if (n == kWidth) {
        Vec::store(z + j * to.pixel, pixel[j]);
      } else {
        Vec::store_n(z + j * to.pixel, pixel[j], n);
      }
    }
  });
}

// z of width/L maps whose L lanes have not been added up: once for each of W pixels, not for each position.
template <typename F, int L>
static BASISCONV_INLINE void store_output_sums(const float* m, int64_t position_stride, const TileOutput& to) {
  transform_output<F>(m, position_stride, to.rows, kWidth, [&](int i, const Vec::Reg* pixel) BASISCONV_LAMBDA {
    float* z = to.z + i * to.row;
    BASISCONV_UNROLL for (int j = 0; j < F::kOutputs; j += 2) {
      if (j >= to.columns) break;
      if (j + 1 < to.columns && to.pixel == kWidth / L) {
        Vec::store_sums<L>(z + j * to.pixel, pixel[j], pixel[j + 1]);
      } else {
        Vec::store_sums<L>(z + j * to.pixel, pixel[j]);
        if (j + 1 < to.columns) Vec::store_sums<L>(z + (j + 1) * to.pixel, pixel[j + 1]);
      }
    }
  });
}

template <typename F>
static BASISCONV_INLINE void store_output_sums(int lanes, const float* m, int64_t position_stride,
                                               const TileOutput& to) {
  if constexpr (kWidth == 16) {  // the plan offers it to no other
    if (lanes == 2) store_output_sums<F, 2>(m, position_stride, to);
    if (lanes == 4) store_output_sums<F, 4>(m, position_stride, to);
  }
}

}  // namespace BASISCONV_ISA
}  // namespace basisconv
