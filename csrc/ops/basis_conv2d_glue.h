// What the torch glue of basis_conv2d has in common for all devices: checks and the filling of the params. Included by
// csrc/ops/*.cpp alone; LibTorch stable ABI only.
#pragma once
#include "basis_conv2d.h"
#include "glue.h"
#include "torch_glue.h"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace basisconv {

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

// The arguments of a call that are no tensors, as numbers alone.
struct BasisConv2dSettings {
  int64_t stride[2], padding[4], dilation[2];  // padding: top, bottom, left, right
  int64_t groups, activation, precise;
};

inline void fill_pair(int64_t (&to)[2], const std::vector<int64_t>& from, const char* name) {
  STD_TORCH_CHECK(from.size() == 2, "basis_conv2d: ", name, " must have two values");
  to[0] = from[0];
  to[1] = from[1];
}

// Of the weights alone: padding and activation belong to a call.
inline BasisConv2dSettings settings_of(const std::vector<int64_t>& stride, const std::vector<int64_t>& dilation,
                                       int64_t groups, bool precise) {
  BasisConv2dSettings s{};
  fill_pair(s.stride, stride, "stride");
  fill_pair(s.dilation, dilation, "dilation");
  s.groups = groups;
  s.precise = precise;
  return s;
}

inline BasisConv2dSettings settings_of(const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                       const std::vector<int64_t>& dilation, int64_t groups,
                                       const std::optional<std::string>& activation, bool precise) {
  BasisConv2dSettings s = settings_of(stride, dilation, groups, precise);
  STD_TORCH_CHECK(padding.size() == 4, "basis_conv2d: padding must be (top, bottom, left, right)");
  std::copy(padding.begin(), padding.end(), s.padding);
  STD_TORCH_CHECK(!activation || *activation == "relu" || *activation == "relu6",
                  "basis_conv2d: activation must be None, 'relu' or 'relu6'");
  const Activation code = !activation ? Activation::none : *activation == "relu" ? Activation::relu : Activation::relu6;
  s.activation = static_cast<int64_t>(code);
  return s;
}

inline BasisConv2dWeights describe(const Tensor& basis_weight, const Tensor& coefficients,
                                   const BasisConv2dSettings& settings) {
  const auto& [stride, padding, dilation, groups, activation, precise] = settings;
  STD_TORCH_CHECK(basis_weight.dim() == 4, "basis_conv2d: basis_weight must be [Q, C/groups, R, S]");
  STD_TORCH_CHECK(coefficients.dim() == 2, "basis_conv2d: coefficients must be [K, Q] or [K, Q/groups]");
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
  w.precise = precise != 0;
  return w;
}

// The tensors and settings of a call, as torch hands them over.
struct BasisConv2dCall {
  const Tensor& input;
  const Tensor& basis_weight;
  const Tensor& coefficients;
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& residual;
  const BasisConv2dSettings& settings;
};

// Params with the tensors that they point to.
struct FilledBasisConv2d {
  BasisConv2dParams params;  // without `packed` and `bias`
  Tensor output;
  std::optional<Tensor> maps, residual;
};

