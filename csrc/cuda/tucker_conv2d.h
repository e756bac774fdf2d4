// tucker_conv2d in one pass on CUDA, free of torch: what the glue calls. All pointers are device memory.
#pragma once
#include "basis_conv2d.h"

namespace basisconv {

struct CudaTuckerConv2d {
  // What follows the first 1x1: core and u_out as basis and coefficients, so weights.C is rank_in; packed by cuda_pack.
  // `input` and its strides are those of the image with `channels` channels.
  CudaBasisConv2d rest;
  int64_t channels;
  const void* u_in;         // [channels, rank_in]
  int64_t u_in_strides[2];  // elements
};

// Why a call cannot run in one pass on a device; null where it can.
const char* cuda_tucker_reason(const CudaTuckerConv2d& call, const CudaDevice& device);

// Null when launched on the stream, else why not. As cuda_basis_conv2d.
const char* cuda_tucker_conv2d(const CudaTuckerConv2d& call, const CudaDevice& device, void* stream);

}  // namespace basisconv
