// The contract of ternary_conv2d between the torch glue and the kernels: a torch-free params struct.
//
//   S+[n,k,y,x] = sum of input[n, c, y*sh + r*dh - top, x*sw + s*dw - left] over the taps (c, r, s) with weight +1
//   out[n,k,y,x] = act(scale[k] * S+ - negative_scale[k] * S- + bias[k])
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "basis_conv2d.h"

namespace basisconv {

// What the planes fix, and with them the packed lists; C is that of the input, K that of all groups.
struct TernaryConv2dWeights {
  int64_t C, K, R, S, groups;
};

struct TernaryConv2dParams {
  TernaryConv2dWeights weights;
  DType dtype;
  int64_t stride_h, stride_w, dilation_h, dilation_w;
  int64_t pad_top, pad_left;
  int64_t N, H, W, OH, OW;
  const void* input;
  int64_t input_stride_n, input_stride_c, input_stride_h, input_stride_w;  // elements
  const int32_t* words;         // instead of input: [N, bit_planes, H, W, words] of packed activations, or null
  int64_t bit_planes;           // of them
  bool signs;                   // one bit plane of -1 and +1; else codes, sum of 2^b * bit of plane b
  const char* packed;           // see csrc/cpu/ternary_conv2d_plan.h
  const float* scale;           // [K]
  const float* negative_scale;  // [K], or null where scale serves both signs
  const float* bias;            // [K]; zeros where the op has none
  void* output;                 // dense: [N, OH, OW, K] if channels_last, else [N, K, OH, OW]
  bool channels_last;
  Activation activation;
};

}  // namespace basisconv
