// The CUDA kernel of bitpack, free of torch: what the glue calls. All pointers are device memory.
#pragma once
#include "../ops/bitpack.h"

namespace basisconv {

struct CudaBitpack {
  BitpackParams params;  // `flip` is not looked at
  const bool* flip;      // [C]: channels that compare with <=; read with a threshold only
};

// Null when launched on the stream (a cudaStream_t), else why not. Sizes must be below 2^29.
const char* cuda_bitpack(const CudaBitpack& call, void* stream);

}  // namespace basisconv
