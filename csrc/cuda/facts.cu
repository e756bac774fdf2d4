// What the CUDA runtime says of a device, asked once.
#include <atomic>
#include <utility>

#include "facts.h"

namespace basisconv {

const char* cuda_device(int index, CudaDevice* found) {
  constexpr int most = 64;
  static CudaDevice known[most];
  static std::atomic<bool> asked[most];
  if (index < 0 || index >= most) return "no such device";
  if (!asked[index].load(std::memory_order_acquire)) {
    int major = 0, minor = 0, shared_bytes = 0, multiprocessors = 0;
    for (const auto& [value, attribute] :
         {std::pair{&major, cudaDevAttrComputeCapabilityMajor}, std::pair{&minor, cudaDevAttrComputeCapabilityMinor},
          std::pair{&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin},
          std::pair{&multiprocessors, cudaDevAttrMultiProcessorCount}}) {
      const cudaError_t error = cudaDeviceGetAttribute(value, attribute, index);
      if (error != cudaSuccess) return cudaGetErrorString(error);
    }
    known[index] = {major * 10 + minor, shared_bytes, multiprocessors};  // two threads write the same
    asked[index].store(true, std::memory_order_release);
  }
  *found = known[index];
  return nullptr;
}

}  // namespace basisconv
