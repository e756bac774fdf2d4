// Torch glue of binary_conv2d: check, fill the params, launch, register. LibTorch stable ABI only.
//
// Python has checked already with better words; these checks protect memory where torch.ops, export or AOTInductor
// bypass Python.
#include "binary_conv2d.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "../cpu/binary_conv2d.h"
#include "../cpu/binary_conv2d_table.h"
#include "../cpu/bitpack.h"
#include "glue.h"

namespace basisconv {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMacsWorthAThread = 1 << 22;

CpuBinaryConv2d kernels_in_use() {
  const Isa isa = binary_isa_for(isa_in_use());
  // What was not compiled must not be named: it could not be linked.
  if constexpr (kWidestIsa >= Isa::avx512_vpopcntdq) {
    if (isa == Isa::avx512_vpopcntdq) return cpu_binary_conv2d_avx512_vpopcntdq();
  }
  if constexpr (kWidestIsa >= Isa::avx512) {
    if (isa == Isa::avx512) return cpu_binary_conv2d_avx512();
  }
  if constexpr (kWidestIsa >= Isa::avx2) {
    if (isa == Isa::avx2) return cpu_binary_conv2d_avx2();
  }
  return cpu_binary_conv2d_base();
}

// `weight` is real filters [K, C/groups, R, S], or words [K, 1, R, S, words_for(C/groups)].
BinaryConv2dWeights describe(const Tensor& weight, bool words, int64_t channels, int64_t groups) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == (words ? 5 : 4),
                  "binary_conv2d: weight must be [K, C/groups, R, S], or words [K, 1, R, S, n], on the CPU");
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

// The signs of the filters as words [K, R, S, words_for(C/groups)].
std::vector<uint32_t> sign_words(const BinaryConv2dWeights& w, const Tensor& weight, bool words) {
  const int64_t channels = w.C / w.groups;
  std::vector<uint32_t> found(w.K * w.R * w.S * words_for(channels));
  if (words) {
    std::memcpy(found.data(), weight.const_data_ptr(), found.size() * sizeof(uint32_t));
    return found;
  }
  // A double that rounds to -0 is still negative: compare before converting.
  if (weight.scalar_type() == ScalarType::Double) {
    const Tensor dense = torch::stable::contiguous(weight);
    const double* values = static_cast<const double*>(dense.const_data_ptr());
    const int64_t taps = w.R * w.S, size = words_for(channels);
    for (int64_t i = 0; i < w.K * channels * taps; i++) {
      const int64_t k = i / (channels * taps), c = i / taps % channels, t = i % taps;
      found[(k * taps + t) * size + c / kWordBits] |= static_cast<uint32_t>(values[i] >= 0.0) << (c % kWordBits);
    }
    return found;
  }
  BitpackParams p{};
  p.N = w.K;
  p.C = channels;
  p.H = w.R;
  p.W = w.S;
  p.planes = 1;
  p.type = weight.scalar_type() == ScalarType::Float      ? BitpackType::f32
           : weight.scalar_type() == ScalarType::BFloat16 ? BitpackType::bf16
                                                          : BitpackType::f16;
  p.input = weight.const_data_ptr();
  p.stride_n = weight.stride(0);
  p.stride_c = weight.stride(1);
  p.stride_h = weight.stride(2);
  p.stride_w = weight.stride(3);
  const std::vector<uint32_t> flip(words_for(channels), 0u);
  p.flip = flip.data();
  p.output = found.data();
  cpu_bitpack_base(p, 0, p.N * p.H);
  return found;
}

// `bytes` are zero.
void pack_into(const BinaryConv2dWeights& w, const Tensor& weight, bool words, char* bytes) {
  const Isa isa = isa_in_use();
  const BinaryPackHeader header = binary_pack_header(w, isa);
  std::memcpy(bytes, &header, sizeof(header));
  const BinaryPack layout = binary_pack(w, isa);
  char* counts = bytes + sizeof(header);
  kernels_in_use().pack(w, layout, sign_words(w, weight, words).data(), reinterpret_cast<int32_t*>(counts),
                        reinterpret_cast<uint8_t*>(counts + layout.counts_bytes));
}

