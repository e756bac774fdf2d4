// The stream that torch computes on now.
#pragma once
#include <cstdint>

namespace basisconv {

// A cudaStream_t of this device. Raises under a torch without CUDA, which has no CUDA tensors either.
void* current_cuda_stream(int32_t device);

}  // namespace basisconv
