// The ring of input rows that the tiles of binary_conv2d read: bits of each plane and channel group, a pixel's side by
// side, with zero bits in the padding columns. Borders end here.
#pragma once
#include "binary_conv2d_lines.h"

namespace basisconv {
namespace BASISCONV_ISA {

struct Ring {
  const BinaryConv2dParams& p;
  const BinaryPlan& plan;
  uint8_t* rows;
  Lines lines;
  int64_t image = -1;
  int64_t begin = 0, end = 0;  // the input rows of the image that the ring holds

  const uint8_t* row(int64_t y) const { return rows + y % plan.ring_rows * plan.row_bytes; }

  // Hold rows [from, to) of image n; what is there from the pass before stays.
  void hold(int64_t n, int64_t from, int64_t to) {
    if (n != image || from > end || from < begin) begin = end = from;
    image = n;
    for (; end < to; end++) fill(n, end);
    begin = from;
  }

  void fill(int64_t n, int64_t y) {
    uint8_t* row = rows + y % plan.ring_rows * plan.row_bytes;
    for (int32_t plane = 0; plane < p.planes; plane++) {
      const uint32_t* bits = lines.of_row(n, y, plane);
      for (int64_t g = 0; g < p.weights.groups; g++) {
        place(lines.of_group(bits, g), row + plane * plan.plane_bytes + g * plan.columns * plan.pixel_bytes);
      }
    }
  }

  // Words of a row of pixels to the form of the tiles, between zero columns.
  void place(const uint32_t* bits, uint8_t* to) const {
    const int64_t left = p.pad_left < plan.columns ? p.pad_left : plan.columns;
    const int64_t room = plan.columns - left, count = p.W < room ? p.W : room;
    memset(to, 0, left * plan.pixel_bytes);
    to += left * plan.pixel_bytes;
    if (plan.pack.variant == BinaryVariant::words) {
      memcpy(to, bits, count * plan.pixel_bytes);
    } else {
      const int64_t words = words_for(p.weights.C / p.weights.groups), bytes = plan.pack.units;
      const uint8_t* from = reinterpret_cast<const uint8_t*>(bits);
      if (bytes == words * 4) {
        split(from, count * bytes, to);
      } else {
        for (int64_t x = 0; x < count; x++) split(from + x * words * 4, bytes, to + x * plan.pixel_bytes);
      }
    }
    memset(to + count * plan.pixel_bytes, 0, (room - count) * plan.pixel_bytes);
  }

  // A byte to two: its low four bits and its high ones, each times 16, which is where its table starts.
  static void split(const uint8_t* from, int64_t count, uint8_t* to) {
    for (int64_t i = 0; i < count; i++) {
      to[2 * i] = static_cast<uint8_t>(from[i] << 4);
      to[2 * i + 1] = from[i] & 0xf0;
    }
  }
};

// What a tile reads: the rows of its valid taps, and how the bits of its pixels lie in them.
struct Taps {
  const uint8_t* const* rows;  // one a valid tap row, at the first pixel's first column, without `offset`
  int64_t count;
  int64_t offset;      // bytes from there to the plane, group and pixel
  int64_t pixel_step;  // bytes from one output pixel's first column to the next one's
  int64_t runs;        // stretches of one row without a gap: 1, or S with a dilation
  int64_t run_units;   // words, or pairs of nibbles, in a run
  int64_t run_step;    // bytes from one run to the next
};

}  // namespace BASISCONV_ISA
}  // namespace basisconv
