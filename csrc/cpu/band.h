// A band: the input rows of some output rows of one image, laid out so that 16 output pixels are one tile load of the
// matrix unit. Which rows, and where a pixel of them lies: pure functions of sizes.
//
// A place is a line of 64 bytes, 32 channels of a pixel in bfloat16. Places of a channel block: [row phases][column
// phases][rows][columns], phases being those of the stride, padding being zeros. What one tap of consecutive outputs
// reads are then neighbours, and the end of a row is followed by the next one: a tile of 16 places goes on over it, and
// only the places beside the output, as many as a row has columns more than outputs, are computed for nothing. Where
// that would be more than the rest of a last tile in every row (wide dilated kernels), tiles begin with the rows
// instead.
#pragma once
#include <algorithm>
#include <cstdint>

// Always inline: no copy of one instruction set may serve another.
#define BASISCONV_BAND inline __attribute__((always_inline))

namespace basisconv {

constexpr int64_t kTilePlaces = 16;

// 16 places of a band, counted along its rows of outputs.
struct PixelTile {
  int64_t start;   // the first place
  int64_t output;  // the output pixel of the image that its first valid place is
  int64_t row;     // of the band's outputs, that its last valid place lies in
  uint32_t valid;  // bit i: place i is an output pixel
};

// The size of a part when `count` is cut into the fewest equal parts of at most `most`. Of 6 tiles that share each load
// of filters 3 and 3: a part of 2 would wait for each sum before it adds to it again.
BASISCONV_BAND int64_t even_share(int64_t count, int64_t most) {
  const int64_t parts = (count + most - 1) / most;
  return parts == 0 ? 0 : (count + parts - 1) / parts;
}

struct Band {
  // The convolution.
  int64_t OH, OW, W, R, S, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
  // Chosen by fit.
  int64_t output_rows = 0;        // in a pass, at most
  int64_t rows = 0, columns = 0;  // of one stride phase
  int64_t row_tiles = 0;          // tiles in each row of outputs; 0: tiles go on over the ends of rows

  // As many output rows as fit `most` places, or one.
  void fit(int64_t most) {
    columns = std::max((W + pad_left + stride_w - 1) / stride_w, OW + (S - 1) * dilation_w / stride_w);
    output_rows = 0;
    do {
      output_rows++;
      rows = rows_for(output_rows);
    } while (output_rows < OH && stride_h * stride_w * (rows_for(output_rows + 1) * columns + kTilePlaces) <= most);
    row_tiles = 0;
    const int64_t apart = (OW + kTilePlaces - 1) / kTilePlaces;
    if (tiles(output_rows) > output_rows * apart) row_tiles = apart;
  }

  // Input rows of one phase that so many rows of outputs read.
  BASISCONV_BAND int64_t rows_for(int64_t outputs) const {
    return ((outputs - 1) * stride_h + (R - 1) * dilation_h + stride_h) / stride_h;
  }

  // Places of one phase, with those that tiles reach beyond the last row, and of a channel block.
  BASISCONV_BAND int64_t phase() const { return rows * columns + kTilePlaces; }
  BASISCONV_BAND int64_t plane() const { return stride_h * stride_w * phase(); }

  // Padded row and column of the band, from the begin of a channel block; and tap (r, s) of an output from its place.
  BASISCONV_BAND int64_t place(int64_t row, int64_t column) const {
    return (row % stride_h * stride_w + column % stride_w) * phase() + row / stride_h * columns + column / stride_w;
  }
  BASISCONV_BAND int64_t tap(int64_t r, int64_t s) const { return place(r * dilation_h, s * dilation_w); }

  // Of a pass over so many rows of outputs.
  BASISCONV_BAND int64_t tiles(int64_t outputs) const {
    if (row_tiles > 0) return outputs * row_tiles;
    return ((outputs - 1) * columns + OW + kTilePlaces - 1) / kTilePlaces;
  }

  // Tile `index` of a pass over output rows oy ... oy+outputs-1.
  BASISCONV_BAND PixelTile tile(int64_t index, int64_t oy, int64_t outputs) const {
    const int64_t start =
        row_tiles > 0 ? index / row_tiles * columns + index % row_tiles * kTilePlaces : index * kTilePlaces;
    int64_t y = start / columns, x = start % columns;
    PixelTile tile{start, (oy + y) * OW + (x < OW ? x : OW), y, 0};
    for (int64_t i = 0; i < kTilePlaces && y < outputs; i += columns - x, y++, x = 0) {
      if (x < OW) {
        const int64_t left = OW - x, count = left < kTilePlaces - i ? left : kTilePlaces - i;
        tile.valid |= ((1u << count) - 1) << i;
        tile.row = y;
      }
      if (row_tiles > 0) break;
    }
    return tile;
  }

  // Input rows, padded ones counted, that outputs up to row `row` of a pass read.
  BASISCONV_BAND int64_t input_rows(int64_t row) const { return row * stride_h + (R - 1) * dilation_h + 1; }

  // Calls run(image, oy, outputs) for passes over output rows [begin, end) of the batch: those of an image as equal as
  // can be.
  template <typename Run>
  BASISCONV_BAND void each_pass(int64_t begin, int64_t end, const Run& run) const {
    while (begin < end) {
      const int64_t image = begin / OH, oy = begin % OH, left = std::min(end - begin, OH - oy);
      const int64_t outputs = even_share(left, output_rows);
      run(image, oy, outputs);
      begin += outputs;
    }
  }
};

}  // namespace basisconv
