// Torch glue of tucker_conv2d in one pass on CUDA: check, fill the params, launch on the current stream, register.
// LibTorch stable ABI only; compiled against any torch, CPU-only ones too.
//
// Python has checked already with better words; these checks protect memory where torch.ops, export or AOTInductor
// bypass Python.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../cuda/tucker_conv2d.h"
#include "basis_conv2d_glue.h"
#include "cuda_stream.h"
#include "gradients_glue.h"

namespace basisconv {
namespace {

void launched(const char* wrong) { STD_TORCH_CHECK(wrong == nullptr, "tucker_conv2d in one pass: ", wrong); }

// Everything but the pointers and the sizes of a batch.
CudaTuckerConv2d chain(int64_t channels, const BasisConv2dWeights& w) {
  CudaTuckerConv2d call{};
  call.channels = channels;
  call.rest.params.weights = w;
  return call;
}

Tensor forward(const Tensor& input, const Tensor& u_in, const Tensor& core, const Tensor& u_out,
               const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, const Tensor& packed,
               const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
               const std::vector<int64_t>& dilation, const std::optional<std::string>& activation) {
  const BasisConv2dSettings settings = settings_of(stride, padding, dilation, 1, activation, false);
  const auto beside = [&](const Tensor& other) { return other.device() == input.device(); };
  STD_TORCH_CHECK(beside(u_in) && beside(core) && beside(u_out) && beside(packed) && (!bias || beside(*bias)) &&
                      (!residual || beside(*residual)),
                  "tucker_conv2d: all tensors must be on one device");
  const BasisConv2dWeights w = describe(core, u_out, settings);
  STD_TORCH_CHECK(input.dim() == 4 && u_in.dim() == 2 && u_in.size(0) == input.size(1) && u_in.size(1) == w.C,
                  "tucker_conv2d: input must be [N, C, H, W] and u_in [C, rank_in], core [rank_out, rank_in, R, S]");
  const ScalarType type = input.scalar_type();
  STD_TORCH_CHECK(w.dtype != DType::f32 && core.scalar_type() == type && u_in.scalar_type() == type &&
                      (!bias || (bias->scalar_type() == type && bias->dim() == 1 && bias->size(0) == w.K)),
                  "tucker_conv2d in one pass: all tensors must be bfloat16, or all float16, and bias [K]");
  STD_TORCH_CHECK(padding[0] >= 0 && padding[1] >= 0 && padding[2] >= 0 && padding[3] >= 0,
                  "tucker_conv2d: padding must be (top, bottom, left, right), none negative");
  CudaTuckerConv2d call = chain(input.size(1), w);
  BasisConv2dParams& p = call.rest.params;
  p.N = input.size(0);
  p.H = input.size(2);
  p.W = input.size(3);
  p.pad_top = padding[0];
  p.pad_left = padding[2];
  const int64_t free_h = p.H + padding[0] + padding[1] - w.dilation_h * (w.R - 1) - 1;
  const int64_t free_w = p.W + padding[2] + padding[3] - w.dilation_w * (w.S - 1) - 1;
  STD_TORCH_CHECK(free_h >= 0 && free_w >= 0, "tucker_conv2d: the padded input is smaller than the dilated kernel");
  p.OH = free_h / w.stride_h + 1;
  p.OW = free_w / w.stride_w + 1;
  p.activation = static_cast<Activation>(settings.activation);
  p.channels_last = is_channels_last(input);
  const MapSizes sizes = {p.N, w.K, p.OH, p.OW};
  Tensor output = empty_maps(input, type, sizes, p.channels_last, Memory::by_torch);
  if (output.numel() == 0) return output;

  const int32_t index = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  p.input = input.const_data_ptr();
  p.input_stride_n = input.stride(0);
  p.input_stride_c = input.stride(1);
  p.input_stride_h = input.stride(2);
  p.input_stride_w = input.stride(3);
  p.output = output.mutable_data_ptr();
  call.u_in = u_in.const_data_ptr();
  for (int i = 0; i < 2; ++i) call.u_in_strides[i] = u_in.stride(i);
  STD_TORCH_CHECK(
      packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() && packed.numel() == cuda_packed_bytes(w),
      "tucker_conv2d: packed has ", packed.numel(), " bytes, these weights pack to ", cuda_packed_bytes(w),
      " on CUDA; call tucker_conv2d_pack again");
  p.packed = packed.const_data_ptr();
  std::optional<Tensor> offsets, added;
  if (bias) {
    offsets = torch::stable::contiguous(*bias);
    call.rest.bias = offsets->const_data_ptr();
  }
  if (residual) {
    bool same = residual->dim() == 4 && residual->scalar_type() == type;
    for (int i = 0; same && i < 4; ++i) same = residual->size(i) == sizes[i];
    STD_TORCH_CHECK(same, "tucker_conv2d: residual must be [N, K, OH, OW] in the dtype of input");
    added = dense_maps(*residual, p.channels_last);
    p.residual = added->const_data_ptr();
  }
  CudaDevice device{};
  launched(cuda_device(index, &device));
  launched(cuda_tucker_conv2d(call, device, current_cuda_stream(index)));
  return output;
}

// Why weights cannot run in one pass on a device with this much shared memory, "" where they can: for a choice that
// sees no batch.
std::string reason(const std::vector<int64_t>& core_shape, int64_t channels, const std::vector<int64_t>& stride,
                   const std::vector<int64_t>& dilation, int64_t capability, int64_t shared_bytes) {
  STD_TORCH_CHECK(core_shape.size() == 4 && stride.size() == 2 && dilation.size() == 2,
                  "tucker_conv2d_one_pass_reason: a shape of four sizes and two pairs expected");
  BasisConv2dWeights w{};
  w.Q = core_shape[0];
  w.C = core_shape[1];
  w.R = core_shape[2];
  w.S = core_shape[3];
  w.K = 1;
  w.stride_h = stride[0];
  w.stride_w = stride[1];
  w.dilation_h = dilation[0];
  w.dilation_w = dilation[1];
  w.groups = w.mixing_groups = 1;
  w.dtype = DType::bf16;
  CudaTuckerConv2d call = chain(channels, w);
  BasisConv2dParams& p = call.rest.params;
  p.N = p.H = p.W = p.OH = p.OW = 1;
  const CudaDevice device{static_cast<int>(capability), static_cast<int>(shared_bytes), 1};
  const char* found = cuda_tucker_reason(call, device);
  return found == nullptr ? "" : found;
}

}  // namespace
}  // namespace basisconv

STABLE_TORCH_LIBRARY_FRAGMENT(basisconv, m) {
  m.def(
      "tucker_conv2d_one_pass(Tensor input, Tensor u_in, Tensor core, Tensor u_out, Tensor? bias, Tensor? residual, "
      "Tensor packed, int[] stride, int[] padding, int[] dilation, str? activation) -> Tensor");
  m.def(
      "tucker_conv2d_one_pass_reason(int[] core_shape, int channels, int[] stride, int[] dilation, int capability, "
      "int shared_bytes) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CUDA, m) {
  m.impl("tucker_conv2d_one_pass", BASISCONV_BOX_FOR("tucker_conv2d_one_pass", "tucker_conv2d", &basisconv::forward));
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CompositeExplicitAutograd, m) {
  m.impl("tucker_conv2d_one_pass_reason", TORCH_BOX(&basisconv::reason));
}
