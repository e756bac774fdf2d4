// What the torch glue of basis_conv2d has in common for all devices: checks and the filling of the params. Included by
// csrc/ops/*.cpp alone; LibTorch stable ABI only.
#pragma once
#include "basis_conv2d.h"
#include "glue.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

namespace basisconv {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, "basis_conv2d: ", name, " must be float32, bfloat16 or float16 in the native op");
  }
}

inline BasisConv2dWeights describe(const Tensor& basis_weight, const Tensor& coefficients,
                                   const std::vector<int64_t>& stride, const std::vector<int64_t>& dilation,
                                   int64_t groups, bool precise) {
  STD_TORCH_CHECK(basis_weight.dim() == 4, "basis_conv2d: basis_weight must be [Q, C/groups, R, S]");
  STD_TORCH_CHECK(coefficients.dim() == 2, "basis_conv2d: coefficients must be [K, Q] or [K, Q/groups]");
  STD_TORCH_CHECK(stride.size() == 2 && dilation.size() == 2, "basis_conv2d: stride and dilation must have two values");
  STD_TORCH_CHECK(stride[0] > 0 && stride[1] > 0 && dilation[0] > 0 && dilation[1] > 0 && groups > 0,
                  "basis_conv2d: stride, dilation and groups must be at least 1");
  BasisConv2dWeights w{};
  w.dtype = dtype_of(basis_weight, "basis_weight");
  STD_TORCH_CHECK(coefficients.scalar_type() == basis_weight.scalar_type(),
                  "basis_conv2d: coefficients must have the dtype of basis_weight");
  w.Q = basis_weight.size(0);
  w.C = basis_weight.size(1) * groups;
  w.R = basis_weight.size(2);
  w.S = basis_weight.size(3);
  w.K = coefficients.size(0);
  STD_TORCH_CHECK(w.Q > 0 && w.C > 0 && w.R > 0 && w.S > 0 && w.K > 0, "basis_conv2d: the weights must not be empty");
  STD_TORCH_CHECK(w.Q % groups == 0, "basis_conv2d: Q must be divisible by groups");
  w.groups = groups;
  w.mixing_groups = groups > 1 && coefficients.size(1) != w.Q ? groups : 1;
  STD_TORCH_CHECK(coefficients.size(1) == w.Q / w.mixing_groups && w.K % w.mixing_groups == 0,
                  "basis_conv2d: coefficients must be [K, Q] or [K, Q/groups]");
  w.stride_h = stride[0];
  w.stride_w = stride[1];
  w.dilation_h = dilation[0];
  w.dilation_w = dilation[1];
  w.precise = precise;
  return w;
}

// The tensors and settings of a call, as torch hands them over.
struct BasisConv2dCall {
  const Tensor& input;
  const Tensor& basis_weight;
  const Tensor& coefficients;
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& residual;
  const std::vector<int64_t>& stride;
  const std::vector<int64_t>& padding;
  const std::vector<int64_t>& dilation;
  int64_t groups;
  const std::optional<std::string>& activation;
  bool precise;
};

// Params with the results that they point to.
struct FilledBasisConv2d {
  BasisConv2dParams params;  // without `packed` and `bias`
  Tensor output, maps, residual;
};

// Checks everything but where the tensors are, allocates the results beside input and fills the params.
inline FilledBasisConv2d fill(const BasisConv2dCall& call, bool keep_maps) {
  const Tensor& input = call.input;
  const std::vector<int64_t>& padding = call.padding;
  FilledBasisConv2d filled;
  BasisConv2dParams& p = filled.params = {};
  p.weights = describe(call.basis_weight, call.coefficients, call.stride, call.dilation, call.groups, call.precise);
  const BasisConv2dWeights& w = p.weights;
  STD_TORCH_CHECK(input.dim() == 4, "basis_conv2d: input must be [N, C, H, W]");
  STD_TORCH_CHECK(input.scalar_type() == call.basis_weight.scalar_type(),
                  "basis_conv2d: input must have the dtype of basis_weight");
  STD_TORCH_CHECK(input.size(1) == w.C, "basis_conv2d: input has ", input.size(1), " channels, the basis takes ", w.C);
  STD_TORCH_CHECK(padding.size() == 4 && padding[0] >= 0 && padding[1] >= 0 && padding[2] >= 0 && padding[3] >= 0,
                  "basis_conv2d: padding must be (top, bottom, left, right), none negative");
  p.N = input.size(0);
  p.H = input.size(2);
  p.W = input.size(3);
  p.pad_top = padding[0];
  p.pad_left = padding[2];
  const int64_t free_h = p.H + padding[0] + padding[1] - w.dilation_h * (w.R - 1) - 1;
  const int64_t free_w = p.W + padding[2] + padding[3] - w.dilation_w * (w.S - 1) - 1;
  STD_TORCH_CHECK(free_h >= 0 && free_w >= 0, "basis_conv2d: the padded input is smaller than the dilated kernel");
  p.OH = free_h / w.stride_h + 1;
  p.OW = free_w / w.stride_w + 1;
  p.activation = !call.activation              ? Activation::none
                 : *call.activation == "relu"  ? Activation::relu
                 : *call.activation == "relu6" ? Activation::relu6
                                               : Activation::none;
  STD_TORCH_CHECK(!call.activation || p.activation != Activation::none,
                  "basis_conv2d: activation must be None, 'relu' or 'relu6'");

  p.channels_last = is_channels_last(input);
  const MemoryFormat format = p.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  const auto fresh = [&](int64_t channels) {
    return torch::stable::empty({p.N, channels, p.OH, p.OW}, input.scalar_type(), std::nullopt, input.device(),
                                std::nullopt, format);
  };
  filled.output = fresh(w.K);
  p.output = filled.output.mutable_data_ptr();
  if (keep_maps) {
    filled.maps = fresh(w.Q);
    p.maps = filled.maps.mutable_data_ptr();
  }
  p.input = input.const_data_ptr();
  p.input_stride_n = input.stride(0);
  p.input_stride_c = input.stride(1);
  p.input_stride_h = input.stride(2);
  p.input_stride_w = input.stride(3);

  if (call.bias) {
    STD_TORCH_CHECK(
        call.bias->dim() == 1 && call.bias->size(0) == w.K && call.bias->scalar_type() == input.scalar_type(),
        "basis_conv2d: bias must be [K] in the dtype of input");
  }
  if (call.residual) {
    const Tensor& residual = *call.residual;
    STD_TORCH_CHECK(residual.dim() == 4 && residual.size(0) == p.N && residual.size(1) == w.K &&
                        residual.size(2) == p.OH && residual.size(3) == p.OW &&
                        residual.scalar_type() == input.scalar_type(),
                    "basis_conv2d: residual must be [N, K, OH, OW] in the dtype of input");
    filled.residual = torch::stable::contiguous(residual, format);
    p.residual = filled.residual.const_data_ptr();
  }
  return filled;
}

}  // namespace basisconv
