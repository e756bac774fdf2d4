// Torch glue of ternary_conv2d, what ternary_conv2d and stacked_binary_conv2d run on a GPU with real activations:
// check, fill the params, launch on the current stream, register. LibTorch stable ABI only; compiled against any torch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <vector>

#include "../cuda/ternary_conv2d.h"
#include "cuda_stream.h"
#include "glue.h"
#include "gradients_glue.h"
#include "torch_glue.h"

namespace basisconv {
namespace {

void launched(const char* wrong) { STD_TORCH_CHECK(wrong == nullptr, "ternary_conv2d on CUDA: ", wrong); }

CudaTernaryWeights weights_of(int64_t K, int64_t C, const std::vector<int64_t>& kernel) {
  STD_TORCH_CHECK(kernel.size() == 2 && K > 0 && C > 0 && kernel[0] > 0 && kernel[1] > 0,
                  "ternary_conv2d: filters must be some, of some channels and taps");
  return {C, K, kernel[0], kernel[1]};
}

// Planes [K, 1 or 2, R, S, ceil(channels / 32)] of int32: the signs, or which are +1 and which are -1.
Tensor pack(const Tensor& planes, int64_t channels) {
  STD_TORCH_CHECK(planes.dim() == 5 && planes.scalar_type() == ScalarType::Int && channels > 0 &&
                      (planes.size(1) == 1 || planes.size(1) == 2) && planes.size(4) == (channels + 31) / 32,
                  "ternary_conv2d_cuda_pack: planes must be int32 [K, 1 or 2, R, S, ceil(channels / 32)]");
  const CudaTernaryWeights w = weights_of(planes.size(0), channels, {planes.size(2), planes.size(3)});
  const int32_t index = planes.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const Tensor dense = planes.is_contiguous() ? planes : torch::stable::contiguous(planes);
  Tensor packed = torch::stable::empty({cuda_ternary_packed_bytes(w)}, ScalarType::Byte, std::nullopt, planes.device());
  launched(cuda_ternary_pack(w, static_cast<const uint32_t*>(dense.const_data_ptr()), static_cast<int>(planes.size(1)),
                             packed.mutable_data_ptr(), current_cuda_stream(index)));
  return packed;
}

int64_t packed_bytes(int64_t K, int64_t channels, const std::vector<int64_t>& kernel) {
  return cuda_ternary_packed_bytes(weights_of(K, channels, kernel));
}

CudaTernaryFactor factor(const std::optional<Tensor>& given, const Tensor& input, int64_t K, bool may_be_one,
                         Tensor& kept, const char* name) {
  if (!given) return {nullptr, false, false};
  // One number, or one that Python has spread over the outputs.
  const bool spread = given->dim() == 1 && given->size(0) == K && given->stride(0) == 0;
  const bool one = may_be_one && (spread || (given->numel() == 1 && given->dim() <= 1));
  const bool is_float = given->scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK((one || (given->dim() == 1 && given->size(0) == K)) && given->device() == input.device() &&
                      (is_float || given->scalar_type() == input.scalar_type()),
                  "ternary_conv2d: ", name, " must be [K] in float32 or in the dtype of input, on its device");
  kept = one || given->is_contiguous() ? *given : torch::stable::contiguous(*given);
  return {kept.const_data_ptr(), one, is_float};
}

// The maps as the kernel reads them: channels_last, pixels at multiples of 16 bytes; a copy where they lie otherwise.
Tensor readable(const Tensor& given) {
  bool as_is = is_channels_last(given) && given.stride(1) == 1;
  for (const int dim : {0, 2, 3}) as_is = as_is && given.stride(dim) % 8 == 0;
  if (as_is && reinterpret_cast<uintptr_t>(given.const_data_ptr()) % 16 == 0) return given;
  Tensor copy = empty_maps(given, given.scalar_type(), {given.size(0), given.size(1), given.size(2), given.size(3)},
                           true, Memory::by_torch);
  torch::stable::copy_(copy, given);
  return copy;
}

Tensor forward(const Tensor& given, const Tensor& packed, const std::optional<Tensor>& scale,
               const std::optional<Tensor>& bias, int64_t K, const std::vector<int64_t>& kernel,
               const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
               const std::vector<int64_t>& dilation, const std::optional<std::string>& activation) {
  STD_TORCH_CHECK(given.dim() == 4, "ternary_conv2d: input must be [N, C, H, W]");
  CudaTernaryConv2d call{};
  call.weights = weights_of(K, given.size(1), kernel);
  const CudaTernaryWeights& w = call.weights;
  const ScalarType type = given.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "ternary_conv2d on CUDA: input must be bfloat16 or float16");
  call.dtype = type == ScalarType::BFloat16 ? DType::bf16 : DType::f16;
  STD_TORCH_CHECK(given.size(1) % 8 == 0, "ternary_conv2d on CUDA: the channels of input must be a multiple of 8");
  STD_TORCH_CHECK(stride.size() == 2 && dilation.size() == 2 && padding.size() == 4 && stride[0] > 0 && stride[1] > 0 &&
                      dilation[0] > 0 && dilation[1] > 0,
                  "ternary_conv2d: stride and dilation must be two numbers of at least 1, padding four");
  STD_TORCH_CHECK(padding[0] >= 0 && padding[1] >= 0 && padding[2] >= 0 && padding[3] >= 0,
                  "ternary_conv2d: padding must be (top, bottom, left, right), none negative");
  STD_TORCH_CHECK(!activation || *activation == "relu" || *activation == "relu6",
                  "ternary_conv2d: activation must be None, 'relu' or 'relu6'");
  call.stride_h = stride[0], call.stride_w = stride[1];
  call.dilation_h = dilation[0], call.dilation_w = dilation[1];
  call.pad_top = padding[0], call.pad_left = padding[2];
  call.N = given.size(0), call.H = given.size(2), call.W = given.size(3);
  const int64_t free_h = call.H + padding[0] + padding[1] - call.dilation_h * (w.R - 1) - 1;
  const int64_t free_w = call.W + padding[2] + padding[3] - call.dilation_w * (w.S - 1) - 1;
  STD_TORCH_CHECK(free_h >= 0 && free_w >= 0, "ternary_conv2d: the padded input is smaller than the dilated kernel");
  call.OH = free_h / call.stride_h + 1;
  call.OW = free_w / call.stride_w + 1;
  call.activation = !activation ? Activation::none : *activation == "relu" ? Activation::relu : Activation::relu6;
  STD_TORCH_CHECK(packed.device() == given.device() && packed.scalar_type() == ScalarType::Byte &&
                      packed.is_contiguous() && packed.numel() == cuda_ternary_packed_bytes(w),
                  "ternary_conv2d: packed has ", packed.numel(), " bytes, these filters pack to ",
                  cuda_ternary_packed_bytes(w), " on CUDA; call ternary_conv2d_cuda_pack again");
  call.packed = packed.const_data_ptr();
  Tensor scales, biases;
  call.scale = factor(scale, given, w.K, true, scales, "scale");
  call.bias = factor(bias, given, w.K, false, biases, "bias");
  const int32_t index = given.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const bool channels_last = is_channels_last(given);
  Tensor output =
      empty_maps(given, type, {call.N, w.K, call.OH, call.OW}, channels_last || call.N > 0, Memory::by_torch);
  if (call.N == 0) return output;
  const Tensor input = readable(given);
  call.input = input.const_data_ptr();
  call.input_stride_n = input.stride(0), call.input_stride_h = input.stride(2), call.input_stride_w = input.stride(3);
  call.output = output.mutable_data_ptr();
  CudaDevice device{};
  launched(cuda_device(index, &device));
  launched(cuda_ternary_conv2d(call, device, current_cuda_stream(index)));
  return channels_last ? output : torch::stable::contiguous(output);
}

}  // namespace
}  // namespace basisconv

STABLE_TORCH_LIBRARY_FRAGMENT(basisconv, m) {
  m.def(
      "ternary_conv2d_cuda(Tensor input, Tensor packed, Tensor? scale, Tensor? bias, int K, int[] kernel, int[] "
      "stride, "
      "int[] padding, int[] dilation, str? activation) -> Tensor");
  m.def("ternary_conv2d_cuda_pack(Tensor planes, int channels) -> Tensor");
  m.def("ternary_conv2d_cuda_packed_bytes(int K, int channels, int[] kernel) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CUDA, m) {
  m.impl("ternary_conv2d_cuda", BASISCONV_BOX_FOR("ternary_conv2d_cuda", "ternary_conv2d", &basisconv::forward));
  m.impl("ternary_conv2d_cuda_pack", BASISCONV_BOX_FOR("ternary_conv2d_cuda_pack", "ternary_conv2d", &basisconv::pack));
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CompositeExplicitAutograd, m) {
  m.impl("ternary_conv2d_cuda_packed_bytes", TORCH_BOX(&basisconv::packed_bytes));
}
