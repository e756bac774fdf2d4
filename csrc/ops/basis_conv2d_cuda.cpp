// Torch glue of basis_conv2d for CUDA tensors: check, fill the params, launch on the current stream, register. LibTorch
// stable ABI only; compiled against any torch, CPU-only ones too.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cuda/basis_conv2d.h"
#include "basis_conv2d_glue.h"
#include "cuda_stream.h"
#include "gradients_glue.h"

namespace basisconv {
namespace {

void launched(const char* wrong) { STD_TORCH_CHECK(wrong == nullptr, "basis_conv2d on CUDA: ", wrong); }

Tensor pack_on(const BasisConv2dWeights& w, const Tensor& basis_weight, const Tensor& coefficients, void* stream) {
  Tensor packed = torch::stable::empty({cuda_packed_bytes(w)}, ScalarType::Byte, std::nullopt, basis_weight.device());
  CudaPack pack{};
  pack.weights = w;
  pack.basis_weight = basis_weight.const_data_ptr();
  pack.coefficients = coefficients.const_data_ptr();
  for (int i = 0; i < 4; ++i) pack.basis_stride[i] = basis_weight.stride(i);
  for (int i = 0; i < 2; ++i) pack.coefficients_stride[i] = coefficients.stride(i);
  pack.packed = packed.mutable_data_ptr();
  launched(cuda_pack(pack, stream));
  return packed;
}

// What the kernels do not take must not be packed either: the layout of a packed weight is theirs.
void check_weights(const BasisConv2dWeights& w) {
  STD_TORCH_CHECK(w.dtype != DType::f32 && w.groups == w.mixing_groups,
                  "basis_conv2d on CUDA: bfloat16 and float16 only, and groups with coefficients [K, Q/groups] only");
}

Tensor pack(const Tensor& basis_weight, const Tensor& coefficients, const std::vector<int64_t>& stride,
            const std::vector<int64_t>& dilation, int64_t groups, bool precise, int64_t /*format*/) {
  STD_TORCH_CHECK(coefficients.device() == basis_weight.device(), "basis_conv2d_pack: the weights lie on two devices");
  const BasisConv2dWeights w = describe(basis_weight, coefficients, settings_of(stride, dilation, groups, precise));
  check_weights(w);
  const int32_t device = basis_weight.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  return pack_on(w, basis_weight, coefficients, current_cuda_stream(device));
}

int64_t packed_bytes(const std::vector<int64_t>& basis_weight_shape, const std::vector<int64_t>& coefficients_shape,
                     int64_t groups) {
  STD_TORCH_CHECK(basis_weight_shape.size() == 4 && coefficients_shape.size() == 2 && groups > 0,
                  "basis_conv2d_cuda_packed_bytes: two shapes and groups expected");
  BasisConv2dWeights w{};
  w.Q = basis_weight_shape[0];
  w.C = basis_weight_shape[1] * groups;
  w.R = basis_weight_shape[2];
  w.S = basis_weight_shape[3];
  w.K = coefficients_shape[0];
  w.groups = groups;
  w.mixing_groups = groups > 1 && coefficients_shape[1] != w.Q ? groups : 1;
  return cuda_packed_bytes(w);
}

FilledBasisConv2d run(const BasisConv2dCall& call, const Tensor* packed, bool keep_maps,
                      Memory memory = Memory::by_torch) {
  const Tensor& input = call.input;
  const torch::stable::Device device_of_input = input.device();
  const auto beside = [&](const Tensor& other) { return other.device() == device_of_input; };
  STD_TORCH_CHECK(beside(call.basis_weight) && beside(call.coefficients) && (!call.bias || beside(*call.bias)) &&
                      (!call.residual || beside(*call.residual)) && (!packed || beside(*packed)),
                  "basis_conv2d: all tensors must be on one device");
  FilledBasisConv2d filled = fill(call, keep_maps, memory);
  if (filled.params.N == 0) return filled;
  const BasisConv2dWeights& w = filled.params.weights;
  check_weights(w);
  const int32_t index = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  void* stream = current_cuda_stream(index);
  CudaDevice device{};
  launched(cuda_device(index, &device));
  CudaBasisConv2d launch{};
  std::optional<Tensor> offsets, own;
  if (call.bias) {
    offsets = torch::stable::contiguous(*call.bias);
    launch.bias = offsets->const_data_ptr();
  }
  if (packed) {
    STD_TORCH_CHECK(
        packed->scalar_type() == ScalarType::Byte && packed->is_contiguous() && packed->numel() == cuda_packed_bytes(w),
        "basis_conv2d: packed has ", packed->numel(), " bytes, these weights pack to ", cuda_packed_bytes(w),
        " on CUDA; call basis_conv2d_pack again");
    filled.params.packed = packed->const_data_ptr();
  } else {
    own = pack_on(w, call.basis_weight, call.coefficients, stream);
    filled.params.packed = own->const_data_ptr();
  }
  launch.params = filled.params;
  launched(cuda_basis_conv2d(launch, device, stream));
  return filled;
}

Tensor forward(const Tensor& input, const Tensor& basis_weight, const Tensor& coefficients,
               const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
               const std::optional<Tensor>& packed, const std::vector<int64_t>& stride,
               const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
               const std::optional<std::string>& activation, bool precise) {
  const BasisConv2dSettings settings = settings_of(stride, padding, dilation, groups, activation, precise);
  return run({input, basis_weight, coefficients, bias, residual, settings}, packed ? &*packed : nullptr, false).output;
}

std::tuple<Tensor, Tensor> forward_maps(const Tensor& input, const Tensor& basis_weight, const Tensor& coefficients,
                                        const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                                        const std::optional<Tensor>& packed, const std::vector<int64_t>& stride,
                                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                        int64_t groups, const std::optional<std::string>& activation, bool precise) {
  const BasisConv2dSettings settings = settings_of(stride, padding, dilation, groups, activation, precise);
  const FilledBasisConv2d filled =
      run({input, basis_weight, coefficients, bias, residual, settings}, packed ? &*packed : nullptr, true);
  return {filled.output, *filled.maps};
}

Tensor plan(const Tensor& input, const Tensor& basis_weight, const Tensor& coefficients,
            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
            const std::vector<int64_t>& dilation, int64_t groups, const std::optional<std::string>& activation,
            bool precise, bool any_layout) {
  const BasisConv2dSettings settings = settings_of(stride, padding, dilation, groups, activation, precise);
  const BasisConv2dWeights w = describe(basis_weight, coefficients, settings);
  return bytes_of(plan_of(input, basis_weight, coefficients, settings, any_layout, cuda_packed_bytes(w)));
}

Tensor planned(const Tensor& input, const Tensor& basis_weight, const Tensor& coefficients,
               const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, const Tensor& packed,
               const Tensor& plan) {
  const BasisConv2dPlan p = plan_for(input, basis_weight, coefficients, plan);
  return run({input, basis_weight, coefficients, bias, residual, p.settings}, &packed, false, Memory::raw).output;
}

}  // namespace
}  // namespace basisconv

STABLE_TORCH_LIBRARY_FRAGMENT(basisconv, m) {
  m.def("basis_conv2d_cuda_packed_bytes(int[] basis_weight_shape, int[] coefficients_shape, int groups) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CUDA, m) {
  m.impl("basis_conv2d", BASISCONV_BOX("basis_conv2d", &basisconv::forward));
  m.impl("basis_conv2d_maps", BASISCONV_BOX_FOR("basis_conv2d_maps", "basis_conv2d", &basisconv::forward_maps));
  m.impl("basis_conv2d_plan", TORCH_BOX(&basisconv::plan));
  m.impl("basis_conv2d_planned", TORCH_BOX(&basisconv::planned));
  m.impl("basis_conv2d_pack", BASISCONV_BOX_FOR("basis_conv2d_pack", "basis_conv2d", &basisconv::pack));
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CompositeExplicitAutograd, m) {
  m.impl("basis_conv2d_cuda_packed_bytes", TORCH_BOX(&basisconv::packed_bytes));
}