// Checks everything but where the tensors are, allocates the results beside input and fills the params.
inline FilledBasisConv2d fill(const BasisConv2dCall& call, bool keep_maps, Memory memory) {
  const Tensor& input = call.input;
  const int64_t(&padding)[4] = call.settings.padding;
  BasisConv2dParams p{};
  p.weights = describe(call.basis_weight, call.coefficients, call.settings);
  const BasisConv2dWeights& w = p.weights;
  STD_TORCH_CHECK(input.dim() == 4, "basis_conv2d: input must be [N, C, H, W]");
  STD_TORCH_CHECK(input.scalar_type() == call.basis_weight.scalar_type(),
                  "basis_conv2d: input must have the dtype of basis_weight");
  STD_TORCH_CHECK(input.size(1) == w.C, "basis_conv2d: input has ", input.size(1), " channels, the basis takes ", w.C);
  STD_TORCH_CHECK(padding[0] >= 0 && padding[1] >= 0 && padding[2] >= 0 && padding[3] >= 0,
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
  STD_TORCH_CHECK(call.settings.activation >= 0 && call.settings.activation <= static_cast<int64_t>(Activation::relu6),
                  "basis_conv2d: no activation has the number ", call.settings.activation);
  p.activation = static_cast<Activation>(call.settings.activation);

  p.channels_last = is_channels_last(input);
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
  std::optional<Tensor> kept;
  if (call.residual) {
    const Tensor& residual = *call.residual;
    STD_TORCH_CHECK(residual.dim() == 4 && residual.size(0) == p.N && residual.size(1) == w.K &&
                        residual.size(2) == p.OH && residual.size(3) == p.OW &&
                        residual.scalar_type() == input.scalar_type(),
                    "basis_conv2d: residual must be [N, K, OH, OW] in the dtype of input");
    kept = dense_maps(residual, p.channels_last);
    p.residual = kept->const_data_ptr();
  }
  std::optional<Tensor> maps;
  if (keep_maps) {
    maps = empty_maps(input, input.scalar_type(), {p.N, w.Q, p.OH, p.OW}, p.channels_last, memory);
    p.maps = maps->mutable_data_ptr();
  }
  Tensor output = empty_maps(input, input.scalar_type(), {p.N, w.K, p.OH, p.OW}, p.channels_last, memory);
  p.output = output.mutable_data_ptr();
  return {p, std::move(output), std::move(maps), std::move(kept)};
}

// --- plans of repeated calls, see docs/dispatch.md -------------------------------------------------------------------

// A call in one tensor of bytes. Torch takes half a microsecond to hand over a list or a string and a tenth for a
// tensor: a repeated call of a small layer is as fast again so. It states what its maker saw, beside the settings; a
// call that looks different is refused, since another backend might be the right one for it.
constexpr int64_t kAnyLayout = -1;
struct BasisConv2dPlan {
  BasisConv2dSettings settings;
  int64_t filters[4], coefficients[2];  // sizes
  int64_t dtype, channels_last;         // of input; channels_last is kAnyLayout where it does not matter
  int64_t packed_bytes;                 // on the device of the call
};

inline BasisConv2dPlan plan_of(const Tensor& input, const Tensor& basis_weight, const Tensor& coefficients,
                               const BasisConv2dSettings& settings, bool any_layout, int64_t packed_bytes) {
  BasisConv2dPlan made{};
  made.settings = settings;
  STD_TORCH_CHECK(input.dim() == 4, "basis_conv2d: input must be [N, C, H, W]");
  for (int i = 0; i < 4; ++i) made.filters[i] = basis_weight.size(i);
  for (int i = 0; i < 2; ++i) made.coefficients[i] = coefficients.size(i);
  made.dtype = static_cast<int64_t>(dtype_of(input, "input"));
  made.channels_last = any_layout ? kAnyLayout : is_channels_last(input);
  made.packed_bytes = packed_bytes;
  return made;
}

// The plan of these bytes, if it fits the tensors.
inline BasisConv2dPlan plan_for(const Tensor& input, const Tensor& basis_weight, const Tensor& coefficients,
                                const Tensor& bytes) {
  const BasisConv2dPlan p = from_bytes<BasisConv2dPlan>(bytes, "basis_conv2d");
  bool same = input.dim() == 4 && basis_weight.dim() == 4 && coefficients.dim() == 2;
  for (int i = 0; i < 4 && same; ++i) same = p.filters[i] == basis_weight.size(i);
  for (int i = 0; i < 2 && same; ++i) same = p.coefficients[i] == coefficients.size(i);
  STD_TORCH_CHECK(same && p.dtype == static_cast<int64_t>(dtype_of(input, "input")) &&
                      (p.channels_last == kAnyLayout || p.channels_last == is_channels_last(input)),
                  "basis_conv2d_planned: plan was made for another dtype, layout or other weights");
  return p;
}

}  // namespace basisconv
