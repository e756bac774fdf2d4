// The contract of binary_conv2d between the torch glue and the kernels: torch-free params structs.
//
//   v[n,k,y,x] = sum over the taps (c, r, s) of a(n, c, y*sh + r*dh - top, x*sw + s*dw - left) * w(k, c, r, s)
//
// a: +1 or -1, or a code of up to 4 bits; w: +1 or -1; outside the image a is padding_value. The kernels count
// raw = sum over planes b of 2^b * popc(a_b xor w) over the taps whose row lies inside the image, with zero bits in the
// columns outside. That gives
//
//   v = table[row class][column class][k] - factor * raw
//
// and everything about borders and padding values stands in the table (binary_conv2d_table.h): factor is 2 for signs, 1
// for codes. A kernel that multiplies instead has raw = -v: the same formula with one class, a table of zeros and a
// factor of 1. For packed output the table holds limits instead: bit = (raw <= limit) ^ flip.
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "bitpack.h"

namespace basisconv {

enum class BinaryOutput : int32_t { i32 = 0, packed = 1, f32 = 2, bf16 = 3, f16 = 4 };
enum class BinaryInput : int32_t { f32 = 0, bf16 = 1, f16 = 2, packed = 3 };
enum class BinaryRaw : int32_t { counts = 0, products = 1 };
enum class BinaryActivation : int32_t { none = 0, relu = 1, relu6 = 2 };

// What the weights fix: enough to pack them.
struct BinaryConv2dWeights {
  int64_t C, K, R, S, groups;
};

struct BinaryConv2dParams {
  BinaryConv2dWeights weights;
  int64_t N, H, W, OH, OW;
  int64_t stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
  int32_t planes;  // of the input; 1 for signs
  int32_t padding_value;
  bool codes;  // the planes are codes
  BinaryInput input_type;
  const void* input;  // real, with strides; or words [N, planes, H, W, words_for(C)], dense
  int64_t input_stride_n, input_stride_c, input_stride_h, input_stride_w;  // elements, of a real input
  const void* packed;                                                      // weights: see csrc/cpu/binary_conv2d_plan.h
  int32_t factor;
  const int32_t* table;         // [row classes][column classes][groups * padded filters of a group]
  const int32_t* flip;          // [groups * padded filters of a group]: 0 or -1; packed output only
  const int32_t* row_class;     // [OH]
  const int32_t* column_class;  // [OW]
  int64_t column_classes;
  const float* scale;        // [K]; float output only, like the next three
  const float* bias;         // [K]
  const float* pixel_scale;  // [N, OH, OW] or null
  BinaryActivation activation;
  BinaryOutput output_type;
  void* output;        // [N, OH, OW, K] if channels_last, else [N, K, OH, OW]; packed: words [N, OH, OW, words_for(K)]
  bool channels_last;  // of the output
};

}  // namespace basisconv
