// A band: the input rows of some output rows of one image, so that 16 pixels for the matrix unit are one tile load.
//
// Band: [channel blocks of all groups][row phases][column phases][rows][columns][32 channels], phases being those of
// the stride, padding being zeros. What one tap of consecutive outputs reads are then neighbours 64 bytes apart, and
// the end of a row is followed by the next one: a tile of 16 places goes on over it, and only the places beside the
// output, as many as a row has columns more than outputs, are computed for nothing. Where that would be more than the
// rest of a last tile in every row (wide dilated kernels), tiles begin with the rows instead.
#pragma once
#include "basis_conv2d_amx_tiles.h"
#include "basis_conv2d_rows.h"

namespace basisconv {
namespace BASISCONV_ISA {

// 16 places of a band, counted along its rows of outputs.
struct PixelTile {
  int64_t start;   // the first place
  int64_t output;  // the output pixel of the image that its first valid place is
  int64_t row;     // of the band's outputs, that its last valid place lies in
  uint32_t valid;  // bit i: place i is an output pixel
};

class Band {
 public:
  Band(const BasisConv2dParams& params, const CpuPlan& plan, bf16* memory)
      : params_(params),
        plan_(plan),
        memory_(memory),
        phase_((plan.ring_rows * plan.ring_columns + kSide) * kDepth),
        plane_(params.weights.stride_h * params.weights.stride_w * phase_) {}

  // Output rows oy ... oy+rows-1 of an image are next.
  void begin(int64_t image, int64_t oy, int64_t rows) {
    image_ = image;
    oy_ = oy;
    rows_ = rows;
    filled_ = 0;
  }

  int64_t image() const { return image_; }
  int64_t tiles() const {
    if (plan_.row_tiles > 0) return rows_ * plan_.row_tiles;
    return ((rows_ - 1) * plan_.ring_columns + params_.OW + kSide - 1) / kSide;
  }

  PixelTile tile(int64_t index) const {
    const int64_t columns = plan_.ring_columns, apart = plan_.row_tiles;
    const int64_t start = apart > 0 ? index / apart * columns + index % apart * kSide : index * kSide;
    int64_t y = start / columns, x = start % columns;
    PixelTile tile{start, (oy_ + y) * params_.OW + (x < params_.OW ? x : params_.OW), y, 0};
    for (int64_t i = 0; i < kSide && y < rows_; i += columns - x, y++, x = 0) {
      if (x < params_.OW) {
        const int64_t left = params_.OW - x, count = left < kSide - i ? left : kSide - i;
        tile.valid |= ((1u << count) - 1) << i;
        tile.row = y;
      }
      if (apart > 0) break;
    }
    return tile;
  }

  // Place 0 of a channel block, and how far from it tap (r, s) of a block `blocks` later reads.
  const bf16* pixels(int64_t block) const { return memory_ + block * plane_; }
  int64_t tap(int64_t blocks, int64_t r, int64_t s) const {
    return blocks * plane_ + place(r * params_.weights.dilation_h, s * params_.weights.dilation_w);
  }

  // Copies the input rows that outputs up to row `row` of the band read, as far as that has not been done.
  void fill_for(int64_t row) {
    const BasisConv2dWeights& w = params_.weights;
    const int64_t needed = row * w.stride_h + (w.R - 1) * w.dilation_h + 1;
    for (; filled_ < needed; filled_++) fill(filled_, oy_ * w.stride_h - params_.pad_top + filled_);
  }

 private:
  // Values from a channel block's begin to padded row and column.
  int64_t place(int64_t row, int64_t column) const {
    const int64_t sh = params_.weights.stride_h, sw = params_.weights.stride_w;
    return (row % sh * sw + column % sw) * phase_ + (row / sh * plan_.ring_columns + column / sw) * kDepth;
  }

  void fill(int64_t row, int64_t y) {
    const BasisConv2dWeights& w = params_.weights;
    const int64_t width = plan_.ring_columns * w.stride_w;
    if (y < 0 || y >= params_.H) return zero(row, 0, width);
    zero(row, 0, params_.pad_left);
    if (params_.input_stride_c == 1 && w.stride_w == 1 && w.C / w.groups % kDepth == 0) {
      copy(row, y);
    } else {
      Ring one_row{};
      one_row.rows = memory_ + place(row, 0);
      one_row.plane = plane_;
      one_row.columns = phase_ / kDepth;
      one_row.phases = w.stride_w;
      one_row.block = kDepth;
      fill_row<bf16>(params_, plan_.pack, one_row, 0, image_, y);
    }
    zero(row, params_.pad_left + params_.W, width);
  }

  // Whole channel blocks that lie side by side.
  void copy(int64_t row, int64_t y) {
    const int64_t blocks = params_.weights.C / kDepth;
    const bf16* from =
        static_cast<const bf16*>(params_.input) + image_ * params_.input_stride_n + y * params_.input_stride_h;
    bf16* to = memory_ + place(row, params_.pad_left);
    for (int64_t x = 0; x < params_.W; x++, from += params_.input_stride_w, to += kDepth) {
      for (int64_t b = 0; b < blocks; b++) _mm512_storeu_si512(to + b * plane_, _mm512_loadu_si512(from + b * kDepth));
    }
  }

  void zero(int64_t row, int64_t begin, int64_t end) {
    const int64_t blocks = params_.weights.groups * plan_.pack.channel_blocks;
    for (int64_t b = 0; b < blocks; b++) {
      for (int64_t x = begin; x < end; x++) {
        _mm512_storeu_si512(memory_ + b * plane_ + place(row, x), _mm512_setzero_si512());
      }
    }
  }

  const BasisConv2dParams& params_;
  const CpuPlan& plan_;
  bf16* const memory_;
  const int64_t phase_, plane_;  // values
  int64_t image_ = 0, oy_ = 0, rows_ = 0;
  int64_t filled_ = 0;  // input rows that are there
};

}  // namespace BASISCONV_ISA
}  // namespace basisconv
