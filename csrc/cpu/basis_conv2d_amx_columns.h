// Stage 1 of filters three taps wide on the matrix unit, without a band: columns of taps are summed apart.
//
// z[p] = Σ_s Σ_r Σ_c input[p + row r, column s][c]·filter[r, s][c]. The inner two sums are taken at the input's own
// pixels, y_s[p] = Σ_r Σ_c input[p + row r][c]·filter[r, s][c]; then z[p] = Σ_s y_s[p + s·dilation - padding]. So
// pixels are read where the input lies, in whole tiles that go on over the ends of rows: nothing is copied, no tile is
// partly beside the image, and padding is what the last sum leaves out. Outputs are made in parts of some rows that the
// same rows of taps fall into.
#pragma once
#include <algorithm>

#include "basis_conv2d_amx_products.h"
#include "basis_conv2d_rows.h"

namespace basisconv {
namespace BASISCONV_ISA {

constexpr int64_t kColumns = kAmxColumns;  // of taps

// Output rows oy ... oy+rows-1 of an image; rows of taps first_tap ... first_tap+taps-1 fall into the image.
struct Part {
  int64_t image, oy, rows, first_tap, taps;
};

class Columns {
 public:
  // sums: [3][pixels of a part, whole tiles][16 filters]; steps: plan.pack.channel_blocks · R.
  Columns(const BasisConv2dParams& params, const CpuPlan& plan, const bf16* filters, float* sums, Step* steps)
      : params_(params),
        plan_(plan),
        filters_(filters),
        sums_(sums),
        steps_(steps),
        column_(plan.partial_size / kColumns),
        dilation_(params.weights.dilation_h) {
    for (int64_t s = 0; s < kColumns; s++) shifts_[s] = s * params.weights.dilation_w - params.pad_left;
    inner_begin_ = std::clamp<int64_t>(-shifts_[0], 0, params.OW);
    inner_end_ = std::clamp<int64_t>(params.W - shifts_[kColumns - 1], inner_begin_, params.OW);
  }

  // The part that begins at output row oy of an image, of at most `most` rows.
  Part part_from(int64_t image, int64_t oy, int64_t most) const {
    Part part{image, oy, 1, first_tap(oy), end_tap(oy) - first_tap(oy)};
    most = std::min({most, plan_.rows, params_.OH - oy});
    while (part.rows < most && first_tap(oy + part.rows) == part.first_tap &&
           end_tap(oy + part.rows) == part.first_tap + part.taps) {
      part.rows++;
    }
    return part;
  }

  // z of the part, rounded: [pixels][all_maps].
  void run(const Part& part, bf16* maps, int64_t all_maps) const {
    const BasisConv2dWeights& w = params_.weights;
    const CpuPack& pack = plan_.pack;
    const int64_t steps = pack.channel_blocks * part.taps;
    for (int64_t i = 0; i < steps; i++) {
      const int64_t block = i / part.taps, r = i % part.taps;
      steps_[i] = {block * kDepth + r * dilation_ * params_.input_stride_h,
                   (block * w.R + part.first_tap + r) * kColumns * kTile};
    }
    const int64_t y = part.oy - params_.pad_top + part.first_tap * dilation_;
    const bf16* input =
        static_cast<const bf16*>(params_.input) + part.image * params_.input_stride_n + y * params_.input_stride_h;
    for (int64_t group = 0; group < w.groups; group++, input += w.C / w.groups) {
      const bf16* weights = filters_ + group * pack.group_size;
      for (int64_t f = 0; f < pack.filter_blocks; f++, weights += pack.channel_blocks * w.R * kColumns * kTile) {
        multiply_columns(part, input, steps, weights);
        round(part, f, maps + group * pack.maps + f * kSide, all_maps);
      }
    }
  }

