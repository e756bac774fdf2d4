// A row of input pixels as words: packed input where it lies, real input packed into a line of its own, and the
// channels of one group at the start of a word.
#pragma once
#include "binary_conv2d_plan.h"
#include "bitpack_rows.h"

namespace basisconv {
namespace BASISCONV_ISA {

struct Lines {
  const BinaryConv2dParams& p;
  uint32_t* line;        // [W][words_for(C)]
  uint32_t* group_line;  // [W][words_for(C / groups)]

  const uint32_t* of_row(int64_t n, int64_t y, int32_t plane) const {
    switch (p.input_type) {
      case BinaryInput::packed:
        break;
      case BinaryInput::f32:
        pack<float>(n, y);
        return line;
      case BinaryInput::bf16:
        pack<bf16>(n, y);
        return line;
      case BinaryInput::f16:
        pack<f16>(n, y);
        return line;
    }
    return static_cast<const uint32_t*>(p.input) + ((n * p.planes + plane) * p.H + y) * p.W * words_for(p.weights.C);
  }

  template <typename T>
  void pack(int64_t n, int64_t y) const {
    const T* x = static_cast<const T*>(p.input) + n * p.input_stride_n + y * p.input_stride_h;
    sign_row(x, p.input_stride_c, p.input_stride_w, p.weights.C, p.W, line);
  }

  // The channels of a group start anywhere in a word: shift them to the start of one, zeros behind the last.
  const uint32_t* of_group(const uint32_t* bits, int64_t g) const {
    if (p.weights.groups == 1) return bits;
    const int64_t channels = p.weights.C / p.weights.groups, count = words_for(channels),
                  words = words_for(p.weights.C);
    for (int64_t x = 0; x < p.W; x++) {
      for (int64_t j = 0; j < count; j++) {
        const int64_t from = g * channels + j * kWordBits, word = from / kWordBits, shift = from % kWordBits;
        const uint32_t* pixel = bits + x * words;
        uint32_t value = pixel[word] >> shift;
        if (shift != 0 && word + 1 < words) value |= pixel[word + 1] << (kWordBits - shift);
        const int64_t left = channels - j * kWordBits;
        if (left < kWordBits) value &= (1u << left) - 1u;
        group_line[x * count + j] = value;
      }
    }
    return group_line;
  }
};

}  // namespace BASISCONV_ISA
}  // namespace basisconv