Tensor pack(Tensor weight, bool words, int64_t channels, int64_t groups, int64_t format) {
  STD_TORCH_CHECK(format == kBinaryPackVersion, "binary_conv2d_pack: this library packs format ", kBinaryPackVersion,
                  ", the caller expects format ", format,
                  "; a program traced with another version must be traced again");
  const BinaryConv2dWeights w = describe(weight, words, channels, groups);
  Tensor packed = torch::stable::empty({binary_packed_bytes(w)}, ScalarType::Byte);
  char* bytes = static_cast<char*>(packed.mutable_data_ptr());
  std::memset(bytes, 0, packed.numel());
  pack_into(w, weight, words, bytes);
  return packed;
}

int64_t packed_bytes(int64_t K, int64_t R, int64_t S, int64_t channels, int64_t groups) {
  STD_TORCH_CHECK(K > 0 && R > 0 && S > 0 && channels > 0 && groups > 0, "binary_conv2d_packed_bytes: no empty sizes");
  return binary_packed_bytes(BinaryConv2dWeights{channels, K, R, S, groups});
}

Tensor as_float(const Tensor& t) {
  const Tensor dense = torch::stable::contiguous(t);
  return dense.scalar_type() == ScalarType::Float ? dense : torch::stable::to(dense, ScalarType::Float);
}

std::vector<float> factors(const std::optional<Tensor>& given, int64_t K, float otherwise, const char* name) {
  std::vector<float> values(K, otherwise);
  if (given) {
    STD_TORCH_CHECK(given->dim() == 1 && given->size(0) == K && given->is_cpu(), "binary_conv2d: ", name,
                    " must be [K] on the CPU");
    const Tensor dense = as_float(*given);
    std::memcpy(values.data(), dense.const_data_ptr(), K * sizeof(float));
  }
  return values;
}

struct OutputKind {
  BinaryOutput type;
  ScalarType scalar;
};

OutputKind output_kind(const std::string& name) {
  if (name == "int32") return {BinaryOutput::i32, ScalarType::Int};
  if (name == "packed") return {BinaryOutput::packed, ScalarType::Int};
  if (name == "float32") return {BinaryOutput::f32, ScalarType::Float};
  if (name == "bfloat16") return {BinaryOutput::bf16, ScalarType::BFloat16};
  STD_TORCH_CHECK(name == "float16", "binary_conv2d: output must be int32, packed, float32, bfloat16 or float16");
  return {BinaryOutput::f16, ScalarType::Half};
}

