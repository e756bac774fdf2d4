// The contract of bitpack between the torch glue and the kernels: maps [N, C, H, W] to 32-bit words.
//
//   word[n, b, y, x, c / 32] bit c % 32 = bit b of the code of input[n, c, y, x], or its sign (planes = 1)
//
// docs/packed_formats.md is the text of the format.
#pragma once
#include <cstdint>

namespace basisconv {

constexpr int64_t kWordBits = 32;
constexpr int64_t words_for(int64_t channels) { return (channels + kWordBits - 1) / kWordBits; }

enum class BitpackType : int32_t { f32 = 0, bf16 = 1, f16 = 2, i32 = 3 };

struct BitpackParams {
  int64_t N, C, H, W;
  int32_t planes;
  bool codes;  // round(clamp(input, 0, 2^planes - 1)) instead of signs
  BitpackType type;
  const void* input;
  int64_t stride_n, stride_c, stride_h, stride_w;  // elements
  const void* threshold;                           // [C], float or int32 as the input's type asks, or null: input >= 0
  const uint32_t* flip;  // [words] bits: channels that compare with <=; zeros without threshold
  uint32_t* output;      // [N, planes, H, W, words], dense
};

}  // namespace basisconv
