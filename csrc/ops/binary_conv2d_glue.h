// What the torch glue of binary_conv2d has in common for all devices: checks and the filling of the params. Included by
// csrc/ops/*.cpp alone; LibTorch stable ABI only.
#pragma once
#include "binary_conv2d.h"
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

// `weight` is real filters [K, C/groups, R, S], or words [K, 1, R, S, words_for(C/groups)].
inline BinaryConv2dWeights describe(const Tensor& weight, bool words, int64_t channels, int64_t groups) {
  STD_TORCH_CHECK(weight.dim() == (words ? 5 : 4),
                  "binary_conv2d: weight must be [K, C/groups, R, S], or words [K, 1, R, S, n]");
  STD_TORCH_CHECK(groups > 0 && channels > 0 && channels % groups == 0 && weight.size(0) % groups == 0,
                  "binary_conv2d: channels and K must be divisible by groups");
  BinaryConv2dWeights w{};
  w.C = channels;
  w.K = weight.size(0);
  w.R = weight.size(2);
  w.S = weight.size(3);
  w.groups = groups;
  STD_TORCH_CHECK(w.K > 0 && w.R > 0 && w.S > 0, "binary_conv2d: weight must not be empty");
  if (words) {
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Int && weight.is_contiguous() && weight.size(1) == 1 &&
                        weight.size(4) == words_for(channels / groups),
                    "binary_conv2d: packed weight must be dense int32 words of one plane of C/groups channels");
  } else {
    STD_TORCH_CHECK(weight.size(1) == channels / groups, "binary_conv2d: weight has ", weight.size(1),
                    " channels a filter, input and groups ask for ", channels / groups);
    const ScalarType type = weight.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
                        type == ScalarType::Double,
                    "binary_conv2d: weight must be real numbers or words");
  }
  return w;
}

struct OutputKind {
  BinaryOutput type;
  ScalarType scalar;
};

inline OutputKind output_kind(const std::string& name) {
  if (name == "int32") return {BinaryOutput::i32, ScalarType::Int};
  if (name == "packed") return {BinaryOutput::packed, ScalarType::Int};
  if (name == "float32") return {BinaryOutput::f32, ScalarType::Float};
  if (name == "bfloat16") return {BinaryOutput::bf16, ScalarType::BFloat16};
  STD_TORCH_CHECK(name == "float16", "binary_conv2d: output must be int32, packed, float32, bfloat16 or float16");
  return {BinaryOutput::f16, ScalarType::Half};
}

inline void fill_input(BinaryConv2dParams& p, const Tensor& input, const std::optional<std::string>& encoding) {
  p.planes = 1;
  if (encoding) {
    STD_TORCH_CHECK(*encoding == "sign" || *encoding == "unsigned", "binary_conv2d: encoding must be sign or unsigned");
    p.codes = *encoding == "unsigned";
    STD_TORCH_CHECK(input.dim() == 5 && input.is_contiguous() && input.scalar_type() == ScalarType::Int &&
                        input.size(1) >= 1 && input.size(1) <= (p.codes ? 4 : 1) &&
                        input.size(4) == words_for(p.weights.C),
                    "binary_conv2d: packed input must be dense int32 words [N, planes, H, W, words]");
    p.input_type = BinaryInput::packed;
    p.planes = static_cast<int32_t>(input.size(1));
    p.H = input.size(2);
    p.W = input.size(3);
  } else {
    STD_TORCH_CHECK(input.dim() == 4 && input.size(1) == p.weights.C,
                    "binary_conv2d: input must be [N, C, H, W], with the channels of weight");
    const ScalarType type = input.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                    "binary_conv2d: a real input must be float32, bfloat16 or float16 in the native op");
    p.input_type = type == ScalarType::Float      ? BinaryInput::f32
                   : type == ScalarType::BFloat16 ? BinaryInput::bf16
                                                  : BinaryInput::f16;
    p.H = input.size(2);
    p.W = input.size(3);
    p.input_stride_n = input.stride(0);
    p.input_stride_c = input.stride(1);
    p.input_stride_h = input.stride(2);
    p.input_stride_w = input.stride(3);
  }
  p.N = input.size(0);
  p.input = input.const_data_ptr();
}

