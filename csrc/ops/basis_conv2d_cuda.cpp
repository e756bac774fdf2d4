// Torch glue of basis_conv2d for CUDA tensors: check, fill the params, launch on the current stream, register. LibTorch
// stable ABI only; compiled against any torch, CPU-only ones too.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cuda/basis_conv2d.h"
#include "basis_conv2d_glue.h"
#include "cuda_stream.h"

namespace basisconv {
namespace {

void launched(const char* wrong) { STD_TORCH_CHECK(wrong == nullptr, "basis_conv2d on CUDA: ", wrong); }

bool beside(const Tensor& input, const std::optional<Tensor>& other) {
  return !other || other->device() == input.device();
}

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

Tensor pack(Tensor basis_weight, Tensor coefficients, std::vector<int64_t> stride, std::vector<int64_t> dilation,
            int64_t groups, bool precise, int64_t /*format*/) {
  STD_TORCH_CHECK(coefficients.device() == basis_weight.device(), "basis_conv2d_pack: the weights lie on two devices");
  const BasisConv2dWeights w = describe(basis_weight, coefficients, stride, dilation, groups, precise);
  check_weights(w);
  const int32_t device = basis_weight.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  return pack_on(w, basis_weight, coefficients, current_cuda_stream(device));
}

int64_t packed_bytes(std::vector<int64_t> basis_weight_shape, std::vector<int64_t> coefficients_shape, int64_t groups) {
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

std::tuple<Tensor, Tensor> run(const Tensor& input, const Tensor& basis_weight, const Tensor& coefficients,
                               const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                               const std::optional<Tensor>& packed, const std::vector<int64_t>& stride,
                               const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                               int64_t groups, const std::optional<std::string>& activation, bool precise,
                               bool keep_maps) {
  STD_TORCH_CHECK(beside(input, basis_weight) && beside(input, coefficients) && beside(input, bias) &&
                      beside(input, residual) && beside(input, packed),
                  "basis_conv2d: all tensors must be on one device");
  FilledBasisConv2d filled =
      fill({input, basis_weight, coefficients, bias, residual, stride, padding, dilation, groups, activation, precise},
           keep_maps);
  if (filled.params.N == 0) return {filled.output, filled.maps};
  const BasisConv2dWeights& w = filled.params.weights;
  check_weights(w);
  const int32_t index = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  void* stream = current_cuda_stream(index);
  CudaDevice device{};
  launched(cuda_device(index, &device));
  CudaBasisConv2d call{};
  Tensor offsets, own;
  if (bias) {
    offsets = torch::stable::contiguous(*bias);
    call.bias = offsets.const_data_ptr();
  }
  if (packed) {
    STD_TORCH_CHECK(
        packed->scalar_type() == ScalarType::Byte && packed->is_contiguous() && packed->numel() == cuda_packed_bytes(w),
        "basis_conv2d: packed has ", packed->numel(), " bytes, these weights pack to ", cuda_packed_bytes(w),
        " on CUDA; call basis_conv2d_pack again");
    filled.params.packed = packed->const_data_ptr();
  } else {
    own = pack_on(w, basis_weight, coefficients, stream);
    filled.params.packed = own.const_data_ptr();
  }
  call.params = filled.params;
  launched(cuda_basis_conv2d(call, device, stream));
  return {filled.output, filled.maps};
}

Tensor forward(Tensor input, Tensor basis_weight, Tensor coefficients, std::optional<Tensor> bias,
               std::optional<Tensor> residual, std::optional<Tensor> packed, std::vector<int64_t> stride,
               std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
               std::optional<std::string> activation, bool precise) {
  return std::get<0>(run(input, basis_weight, coefficients, bias, residual, packed, stride, padding, dilation, groups,
                         activation, precise, false));
}

std::tuple<Tensor, Tensor> forward_maps(Tensor input, Tensor basis_weight, Tensor coefficients,
                                        std::optional<Tensor> bias, std::optional<Tensor> residual,
                                        std::optional<Tensor> packed, std::vector<int64_t> stride,
                                        std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                                        std::optional<std::string> activation, bool precise) {
  return run(input, basis_weight, coefficients, bias, residual, packed, stride, padding, dilation, groups, activation,
             precise, true);
}

}  // namespace
}  // namespace basisconv

STABLE_TORCH_LIBRARY_FRAGMENT(basisconv, m) {
  m.def("basis_conv2d_cuda_packed_bytes(int[] basis_weight_shape, int[] coefficients_shape, int groups) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CUDA, m) {
  m.impl("basis_conv2d", TORCH_BOX(&basisconv::forward));
  m.impl("basis_conv2d_maps", TORCH_BOX(&basisconv::forward_maps));
  m.impl("basis_conv2d_pack", TORCH_BOX(&basisconv::pack));
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CompositeExplicitAutograd, m) {
  m.impl("basis_conv2d_cuda_packed_bytes", TORCH_BOX(&basisconv::packed_bytes));
}
