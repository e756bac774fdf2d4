// Torch glue of bitpack for CUDA tensors: check, launch on the current stream, register. LibTorch stable ABI only.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../cuda/bitpack.h"
#include "bitpack_glue.h"
#include "cuda_stream.h"
#include "gradients_glue.h"

namespace basisconv {
namespace {

Tensor bitpack(Tensor input, std::optional<Tensor> threshold, std::optional<Tensor> flip, int64_t bits, bool codes) {
  STD_TORCH_CHECK((!threshold || threshold->device() == input.device()) && (!flip || flip->device() == input.device()),
                  "bitpack: all tensors must be on one device");
  const int32_t device = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const FilledBitpack filled = fill_bitpack(input, threshold, flip, bits, codes);
  CudaBitpack call{};
  call.params = filled.params;
  if (threshold) call.flip = static_cast<const bool*>(filled.flip.const_data_ptr());
  const char* wrong = cuda_bitpack(call, current_cuda_stream(device));
  STD_TORCH_CHECK(wrong == nullptr, "bitpack on CUDA: ", wrong);
  return filled.output;
}

}  // namespace
}  // namespace basisconv

STABLE_TORCH_LIBRARY_IMPL(basisconv, CUDA, m) { m.impl("bitpack", BASISCONV_BOX("bitpack", &basisconv::bitpack)); }
