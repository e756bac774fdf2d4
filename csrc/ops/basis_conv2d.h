// The contract of basis_conv2d between the torch glue and the kernels: a torch-free params struct.
//
//   z[n,q,y,x] = sum_{c,r,s} F[q,c,r,s] * input[n, c, y*sh + r*dh - top, x*sw + s*dw - left]
//   out[n,k,y,x] = act(bias[k] + sum_q A[k,q] * z[n,q,y,x] + residual[n,k,y,x])
#pragma once
#include <cstdint>

#include "../common/dtype.h"

namespace basisconv {

enum class Activation : int32_t { none = 0, relu = 1, relu6 = 2 };

// What the weights and the geometry fix: enough to pack, and one such value for all batch and map sizes.
struct BasisConv2dWeights {
  int64_t C, Q, K, R, S;
  int64_t stride_h, stride_w, dilation_h, dilation_w;
  int64_t groups;         // of the R*S convolution
  int64_t mixing_groups;  // of the 1x1: groups for compact coefficients [K, Q/groups], else 1
  DType dtype;
  bool precise;  // no Winograd; z is not rounded to a 16-bit dtype
};

struct BasisConv2dParams {
  BasisConv2dWeights weights;
  int64_t N, H, W, OH, OW;
  int64_t pad_top, pad_left;
  const void* input;
  int64_t input_stride_n, input_stride_c, input_stride_h, input_stride_w;  // elements
  const void* packed;                                                      // see csrc/cpu/basis_conv2d_plan.h
  const float* bias;                                                       // [K]; zeros where the op has none
  const void* residual;  // dense, in the layout of the output, or null
  void* output;          // dense: [N, OH, OW, K] if channels_last, else [N, K, OH, OW]
  void* maps;            // z for the backward, [N, OH, OW, Q] or [N, Q, OH, OW] like the output; or null
  bool channels_last;    // of output, residual and maps; the input has strides of its own
  Activation activation;
};

}  // namespace basisconv