 private:
  // Rows of taps that fall into the image: [first_tap, end_tap).
  int64_t first_tap(int64_t oy) const {
    const int64_t above = params_.pad_top - oy;
    return above <= 0 ? 0 : std::min((above + dilation_ - 1) / dilation_, params_.weights.R);
  }
  int64_t end_tap(int64_t oy) const {
    const int64_t below = params_.H + params_.pad_top - oy;
    const int64_t end = below <= 0 ? 0 : std::min((below + dilation_ - 1) / dilation_, params_.weights.R);
    return std::max(end, first_tap(oy));
  }

  // y of a block of 16 filters. The last tile ends with the part, and does again what another one did.
  void multiply_columns(const Part& part, const bf16* input, int64_t steps, const bf16* weights) const {
    const int64_t pixels = part.rows * params_.W, pixel = params_.input_stride_w;
    in_shares((pixels + kSide - 1) / kSide, [&](int64_t first, int64_t count) BASISCONV_LAMBDA {
      Pixels of{{}, count, pixel * 2};
      Sums sums{{}, kTileRow};
      for (int64_t s = 0; s < kColumns; s++) {
        for (int64_t t = 0; t < count; t++) {
          const int64_t at = std::min((first + t) * kSide, pixels - kSide);
          of.tiles[t] = input + at * pixel;
          sums.tiles[t] = sums_ + s * column_ + at * kSide;
        }
        multiply<Rows::pixels>(of, steps_, steps, weights + s * kTile, sums);
      }
    });
  }

  // z of a block of 16 filters. Maps that only fill up a block are zeros, in the last of an odd number of blocks also
  // those of a whole one: an infinite input times a filter of zeros is NaN.
  void round(const Part& part, int64_t filter_block, bf16* to, int64_t all_maps) const {
    const int64_t rest = params_.weights.Q / params_.weights.groups - filter_block * kSide;
    const __mmask16 real = static_cast<__mmask16>(rest < kSide ? (1 << rest) - 1 : 0xFFFF);
    const bool alone = filter_block % 2 == 0 && filter_block + 1 == plan_.pack.filter_blocks;
    const int64_t W = params_.W, column = column_;
    const auto store = [&](Vec::Reg sum) BASISCONV_LAMBDA {
      Vec::store(to, _mm512_maskz_mov_ps(real, sum));
      if (alone) Vec::store(to + kSide, Vec::zero());
      to += all_maps;
    };
    const float* row = sums_;
    for (int64_t y = 0; y < part.rows; y++, row += W * kSide) {
      const auto beside_the_image = [&](int64_t begin, int64_t end) BASISCONV_LAMBDA {
        for (int64_t x = begin; x < end; x++) {
          Vec::Reg sum = Vec::zero();
          for (int64_t s = 0; s < kColumns; s++) {
            const int64_t from = x + shifts_[s];
            if (0 <= from && from < W) sum = Vec::add(sum, Vec::load(row + s * column + from * kSide));
          }
          store(sum);
        }
      };
      beside_the_image(0, inner_begin_);
      const float *from0 = row + shifts_[0] * kSide, *from1 = row + column + shifts_[1] * kSide;
      const float* from2 = row + 2 * column + shifts_[2] * kSide;
      for (int64_t x = inner_begin_; x < inner_end_; x++) {
        const Vec::Reg sum = Vec::add(Vec::load(from0 + x * kSide), Vec::load(from1 + x * kSide));
        store(Vec::add(sum, Vec::load(from2 + x * kSide)));
      }
      beside_the_image(inner_end_, params_.OW);
    }
  }

  const BasisConv2dParams& params_;
  const CpuPlan& plan_;
  const bf16* const filters_;
  float* const sums_;
  Step* const steps_;
  const int64_t column_;  // floats of sums
  const int64_t dilation_;
  int64_t shifts_[kColumns];         // from a column of outputs to that of the input
  int64_t inner_begin_, inner_end_;  // columns of outputs that all columns of taps reach
};

}  // namespace BASISCONV_ISA
}  // namespace basisconv
