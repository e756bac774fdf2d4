// The band (band.h) that basis_conv2d multiplies on the matrix unit: filled row by row, padding as zeros.
#pragma once
#include "band.h"
#include "basis_conv2d_amx_tiles.h"
#include "basis_conv2d_rows.h"

namespace basisconv {
namespace BASISCONV_ISA {

class InputBand {
 public:
  InputBand(const BasisConv2dParams& params, const CpuPlan& plan, bf16* memory)
      : params_(params), plan_(plan), shape_(plan.band), memory_(memory), plane_(shape_.plane() * kDepth) {}

  // Output rows from oy on, of an image, are next.
  void begin(int64_t image, int64_t oy) {
    image_ = image;
    oy_ = oy;
    filled_ = 0;
  }

  // Place 0 of a channel block, and how far from it tap (r, s) of a block `blocks` later reads.
  const bf16* pixels(int64_t block) const { return memory_ + block * plane_; }
  int64_t tap(int64_t blocks, int64_t r, int64_t s) const { return blocks * plane_ + shape_.tap(r, s) * kDepth; }

  // Copies the input rows that outputs up to row `row` of the pass read, as far as that has not been done.
  void fill_for(int64_t row) {
    for (; filled_ < shape_.input_rows(row); filled_++) {
      fill(filled_, oy_ * shape_.stride_h - params_.pad_top + filled_);
    }
  }

 private:
  // Values from a channel block's begin to padded row and column.
  int64_t place(int64_t row, int64_t column) const { return shape_.place(row, column) * kDepth; }

  void fill(int64_t row, int64_t y) {
    const BasisConv2dWeights& w = params_.weights;
    const int64_t width = shape_.columns * w.stride_w;
    if (y < 0 || y >= params_.H) return zero(row, 0, width);
    zero(row, 0, params_.pad_left);
    if (params_.input_stride_c == 1 && w.stride_w == 1 && w.C / w.groups % kDepth == 0) {
      copy(row, y);
    } else {
      Ring one_row{};
      one_row.rows = memory_ + place(row, 0);
      one_row.plane = plane_;
      one_row.columns = shape_.phase();
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
  const Band& shape_;
  bf16* const memory_;
  const int64_t plane_;  // values of a channel block
  int64_t image_ = 0, oy_ = 0;
  int64_t filled_ = 0;  // input rows that are there
};

}  // namespace BASISCONV_ISA
}  // namespace basisconv