inline void fill_geometry(BinaryConv2dParams& p, const std::vector<int64_t>& stride,
                          const std::vector<int64_t>& padding, int64_t padding_value,
                          const std::vector<int64_t>& dilation) {
  STD_TORCH_CHECK(stride.size() == 2 && dilation.size() == 2 && stride[0] > 0 && stride[1] > 0 && dilation[0] > 0 &&
                      dilation[1] > 0,
                  "binary_conv2d: stride and dilation must be pairs of at least 1");
  STD_TORCH_CHECK(padding.size() == 4 && padding[0] >= 0 && padding[1] >= 0 && padding[2] >= 0 && padding[3] >= 0,
                  "binary_conv2d: padding must be (top, bottom, left, right), none negative");
  STD_TORCH_CHECK(padding_value >= -1 && padding_value <= 1 && !(p.codes && padding_value != 0),
                  "binary_conv2d: padding_value must be 0, 1 or -1, and 0 for codes");
  p.stride_h = stride[0];
  p.stride_w = stride[1];
  p.dilation_h = dilation[0];
  p.dilation_w = dilation[1];
  p.pad_top = padding[0];
  p.pad_left = padding[2];
  p.padding_value = static_cast<int32_t>(padding_value);
  const int64_t free_h = p.H + padding[0] + padding[1] - p.dilation_h * (p.weights.R - 1) - 1;
  const int64_t free_w = p.W + padding[2] + padding[3] - p.dilation_w * (p.weights.S - 1) - 1;
  STD_TORCH_CHECK(free_h >= 0 && free_w >= 0, "binary_conv2d: the padded input is smaller than the dilated kernel");
  p.OH = free_h / p.stride_h + 1;
  p.OW = free_w / p.stride_w + 1;
}

inline BinaryActivation binary_activation(const std::optional<std::string>& name) {
  const BinaryActivation found = !name              ? BinaryActivation::none
                                 : *name == "relu"  ? BinaryActivation::relu
                                 : *name == "relu6" ? BinaryActivation::relu6
                                                    : BinaryActivation::none;
  STD_TORCH_CHECK(!name || found != BinaryActivation::none,
                  "binary_conv2d: activation must be None, 'relu' or 'relu6'");
  return found;
}

// The result on the device of `input`; channels_last where the params say so.
inline Tensor fresh_output(const BinaryConv2dParams& p, const OutputKind& kind, const Tensor& input) {
  if (kind.type == BinaryOutput::packed) {
    return torch::stable::empty({p.N, 1, p.OH, p.OW, words_for(p.weights.K)}, kind.scalar, std::nullopt,
                                input.device());
  }
  return torch::stable::empty({p.N, p.weights.K, p.OH, p.OW}, kind.scalar, std::nullopt, input.device(), std::nullopt,
                              p.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline void check_sums(const BinaryConv2dParams& p) {
  const BinaryConv2dWeights& w = p.weights;
  const int64_t most_sum = w.C / w.groups * w.R * w.S * (p.codes ? (1 << p.planes) - 1 : 1);
  STD_TORCH_CHECK(most_sum <= 0x1fffffff, "binary_conv2d: sums and their tables do not fit into int32");
}

inline void check_threshold(const std::optional<Tensor>& threshold, const std::optional<Tensor>& flip, int64_t K) {
  STD_TORCH_CHECK(!threshold || (flip && threshold->dim() == 1 && flip->dim() == 1 && threshold->size(0) == K &&
                                 flip->size(0) == K && threshold->scalar_type() == ScalarType::Int &&
                                 flip->scalar_type() == ScalarType::Bool),
                  "binary_conv2d: threshold must be [K] in int32 and flip [K] in bool");
}

inline void check_pixel_scale(const BinaryConv2dParams& p, const Tensor& pixel_scale) {
  STD_TORCH_CHECK(pixel_scale.dim() == 4 && pixel_scale.size(0) == p.N && pixel_scale.size(1) == 1 &&
                      pixel_scale.size(2) == p.OH && pixel_scale.size(3) == p.OW,
                  "binary_conv2d: pixel_scale must be [N, 1, OH, OW]");
}

}  // namespace basisconv
