// The CUDA kernels of binary_conv2d, free of torch: what the glue calls. All pointers are device memory.
#pragma once
#include "../ops/binary_conv2d.h"
#include "facts.h"

namespace basisconv {

enum class FactorType : int32_t { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

// Numbers of any float type, dense; null where there are none.
struct CudaFactor {
  const void* values;
  FactorType type;
};

struct CudaBinaryConv2d {
  // Of its pointers only `input`, `packed` and `output` count; the input is packed, weights begin with the tag.
  BinaryConv2dParams params;
  CudaFactor scale;          // [K]
  CudaFactor bias;           // [K]
  CudaFactor pixel_scale;    // [N, OH, OW]
  const int32_t* threshold;  // [K]; null is 0
  const bool* flip;          // [K]; with a threshold
};

// Why the kernels cannot run a call, null where they can.
const char* cuda_binary_reason(const CudaBinaryConv2d& call, const CudaDevice& device);
// Whether packed output is possible: groups must end where bytes do. Else take whole numbers and bitpack them.
bool cuda_binary_packs_output(const BinaryConv2dWeights& weights);

// Bytes of packed weights: a tag of 64 bytes, tables and tiles, see binary_conv2d_problem.h. The same for every device.
int64_t cuda_binary_packed_bytes(const BinaryConv2dWeights& weights);
// Sign words [K, R, S, words_for(C/groups)] → packed. Null when launched on the stream (a cudaStream_t), else why not.
const char* cuda_binary_pack(const BinaryConv2dWeights& weights, const uint32_t* words, void* packed, void* stream);

// Null when launched on the stream, else why not. Asks nothing of the device and allocates nothing. Packed weights that
// were made for others give what no sum is everywhere: NaN, -2^31, or bits that are all 0. Only the device could
// compare them, and nobody waits for it.
const char* cuda_binary_conv2d(const CudaBinaryConv2d& call, const CudaDevice& device, void* stream);

}  // namespace basisconv
