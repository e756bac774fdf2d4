// The torch glue of binary_conv2d up to the params, for all devices: what torch hands over, checked. Included by
// csrc/ops/*.cpp alone; LibTorch stable ABI only.
#pragma once
#include "binary_conv2d.h"
#include "bitpack.h"
#include "glue.h"
#include "torch_glue.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

namespace basisconv {

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

// The arguments of a call that are no tensors, as numbers alone.
struct BinarySettings {
  int64_t stride[2], padding[4], dilation[2];  // padding: top, bottom, left, right
  int64_t padding_value, groups, channels;
  int64_t activation, output;  // numbers of BinaryActivation and BinaryOutput
  int64_t encoding;            // of the input: 0 real, 1 signs, 2 unsigned codes
  int64_t packed_weight;
};

inline BinaryOutput output_type(const std::string& name) {
  if (name == "int32") return BinaryOutput::i32;
  if (name == "packed") return BinaryOutput::packed;
  if (name == "float32") return BinaryOutput::f32;
  if (name == "bfloat16") return BinaryOutput::bf16;
  STD_TORCH_CHECK(name == "float16", "binary_conv2d: output must be int32, packed, float32, bfloat16 or float16");
  return BinaryOutput::f16;
}

inline ScalarType scalar_of(BinaryOutput type) {
  switch (type) {
    case BinaryOutput::f32:
      return ScalarType::Float;
    case BinaryOutput::bf16:
      return ScalarType::BFloat16;
    case BinaryOutput::f16:
      return ScalarType::Half;
    default:
      return ScalarType::Int;
  }
}

inline BinarySettings settings_of(const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                  int64_t padding_value, const std::vector<int64_t>& dilation, int64_t groups,
                                  const std::optional<std::string>& activation, const std::string& output,
                                  int64_t channels, const std::optional<std::string>& encoding, bool packed_weight) {
  STD_TORCH_CHECK(stride.size() == 2 && dilation.size() == 2 && padding.size() == 4,
                  "binary_conv2d: stride and dilation must be pairs, padding (top, bottom, left, right)");
  STD_TORCH_CHECK(!activation || *activation == "relu" || *activation == "relu6",
                  "binary_conv2d: activation must be None, 'relu' or 'relu6'");
  STD_TORCH_CHECK(!encoding || *encoding == "sign" || *encoding == "unsigned",
                  "binary_conv2d: encoding must be sign or unsigned");
  BinarySettings s{};
  std::copy(stride.begin(), stride.end(), s.stride);
  std::copy(padding.begin(), padding.end(), s.padding);
  std::copy(dilation.begin(), dilation.end(), s.dilation);
  s.padding_value = padding_value;
  s.groups = groups;
  s.channels = channels;
  s.activation = static_cast<int64_t>(!activation             ? BinaryActivation::none
                                      : *activation == "relu" ? BinaryActivation::relu
                                                              : BinaryActivation::relu6);
  s.output = static_cast<int64_t>(output_type(output));
  s.encoding = !encoding ? 0 : *encoding == "sign" ? 1 : 2;
  s.packed_weight = packed_weight;
  return s;
}

inline void fill_input(BinaryConv2dParams& p, const Tensor& input, int64_t encoding) {
  STD_TORCH_CHECK(encoding >= 0 && encoding <= 2, "binary_conv2d: no encoding has the number ", encoding);
  p.planes = 1;
  if (encoding != 0) {
    p.codes = encoding == 2;
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

inline void fill_settings(BinaryConv2dParams& p, const BinarySettings& s) {
  STD_TORCH_CHECK(s.stride[0] > 0 && s.stride[1] > 0 && s.dilation[0] > 0 && s.dilation[1] > 0,
                  "binary_conv2d: stride and dilation must be pairs of at least 1");
  STD_TORCH_CHECK(s.padding[0] >= 0 && s.padding[1] >= 0 && s.padding[2] >= 0 && s.padding[3] >= 0,
                  "binary_conv2d: padding must be (top, bottom, left, right), none negative");
  STD_TORCH_CHECK(s.padding_value >= -1 && s.padding_value <= 1 && !(p.codes && s.padding_value != 0),
                  "binary_conv2d: padding_value must be 0, 1 or -1, and 0 for codes");
  STD_TORCH_CHECK(s.activation >= 0 && s.activation <= static_cast<int64_t>(BinaryActivation::relu6) && s.output >= 0 &&
                      s.output <= static_cast<int64_t>(BinaryOutput::f16),
                  "binary_conv2d: no activation or output has this number");
  p.stride_h = s.stride[0];
  p.stride_w = s.stride[1];
  p.dilation_h = s.dilation[0];
  p.dilation_w = s.dilation[1];
  p.pad_top = s.padding[0];
  p.pad_left = s.padding[2];
  p.padding_value = static_cast<int32_t>(s.padding_value);
  p.activation = static_cast<BinaryActivation>(s.activation);
  p.output_type = static_cast<BinaryOutput>(s.output);
  const int64_t free_h = p.H + s.padding[0] + s.padding[1] - p.dilation_h * (p.weights.R - 1) - 1;
  const int64_t free_w = p.W + s.padding[2] + s.padding[3] - p.dilation_w * (p.weights.S - 1) - 1;
  STD_TORCH_CHECK(free_h >= 0 && free_w >= 0, "binary_conv2d: the padded input is smaller than the dilated kernel");
  p.OH = free_h / p.stride_h + 1;
  p.OW = free_w / p.stride_w + 1;
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

// The tensors of a call, as torch hands them over.
struct BinaryCall {
  const Tensor& input;
  const Tensor& weight;
  const std::optional<Tensor>& scale;
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& pixel_scale;
  const std::optional<Tensor>& threshold;
  const std::optional<Tensor>& flip;
};

// --- plans of repeated calls, see docs/dispatch.md -------------------------------------------------------------------

// A call in one tensor of bytes, as in basis_conv2d.cpp: the settings, and what its maker saw of the tensors.
struct BinaryPlanned {
  BinarySettings settings;
  int64_t weight[5], planes, channels_last;
  int64_t types[7];  // of the tensors in the order of BinaryCall, -1 where there is none
};

inline BinaryPlanned seen(const BinaryCall& call, const BinarySettings& settings) {
  BinaryPlanned s{};
  s.settings = settings;
  const int64_t dims = settings.packed_weight ? 5 : 4, input_dims = settings.encoding ? 5 : 4;
  STD_TORCH_CHECK(call.weight.dim() == dims && call.input.dim() == input_dims,
                  "binary_conv2d_planned: input or weight has another number of dimensions");
  for (int64_t i = 0; i < dims; ++i) s.weight[i] = call.weight.size(i);
  s.planes = settings.encoding ? call.input.size(1) : 0;
  s.channels_last = settings.encoding || is_channels_last(call.input);
  const auto type = [](const std::optional<Tensor>& t) { return t ? static_cast<int64_t>(t->scalar_type()) : -1; };
  s.types[0] = static_cast<int64_t>(call.input.scalar_type());
  s.types[1] = static_cast<int64_t>(call.weight.scalar_type());
  s.types[2] = type(call.scale);
  s.types[3] = type(call.bias);
  s.types[4] = type(call.pixel_scale);
  s.types[5] = type(call.threshold);
  s.types[6] = type(call.flip);
  return s;
}

// The settings of a plan, if it fits the tensors.
inline BinarySettings settings_for(const BinaryCall& call, const Tensor& plan) {
  const BinaryPlanned p = from_bytes<BinaryPlanned>(plan, "binary_conv2d");
  const BinaryPlanned now = seen(call, p.settings);
  STD_TORCH_CHECK(std::memcmp(&now, &p, sizeof(p)) == 0,
                  "binary_conv2d_planned: plan was made for other dtypes, another layout or other weights");
  return p.settings;
}

// --- the torch ops, around what a device runs ------------------------------------------------------------------------

using BinaryRun = Tensor (*)(const BinaryCall&, const Tensor* packed, const BinarySettings&, Memory);

template <BinaryRun run>
Tensor binary_forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& scale,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& pixel_scale,
                      const std::optional<Tensor>& threshold, const std::optional<Tensor>& flip,
                      const std::optional<Tensor>& packed, const std::vector<int64_t>& stride,
                      const std::vector<int64_t>& padding, int64_t padding_value, const std::vector<int64_t>& dilation,
                      int64_t groups, const std::optional<std::string>& activation, const std::string& output,
                      int64_t channels, const std::optional<std::string>& encoding, bool packed_weight) {
  const BinarySettings settings = settings_of(stride, padding, padding_value, dilation, groups, activation, output,
                                              channels, encoding, packed_weight);
  return run({input, weight, scale, bias, pixel_scale, threshold, flip}, packed ? &*packed : nullptr, settings,
             Memory::by_torch);
}

inline Tensor binary_call_plan(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& scale,
                               const std::optional<Tensor>& bias, const std::optional<Tensor>& pixel_scale,
                               const std::optional<Tensor>& threshold, const std::optional<Tensor>& flip,
                               const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                               int64_t padding_value, const std::vector<int64_t>& dilation, int64_t groups,
                               const std::optional<std::string>& activation, const std::string& output,
                               int64_t channels, const std::optional<std::string>& encoding, bool packed_weight) {
  const BinarySettings settings = settings_of(stride, padding, padding_value, dilation, groups, activation, output,
                                              channels, encoding, packed_weight);
  return bytes_of(seen({input, weight, scale, bias, pixel_scale, threshold, flip}, settings));
}

template <BinaryRun run>
Tensor binary_planned(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& scale,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& pixel_scale,
                      const std::optional<Tensor>& threshold, const std::optional<Tensor>& flip, const Tensor& packed,
                      const Tensor& plan) {
  const BinaryCall call{input, weight, scale, bias, pixel_scale, threshold, flip};
  return run(call, &packed, settings_for(call, plan), Memory::raw);
}

}  // namespace basisconv
