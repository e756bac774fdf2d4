// The one symbol of torch that only its CUDA builds have. It is weak, so that the library loads everywhere.
#include "cuda_stream.h"

#include <torch/headeronly/util/Exception.h>

extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace basisconv {

void* current_cuda_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "basis_conv2d: this torch was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0,
                  "basis_conv2d: torch has no current stream");
  return stream;
}

}  // namespace basisconv
