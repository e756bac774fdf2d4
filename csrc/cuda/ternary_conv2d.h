// A convolution of real numbers with filters of -1, 0 and +1 on CUDA, free of torch: what the glue calls. Ternary
// filters, stacked binary ones and those of one bit are the same to it.
//
//   out[n,k,y,x] = act(scale[k] * sum_{c,r,s} w[k,c,r,s] * input[n, c, y*sh + r*dh - top, x*sw + s*dw - left] +
//   bias[k])
//
// Sums, scale and bias are float32; one rounding.
#pragma once
#include "../ops/basis_conv2d.h"
#include "facts.h"

namespace basisconv {

struct CudaTernaryWeights {
  int64_t C, K, R, S;
};

// A number for each output, or one for all of them.
struct CudaTernaryFactor {
  const void* values;  // in the dtype of the call or in float32; or null
  bool one, is_float;
};

struct CudaTernaryConv2d {
  CudaTernaryWeights weights;
  DType dtype;  // bfloat16 or float16, of input and output
  int64_t stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
  int64_t N, H, W, OH, OW;
  const void* input;                                       // channels lie side by side
  int64_t input_stride_n, input_stride_h, input_stride_w;  // elements
  const void* packed;
  CudaTernaryFactor scale, bias;
  void* output;  // dense [N, OH, OW, K]
  Activation activation;
};

// Bytes of packed filters: a tag of 64 bytes, then tiles as the kernel wants them in shared memory. The numbers lie
// there as -2, 0 and +2, which have the same bits in bfloat16 and in float16.
int64_t cuda_ternary_packed_bytes(const CudaTernaryWeights& weights);

// Bit planes [K, planes, R, S, ceil(C / 32)] -> packed. Two planes: which weights are +1, which are -1. One: the bit 1
// is +1, the bit 0 is -1. Null when launched on the stream (a cudaStream_t), else why not.
const char* cuda_ternary_pack(const CudaTernaryWeights& weights, const uint32_t* words, int planes, void* packed,
                              void* stream);

// Why the kernel does not take a call; null where it does.
const char* cuda_ternary_reason(const CudaTernaryConv2d& call, const CudaDevice& device);

// Null when launched on the stream, else why not. Asks nothing of the device and allocates nothing. Packed filters of
// another size give NaN everywhere: only the device could compare them, and nobody waits for it.
const char* cuda_ternary_conv2d(const CudaTernaryConv2d& call, const CudaDevice& device, void* stream);

}  // namespace basisconv
