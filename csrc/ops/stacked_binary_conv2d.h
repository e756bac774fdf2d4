// The contract of stacked_binary_conv2d between the torch glue and the kernels: a torch-free params struct.
//
//   u[n,s,j,y,x] = sum_{c,r,t} B[j,c,r,t] * v[n, s*low + c, y*sh + r*dh - top, x*sw + t*dw - left]    B is +1 or -1
//   out[n,k,y,x] = act(bias[k] + scale[k] * sum_i u[n, group(k)*splits + i, index[k,i], y, x])
//
// v is the input, its signs, or the numbers of a packed one. One bank serves all slices s of the channels.
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "basis_conv2d.h"

namespace basisconv {

// What enters the sums.
enum class StackedMode : int32_t { real = 0, signs = 1, packed_signs = 2, packed_codes = 3 };

// What the bank and the index fix: enough to pack, for all batches, maps, strides and dtypes.
struct StackedBinaryWeights {
  int64_t C, K, n, splits, groups, R, S;
};

struct StackedBinaryConv2dParams {
  StackedBinaryWeights weights;
  StackedMode mode;
  DType dtype;  // of a real input and of the output; f32 for packed input
  int64_t N, H, W, OH, OW;
  int64_t stride_h, stride_w, dilation_h, dilation_w;
  int64_t pad_top, pad_left;
  const void* input;                                                       // real, or int32 words
  int64_t input_stride_n, input_stride_c, input_stride_h, input_stride_w;  // elements; of a real input
  int64_t planes;      // of a packed input, dense [N, planes, H, W, ceil(C/32)]
  const void* packed;  // see csrc/cpu/stacked_binary_conv2d_plan.h
  const float* scale;  // [K]; ones where the op has none
  const float* bias;   // [K]; zeros where the op has none
  void* output;        // dense: [N, OH, OW, K] if channels_last, else [N, K, OH, OW]
  bool channels_last;  // of the output
  Activation activation;
};

}  // namespace basisconv
