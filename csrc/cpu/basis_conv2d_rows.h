// Input rows as the tiles want them: float, or bfloat16 where products take pairs; channel blocks apart, padding as
// zeros, stride phases apart.
//
// Ring row: [channel_blocks of all groups][stride_w][ring_columns][BLOCK]. The pixels that one tap of consecutive
// outputs reads are then neighbours BLOCK floats apart, whatever the stride, and borders, dtypes and strides of the
// tensor end here.
#pragma once
#include "slots.h"

namespace basisconv {
namespace BASISCONV_ISA {

struct Ring {
  Slots::Value* rows;
  int64_t row_size;  // values of one row
  int64_t plane;     // values between channel blocks
  int64_t columns;   // pixels of one stride phase
  int64_t phases;    // stride_w
  int64_t block;

  Slots::Value* row(int64_t slot) const { return rows + slot * row_size; }

  // Walks the pixels of a row from left to right without a division each.
  struct Walk {
    const Ring& ring;
    int64_t phase, at;  // at: pixels from the start of the phase

    Walk(const Ring& r, int64_t x) : ring(r), phase(x % r.phases), at(x / r.phases) {}
    int64_t next() {
      const int64_t offset = (phase * ring.columns + at) * ring.block;
      if (++phase == ring.phases) {
        phase = 0;
        at++;
      }
      return offset;
    }
  };
  // Values from the start of a channel block to padded column x.
  int64_t column(int64_t x) const { return ((x % phases) * columns + x / phases) * block; }
};

static inline Ring make_ring(const BasisConv2dParams& params, const CpuPlan& plan, int64_t phases,
                             Slots::Value* memory) {
  const CpuPack& pack = plan.pack;
  Ring ring{};
  ring.rows = memory;
  ring.phases = phases;
  ring.columns = plan.ring_columns;
  ring.block = pack.block;
  ring.plane = phases * plan.ring_columns * pack.block;
  ring.row_size = params.weights.groups * pack.channel_blocks * ring.plane;
  memset(memory, 0,
         plan.ring_rows * ring.row_size * sizeof(Slots::Value));  // the padding columns; none of an empty ring
  return ring;
}

#if !defined(BASISCONV_PAIRS)

// One channel block of an image row whose pixels are neighbours (NCHW): squares of width channels by width pixels.
template <typename T>
static void fill_block_planar(const T* from, int64_t channel_stride, int64_t pixels, int64_t channels, const Ring& ring,
                              int64_t pad_left, float* to) {
  for (int64_t c = 0; c < channels; c += kWidth) {
    Ring::Walk walk(ring, pad_left);
    const int64_t rows = channels - c < kWidth ? channels - c : kWidth;
    for (int64_t x = 0; x < pixels; x += kWidth) {
      const int64_t columns = pixels - x < kWidth ? pixels - x : kWidth;
      Vec::Reg square[kWidth];
      BASISCONV_UNROLL for (int i = 0; i < kWidth; i++) {
        const T* row = from + (c + i) * channel_stride + x;
        square[i] = i >= rows ? Vec::zero() : columns == kWidth ? Vec::load(row) : Vec::load_n(row, columns);
      }
      transpose(square);
      // A block narrower than a register (very few channels) takes only its own floats.
      const int64_t floats = ring.block < kWidth ? ring.block : kWidth;
      for (int64_t i = 0; i < columns; i++) {
        float* pixel = to + walk.next() + c;
        if (floats == kWidth) {
          Vec::store(pixel, square[i]);
        } else {
          Vec::store_n(pixel, square[i], floats);
        }
      }
    }
  }
}

// Copy image row `y` of image `n` into a ring slot. The padding columns are zero since make_ring and stay so.
template <typename T>
static void fill_row(const BasisConv2dParams& params, const CpuPack& pack, const Ring& ring, int64_t slot, int64_t n,
                     int64_t y) {
  const int64_t group_channels = params.weights.C / params.weights.groups;
  const T* source = static_cast<const T*>(params.input) + n * params.input_stride_n + y * params.input_stride_h;
  float* row = ring.row(slot);
  for (int64_t group = 0; group < params.weights.groups; group++) {
    for (int64_t b = 0; b < pack.channel_blocks; b++) {
      const int64_t first = b * ring.block;
      const int64_t rest = group_channels - first;
      const int64_t channels = rest < ring.block ? rest : ring.block;
      const T* from = source + (group * group_channels + first) * params.input_stride_c;
      float* to = row + (group * pack.channel_blocks + b) * ring.plane;
      Ring::Walk walk(ring, params.pad_left);
      if (params.input_stride_c == 1 && channels % kWidth == 0) {
        for (int64_t x = 0; x < params.W; x++) {
          float* pixel = to + walk.next();
          for (int64_t c = 0; c < channels; c += kWidth) {
            Vec::store(pixel + c, Vec::load(from + x * params.input_stride_w + c));
          }
        }
      } else if (params.input_stride_w == 1 && channels > 1) {
        fill_block_planar(from, params.input_stride_c, params.W, channels, ring, params.pad_left, to);
      } else {
        for (int64_t x = 0; x < params.W; x++) {
          float* pixel = to + walk.next();
          const T* value = from + x * params.input_stride_w;
          for (int64_t c = 0; c < channels; c++) pixel[c] = to_float(value[c * params.input_stride_c]);
        }
      }
    }
  }
}

#endif

}  // namespace BASISCONV_ISA
}  // namespace basisconv

#if defined(BASISCONV_PAIRS)
#include "basis_conv2d_pair_rows.h"
#endif
