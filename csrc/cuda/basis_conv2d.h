// The CUDA kernels of basis_conv2d, free of torch: what the glue calls. All pointers are device memory.
#pragma once
#include "../ops/basis_conv2d.h"
#include "facts.h"

namespace basisconv {

struct CudaBasisConv2d {
  BasisConv2dParams params;  // `packed` begins with the tag; `bias` is not looked at
  const void* bias;          // [K] in the dtype, dense, or null
};

enum class CudaVariant : int32_t { none = 0, sm80 = 1, sm90a = 2 };

// The kernel for a call, none with the reason where there is none; `reason` may be null. `tensor_maps` is false where
// the library was built without sm_90a.
CudaVariant cuda_variant(const CudaBasisConv2d& call, const CudaDevice& device, const char** reason);

// Bytes of packed weights: a tag of 64 bytes, then tiles as the kernels want them in shared memory, see
// basis_conv2d_problem.h. The same for every device.
int64_t cuda_packed_bytes(const BasisConv2dWeights& weights);

// Weights at any strides (elements) → packed. Null when launched on the stream (a cudaStream_t), else why not.
struct CudaPack {
  BasisConv2dWeights weights;
  const void* basis_weight;  // [Q, C/groups, R, S]
  int64_t basis_stride[4];
  const void* coefficients;  // [K, Q or Q/groups]
  int64_t coefficients_stride[2];
  void* packed;
};
const char* cuda_pack(const CudaPack& pack, void* stream);

// Null when launched on the stream, else why not. Asks nothing of the device and allocates nothing. Packed weights that
// were made for others give NaN everywhere: only the device could compare them, and nobody waits for it.
const char* cuda_basis_conv2d(const CudaBasisConv2d& call, const CudaDevice& device, void* stream);

// One variant, for tests.
const char* cuda_basis_conv2d_sm80(const CudaBasisConv2d& call, const CudaDevice& device, void* stream);
const char* cuda_basis_conv2d_sm90a(const CudaBasisConv2d& call, const CudaDevice& device, void* stream);

}  // namespace basisconv