void fill_input(BinaryConv2dParams& p, const Tensor& input, const std::optional<std::string>& encoding) {
  p.planes = 1;
  if (encoding) {
    STD_TORCH_CHECK(*encoding == "sign" || *encoding == "unsigned", "binary_conv2d: encoding must be sign or unsigned");
    p.codes = *encoding == "unsigned";
    STD_TORCH_CHECK(input.dim() == 5 && input.is_cpu() && input.is_contiguous() &&
                        input.scalar_type() == ScalarType::Int && input.size(1) >= 1 &&
                        input.size(1) <= (p.codes ? 4 : 1) && input.size(4) == words_for(p.weights.C),
                    "binary_conv2d: packed input must be dense int32 words [N, planes, H, W, words] on the CPU");
    p.input_type = BinaryInput::packed;
    p.planes = static_cast<int32_t>(input.size(1));
    p.H = input.size(2);
    p.W = input.size(3);
  } else {
    STD_TORCH_CHECK(input.dim() == 4 && input.is_cpu() && input.size(1) == p.weights.C,
                    "binary_conv2d: input must be [N, C, H, W] on the CPU, with the channels of weight");
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

void fill_geometry(BinaryConv2dParams& p, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   int64_t padding_value, const std::vector<int64_t>& dilation) {
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

// A threshold [K] spread over the padded filters of all groups; what is behind a group's last filter is never stored.
template <typename T>
std::vector<int32_t> spread(const Tensor& values, const BinaryConv2dWeights& w, const BinaryPack& layout, int32_t set) {
  const Tensor dense = torch::stable::contiguous(values);
  const T* from = static_cast<const T*>(dense.const_data_ptr());
  std::vector<int32_t> to(w.groups * layout.padded, 0);
  const int64_t filters = w.K / w.groups;
  for (int64_t k = 0; k < w.K; k++) {
    to[k / filters * layout.padded + k % filters] = static_cast<int32_t>(from[k]) * set;
  }
  return to;
}

Tensor forward(Tensor input, Tensor weight, std::optional<Tensor> scale, std::optional<Tensor> bias,
               std::optional<Tensor> pixel_scale, std::optional<Tensor> threshold, std::optional<Tensor> flip,
               std::optional<Tensor> packed, std::vector<int64_t> stride, std::vector<int64_t> padding,
               int64_t padding_value, std::vector<int64_t> dilation, int64_t groups,
               std::optional<std::string> activation, std::string output, int64_t channels,
               std::optional<std::string> encoding, bool packed_weight) {
  BinaryConv2dParams p{};
  p.weights = describe(weight, packed_weight, channels, groups);
  const BinaryConv2dWeights& w = p.weights;
  fill_input(p, input, encoding);
  fill_geometry(p, stride, padding, padding_value, dilation);
  const int64_t most_sum = w.C / w.groups * w.R * w.S * (p.codes ? (1 << p.planes) - 1 : 1);
  STD_TORCH_CHECK(most_sum <= 0x1fffffff, "binary_conv2d: sums and their tables do not fit into int32");
  p.activation = !activation              ? BinaryActivation::none
                 : *activation == "relu"  ? BinaryActivation::relu
                 : *activation == "relu6" ? BinaryActivation::relu6
                                          : BinaryActivation::none;
  STD_TORCH_CHECK(!activation || p.activation != BinaryActivation::none,
                  "binary_conv2d: activation must be None, 'relu' or 'relu6'");
  const OutputKind kind = output_kind(output);
  p.output_type = kind.type;
  p.channels_last = encoding || is_channels_last(input);
  Tensor result =
      kind.type == BinaryOutput::packed
          ? torch::stable::empty({p.N, 1, p.OH, p.OW, words_for(w.K)}, kind.scalar)
          : torch::stable::empty({p.N, w.K, p.OH, p.OW}, kind.scalar, std::nullopt, std::nullopt, std::nullopt,
                                 p.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  p.output = result.mutable_data_ptr();
  std::vector<float> scales, biases;
  Tensor pixels;
  if (kind.type != BinaryOutput::i32 && kind.type != BinaryOutput::packed) {
    scales = factors(scale, w.K, 1.0f, "scale");
    biases = factors(bias, w.K, 0.0f, "bias");
    p.scale = scales.data();
    p.bias = biases.data();
    if (pixel_scale) {
      STD_TORCH_CHECK(pixel_scale->dim() == 4 && pixel_scale->size(0) == p.N && pixel_scale->size(1) == 1 &&
                          pixel_scale->size(2) == p.OH && pixel_scale->size(3) == p.OW && pixel_scale->is_cpu(),
                      "binary_conv2d: pixel_scale must be [N, 1, OH, OW] on the CPU");
      pixels = as_float(*pixel_scale);
      p.pixel_scale = static_cast<const float*>(pixels.const_data_ptr());
    }
  }
  STD_TORCH_CHECK(
      !threshold || (flip && threshold->dim() == 1 && flip->dim() == 1 && threshold->size(0) == w.K &&
                     flip->size(0) == w.K && threshold->is_cpu() && flip->is_cpu() &&
                     threshold->scalar_type() == ScalarType::Int && flip->scalar_type() == ScalarType::Bool),
      "binary_conv2d: threshold must be [K] in int32 and flip [K] in bool");
  if (p.N == 0) return result;

  const Isa isa = isa_in_use();
  const BinaryPack layout = binary_pack(w, isa);
  std::vector<char> own;
  const char* bytes;
  if (packed) {
    STD_TORCH_CHECK(packed->is_cpu() && packed->scalar_type() == ScalarType::Byte && packed->is_contiguous(),
                    "binary_conv2d: packed must be a contiguous uint8 tensor on the CPU");
    STD_TORCH_CHECK(packed->numel() == binary_packed_bytes(w), "binary_conv2d: packed has ", packed->numel(),
                    " bytes, these weights pack to ", binary_packed_bytes(w));
    bytes = static_cast<const char*>(packed->const_data_ptr());
    const BinaryPackHeader expected = binary_pack_header(w, isa);
    STD_TORCH_CHECK(std::memcmp(bytes, &expected, sizeof(expected)) == 0,
                    "binary_conv2d: packed was made for other weights, another geometry or another instruction set; "
                    "call binary_conv2d_pack again");
  } else {
    own.resize(binary_packed_bytes(w, isa));
    pack_into(w, weight, packed_weight, own.data());
    bytes = own.data();
  }
  p.packed = bytes + sizeof(BinaryPackHeader);

  const BinaryClasses rows = binary_classes(p.OH, p.stride_h, p.pad_top, p.dilation_h, w.R, p.H);
  const BinaryClasses columns = binary_classes(p.OW, p.stride_w, p.pad_left, p.dilation_w, w.S, p.W);
  const int64_t classes = static_cast<int64_t>(rows.lo.size() * columns.lo.size());
  std::vector<int32_t> table(classes * groups * layout.padded), flipped(groups * layout.padded, 0);
  binary_table(p, layout, rows, columns, static_cast<const int32_t*>(p.packed), table.data());
  if (kind.type == BinaryOutput::packed) {
    std::vector<int32_t> bounds(groups * layout.padded, 0);
    if (threshold) {
      bounds = spread<int32_t>(*threshold, w, layout, 1);
      flipped = spread<bool>(*flip, w, layout, -1);
    }
    binary_limits(layout, classes, groups, p.codes ? 1 : 2, bounds.data(), flipped.data(), table.data());
  }
  p.table = table.data();
  p.flip = flipped.data();
  p.row_class = rows.of.data();
  p.column_class = columns.of.data();
  p.column_classes = static_cast<int64_t>(columns.lo.size());

  const int64_t macs = p.N * p.OH * p.OW * p.planes * w.K * (w.C / w.groups) * w.R * w.S;
  const int64_t most = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t wanted = macs / kMacsWorthAThread;
  const int64_t threads = wanted < 1 ? 1 : wanted < most ? wanted : most;
  const BinaryPlan plan = binary_plan(p, layout, threads);
  const CpuBinaryConv2d kernels = kernels_in_use();
  torch::stable::parallel_for(0, plan.units, (plan.units + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    kernels.run(p, plan, static_cast<uint8_t*>(thread_memory(plan.scratch_bytes)), begin, end);
  });
  return result;
}

}  // namespace
}  // namespace basisconv

STABLE_TORCH_LIBRARY_FRAGMENT(basisconv, m) {
  m.def(
      "binary_conv2d(Tensor input, Tensor weight, Tensor? scale, Tensor? bias, Tensor? pixel_scale, Tensor? threshold, "
      "Tensor? flip, Tensor? packed, int[] stride, int[] padding, int padding_value, int[] dilation, int groups, "
      "str? activation, str output, int channels, str? encoding, bool packed_weight) -> Tensor");
  m.def("binary_conv2d_pack(Tensor weight, bool words, int channels, int groups, int format) -> Tensor");
  m.def("binary_conv2d_packed_bytes(int K, int R, int S, int channels, int groups) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CPU, m) {
  m.impl("binary_conv2d", TORCH_BOX(&basisconv::forward));
  m.impl("binary_conv2d_pack", TORCH_BOX(&basisconv::pack));
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CompositeExplicitAutograd, m) {
  m.impl("binary_conv2d_packed_bytes", TORCH_BOX(&basisconv::packed_bytes));
}
