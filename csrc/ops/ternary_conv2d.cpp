// Torch glue of ternary_conv2d: check, fill the params, launch, register. LibTorch stable ABI only.
//
// Python has checked already with better words; these checks protect memory where torch.ops, export or AOTInductor
// bypass Python.
#include "ternary_conv2d.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "../cpu/isa.h"
#include "../cpu/ternary_conv2d.h"
#include "glue.h"
#include "gradients_glue.h"
#include "shim_glue.h"
#include "torch_glue.h"

namespace basisconv {
namespace {

constexpr int64_t kMacsWorthAThread = 1 << 19;

CpuTernaryConv2d ternary_kernels() {
  // What was not compiled must not be named: it could not be linked.
  const Isa isa = isa_in_use();
  if constexpr (kWidestIsa >= Isa::avx512) {
    if (isa >= Isa::avx512) return cpu_ternary_conv2d_avx512();
  }
  if constexpr (kWidestIsa >= Isa::avx2) {
    if (isa == Isa::avx2) return cpu_ternary_conv2d_avx2();
  }
  return cpu_ternary_conv2d_base();
}

void check_size(const TernaryConv2dWeights& w) {
  STD_TORCH_CHECK(w.R * w.S <= 65535 && w.K * (w.C / w.groups) * w.R * w.S < (int64_t{1} << 32),
                  "ternary_conv2d: the filters are too large for the native op");
}

// Of planes with this shape.
TernaryConv2dWeights describe(const std::vector<int64_t>& shape, int64_t channels, int64_t groups) {
  STD_TORCH_CHECK(groups > 0 && channels > 0, "ternary_conv2d: channels and groups must be at least 1");
  STD_TORCH_CHECK(shape.size() == 5 && shape[1] == 2 && shape[0] > 0 && shape[2] > 0 && shape[3] > 0 &&
                      shape[0] % groups == 0 && shape[4] == (channels + 31) / 32,
                  "ternary_conv2d: planes must be [K, 2, R, S, ceil(channels / 32)] with K divisible by groups");
  check_size({channels * groups, shape[0], shape[2], shape[3], groups});
  return {channels * groups, shape[0], shape[2], shape[3], groups};
}

TernaryConv2dWeights describe_planes(const Tensor& planes, int64_t channels, int64_t groups) {
  STD_TORCH_CHECK(planes.is_cpu() && planes.scalar_type() == ScalarType::Int && planes.dim() == 5,
                  "ternary_conv2d: planes must be int32 [K, 2, R, S, words] on the CPU");
  return describe({planes.size(0), planes.size(1), planes.size(2), planes.size(3), planes.size(4)}, channels, groups);
}

std::vector<char> packed_lists(const TernaryConv2dWeights& w, const Tensor& planes, bool tiles) {
  const Tensor dense = torch::stable::contiguous(planes);
  std::vector<char> bytes(ternary_most_packed_bytes(w));
  const int32_t* bits = static_cast<const int32_t*>(dense.const_data_ptr());
  const int64_t entries = ternary_pack_planes(w, bits, bytes.data(), tiles);
  bytes.resize(ternary_pack(w).bytes(entries));
  return bytes;
}

Tensor ternary_pack_op(const Tensor& planes, int64_t channels, int64_t groups) {
  const std::vector<char> bytes = packed_lists(describe_planes(planes, channels, groups), planes, true);
  Tensor packed = torch::stable::empty({static_cast<int64_t>(bytes.size())}, ScalarType::Byte);
  std::memcpy(packed.mutable_data_ptr(), bytes.data(), packed.numel());
  return packed;
}

// With room for filters without a zero: a tracer must know the size before the weights.
Tensor ternary_pack_fixed_op(const Tensor& planes, int64_t channels, int64_t groups) {
  const TernaryConv2dWeights w = describe_planes(planes, channels, groups);
  const Tensor dense = torch::stable::contiguous(planes);
  Tensor packed = torch::stable::empty({ternary_most_packed_bytes(w)}, ScalarType::Byte);
  char* bytes = static_cast<char*>(packed.mutable_data_ptr());
  std::memset(bytes, 0, packed.numel());
  ternary_pack_planes(w, static_cast<const int32_t*>(dense.const_data_ptr()), bytes);
  return packed;
}

int64_t ternary_fixed_bytes(const std::vector<int64_t>& planes_shape, int64_t channels, int64_t groups) {
  return ternary_most_packed_bytes(describe(planes_shape, channels, groups));
}

// Factors or offsets have one number an output; one factor serves all.
void check_per_output(const std::optional<Tensor>& given, ScalarType dtype, int64_t K, bool factor) {
  if (!given) return;
  const bool one = factor && given->numel() == 1 && given->dim() <= 1;
  STD_TORCH_CHECK(
      (one || (given->dim() == 1 && given->size(0) == K)) && given->is_cpu() && given->scalar_type() == dtype,
      "ternary_conv2d: scale, negative_scale and bias must be [K] in the dtype of input");
}

// The arguments of a call that are no tensors, as numbers alone.
struct TernarySettings {
  int64_t stride[2], padding[4], dilation[2];  // padding: top, bottom, left, right
  int64_t groups, activation;
};

TernarySettings settings_of(const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                            const std::vector<int64_t>& dilation, int64_t groups,
                            const std::optional<std::string>& activation) {
  STD_TORCH_CHECK(stride.size() == 2 && dilation.size() == 2 && padding.size() == 4,
                  "ternary_conv2d: stride and dilation must be two numbers, padding (top, bottom, left, right)");
  STD_TORCH_CHECK(!activation || *activation == "relu" || *activation == "relu6",
                  "ternary_conv2d: activation must be None, 'relu' or 'relu6'");
  TernarySettings s{};
  std::copy(stride.begin(), stride.end(), s.stride);
  std::copy(padding.begin(), padding.end(), s.padding);
  std::copy(dilation.begin(), dilation.end(), s.dilation);
  s.groups = groups;
  s.activation = static_cast<int64_t>(!activation             ? Activation::none
                                      : *activation == "relu" ? Activation::relu
                                                              : Activation::relu6);
  return s;
}

// The tensors of a call beside its input.
struct TernaryOperands {
  const Tensor& planes;
  const std::optional<Tensor>& scale;
  const std::optional<Tensor>& negative_scale;
  const std::optional<Tensor>& bias;
};

void check_packed(bool right) {
  const char* text = "ternary_conv2d: packed was made for other planes, or is damaged; call ternary_conv2d_pack again";
  STD_TORCH_CHECK(right, text);
}

// On the matrix unit, where there is one and it is the quicker way.
bool multiplied(const TernaryConv2dParams& p, int64_t threads) {
  if constexpr (kWidestIsa >= Isa::amx) {
    const TernaryPack pack = ternary_pack(p.weights);
    if (isa_in_use() < Isa::amx || !ternary_multiplies(p, pack)) return false;
    check_packed(ternary_tiles_fit(p.weights, p.packed));
    const StackedBinaryConv2dParams stacked = ternary_as_stacked(p, pack);
    const StackedPlan plan = ternary_tiles_plan(p, pack);
    const int64_t units = p.N * p.OH;
    torch::stable::parallel_for(0, units, (units + threads - 1) / threads, [&](int64_t begin, int64_t end) {
      cpu_ternary_conv2d_amx(stacked, plan, p.negative_scale, static_cast<float*>(thread_memory(plan.scratch() * 4)),
                             begin, end);
    });
    return true;
  }
  return false;
}

// Everything but the input, which `p` holds already with N, H, W and its dtype; the result, beside `input`.
Tensor run(TernaryConv2dParams p, const Tensor& input, ScalarType dtype, bool channels_last,
           const TernaryOperands& operands, const Tensor* packed, const TernarySettings& settings, Memory memory) {
  const auto& [planes, scale, negative_scale, bias] = operands;
  const auto& stride = settings.stride;
  const auto& padding = settings.padding;
  const auto& dilation = settings.dilation;
  STD_TORCH_CHECK(stride[0] > 0 && stride[1] > 0 && dilation[0] > 0 && dilation[1] > 0,
                  "ternary_conv2d: stride and dilation must be two numbers of at least 1");
  STD_TORCH_CHECK(padding[0] >= 0 && padding[1] >= 0 && padding[2] >= 0 && padding[3] >= 0,
                  "ternary_conv2d: padding must be (top, bottom, left, right), none negative");
  STD_TORCH_CHECK(!negative_scale || scale, "ternary_conv2d: negative_scale needs scale");
  STD_TORCH_CHECK(settings.activation >= 0 && settings.activation <= static_cast<int64_t>(Activation::relu6),
                  "ternary_conv2d: no activation has the number ", settings.activation);
  const TernaryConv2dWeights& w = p.weights;
  p.stride_h = stride[0];
  p.stride_w = stride[1];
  p.dilation_h = dilation[0];
  p.dilation_w = dilation[1];
  p.pad_top = padding[0];
  p.pad_left = padding[2];
  const int64_t free_h = p.H + padding[0] + padding[1] - p.dilation_h * (w.R - 1) - 1;
  const int64_t free_w = p.W + padding[2] + padding[3] - p.dilation_w * (w.S - 1) - 1;
  STD_TORCH_CHECK(free_h >= 0 && free_w >= 0, "ternary_conv2d: the padded input is smaller than the dilated kernel");
  p.OH = free_h / p.stride_h + 1;
  p.OW = free_w / p.stride_w + 1;
  p.activation = static_cast<Activation>(settings.activation);

  p.channels_last = channels_last;
  Tensor output = empty_maps(input, dtype, {p.N, w.K, p.OH, p.OW}, p.channels_last, memory);
  p.output = output.mutable_data_ptr();
  check_per_output(scale, dtype, w.K, true);
  check_per_output(negative_scale, dtype, w.K, true);
  check_per_output(bias, dtype, w.K, false);
  const PerOutput plus(scale, w.K, 1.0f), minus(negative_scale, w.K, 1.0f), offset(bias, w.K, 0.0f);
  p.scale = plus.values();
  p.negative_scale = negative_scale ? minus.values() : nullptr;
  p.bias = offset.values();
  if (p.N == 0) return output;

  std::vector<char> own;
  if (packed) {
    STD_TORCH_CHECK(packed->is_cpu() && packed->scalar_type() == ScalarType::Byte && packed->is_contiguous(),
                    "ternary_conv2d: packed must be a contiguous uint8 tensor on the CPU");
    p.packed = static_cast<const char*>(packed->const_data_ptr());
    check_packed(ternary_packed_fits(w, p.packed, packed->numel()));
  } else {
    own = packed_lists(w, planes, isa_in_use() >= Isa::amx);
    p.packed = own.data();
  }
  const int64_t macs = p.N * p.OH * p.OW * w.K * (w.C / w.groups) * w.R * w.S;
  const int64_t most = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t wanted = macs / kMacsWorthAThread;
  const int64_t threads = wanted < 1 ? 1 : wanted < most ? wanted : most;
  if (multiplied(p, threads)) return output;
  if (packed) check_packed(ternary_lists_fit(w, p.packed));
  const CpuTernaryConv2d kernels = ternary_kernels();
  const int64_t width = p.words != nullptr ? 2 * kernels.width : kernels.width;
  const TernaryPlan plan = ternary_plan(p, width, threads);
  STD_TORCH_CHECK(plan.input_floats < (int64_t{1} << 31), "ternary_conv2d: the map is too large for the native op");
  std::vector<int32_t> offsets(plan.pack.chunk_taps);
  ternary_offsets(p, plan, offsets.data());
  torch::stable::parallel_for(0, plan.units, (plan.units + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    kernels.run(p, plan, offsets.data(), static_cast<float*>(thread_memory(plan.scratch() * 4)), begin, end);
  });
  return output;
}

const Tensor* address(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

Tensor of_numbers(const Tensor& input, const TernaryOperands& operands, const Tensor* packed,
                  const TernarySettings& settings, Memory memory) {
  const int64_t groups = settings.groups;
  STD_TORCH_CHECK(input.dim() == 4 && input.is_cpu(), "ternary_conv2d: input must be [N, C, H, W] on the CPU");
  STD_TORCH_CHECK(groups > 0 && input.size(1) % groups == 0, "ternary_conv2d: C must be divisible by groups");
  TernaryConv2dParams p{};
  p.weights = describe_planes(operands.planes, input.size(1) / groups, groups);
  switch (input.scalar_type()) {
    case ScalarType::Float:
      p.dtype = DType::f32;
      break;
    case ScalarType::BFloat16:
      p.dtype = DType::bf16;
      break;
    case ScalarType::Half:
      p.dtype = DType::f16;
      break;
    default:
      STD_TORCH_CHECK(false, "ternary_conv2d: input must be float32, bfloat16 or float16 in the native op");
  }
  p.N = input.size(0);
  p.H = input.size(2);
  p.W = input.size(3);
  p.input = input.const_data_ptr();
  p.input_stride_n = input.stride(0);
  p.input_stride_c = input.stride(1);
  p.input_stride_h = input.stride(2);
  p.input_stride_w = input.stride(3);
  return run(p, input, input.scalar_type(), is_channels_last(input), operands, packed, settings, memory);
}

Tensor ternary_forward(const Tensor& input, const Tensor& planes, const std::optional<Tensor>& scale,
                       const std::optional<Tensor>& negative_scale, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& packed, const std::vector<int64_t>& stride,
                       const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
                       const std::optional<std::string>& activation) {
  return of_numbers(input, {planes, scale, negative_scale, bias}, address(packed),
                    settings_of(stride, padding, dilation, groups, activation), Memory::by_torch);
}

// A call in one tensor of bytes, as in basis_conv2d.cpp: the settings, and what its maker saw of the tensors.
struct TernaryPlanned {
  TernarySettings settings;
  int64_t planes[5], channels, channels_last;
  int64_t types[5];  // of input, planes, scale, negative_scale and bias, -1 where there is none
};

TernaryPlanned seen(const Tensor& input, const TernaryOperands& operands, const TernarySettings& settings) {
  TernaryPlanned s{};
  s.settings = settings;
  STD_TORCH_CHECK(input.dim() == 4 && operands.planes.dim() == 5,
                  "ternary_conv2d_planned: input or planes have another number of dimensions");
  for (int64_t i = 0; i < 5; ++i) s.planes[i] = operands.planes.size(i);
  s.channels = input.size(1);
  s.channels_last = is_channels_last(input);
  const auto type = [](const std::optional<Tensor>& t) { return t ? static_cast<int64_t>(t->scalar_type()) : -1; };
  s.types[0] = static_cast<int64_t>(input.scalar_type());
  s.types[1] = static_cast<int64_t>(operands.planes.scalar_type());
  s.types[2] = type(operands.scale);
  s.types[3] = type(operands.negative_scale);
  s.types[4] = type(operands.bias);
  return s;
}

Tensor ternary_plan_op(const Tensor& input, const Tensor& planes, const std::optional<Tensor>& scale,
                       const std::optional<Tensor>& negative_scale, const std::optional<Tensor>& bias,
                       const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                       const std::vector<int64_t>& dilation, int64_t groups,
                       const std::optional<std::string>& activation) {
  const TernarySettings settings = settings_of(stride, padding, dilation, groups, activation);
  return bytes_of(seen(input, {planes, scale, negative_scale, bias}, settings));
}

Tensor ternary_planned(const Tensor& input, const Tensor& planes, const std::optional<Tensor>& scale,
                       const std::optional<Tensor>& negative_scale, const std::optional<Tensor>& bias,
                       const Tensor& packed, const Tensor& plan) {
  const TernaryPlanned p = from_bytes<TernaryPlanned>(plan, "ternary_conv2d");
  const TernaryOperands operands{planes, scale, negative_scale, bias};
  const TernaryPlanned now = seen(input, operands, p.settings);
  STD_TORCH_CHECK(std::memcmp(&now, &p, sizeof(p)) == 0,
                  "ternary_conv2d_planned: plan was made for other dtypes, another layout or other planes");
  return of_numbers(input, operands, &packed, p.settings, Memory::raw);
}

// words [N, bit planes, H, W, words of C] of packed activations; float32, channels_last.
Tensor ternary_forward_bits(const Tensor& words, int64_t channels, bool signs, const Tensor& planes,
                            const std::optional<Tensor>& scale, const std::optional<Tensor>& negative_scale,
                            const std::optional<Tensor>& bias, const std::optional<Tensor>& packed,
                            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                            const std::vector<int64_t>& dilation, int64_t groups,
                            const std::optional<std::string>& activation) {
  STD_TORCH_CHECK(words.dim() == 5 && words.is_cpu() && words.scalar_type() == ScalarType::Int && words.is_contiguous(),
                  "ternary_conv2d: words must be dense int32 [N, planes, H, W, words] on the CPU");
  STD_TORCH_CHECK(groups > 0 && channels > 0 && channels % groups == 0 && words.size(4) == (channels + 31) / 32,
                  "ternary_conv2d: words must hold the channels, which must be divisible by groups");
  TernaryConv2dParams p{};
  p.weights = describe_planes(planes, channels / groups, groups);
  p.dtype = DType::f32;
  p.words = static_cast<const int32_t*>(words.const_data_ptr());
  p.bit_planes = words.size(1);
  p.signs = signs;
  STD_TORCH_CHECK(p.bit_planes >= 1 && p.bit_planes <= (signs ? 1 : 4) && ternary_sums_fit(p),
                  "ternary_conv2d: the sums of these packed activations do not fit 16 bits");
  p.N = words.size(0);
  p.H = words.size(2);
  p.W = words.size(3);
  return run(p, words, ScalarType::Float, true, {planes, scale, negative_scale, bias}, address(packed),
             settings_of(stride, padding, dilation, groups, activation), Memory::by_torch);
}

}  // namespace
}  // namespace basisconv

STABLE_TORCH_LIBRARY_FRAGMENT(basisconv, m) {
  m.def(
      "ternary_conv2d(Tensor input, Tensor planes, Tensor? scale, Tensor? negative_scale, Tensor? bias, "
      "Tensor? packed, int[] stride, int[] padding, int[] dilation, int groups, str? activation) -> Tensor");
  m.def(
      "ternary_conv2d_bits(Tensor words, int channels, bool signs, Tensor planes, Tensor? scale, "
      "Tensor? negative_scale, Tensor? bias, Tensor? packed, int[] stride, int[] padding, int[] dilation, int groups, "
      "str? activation) -> Tensor");
  m.def(
      "ternary_conv2d_plan(Tensor input, Tensor planes, Tensor? scale, Tensor? negative_scale, Tensor? bias, "
      "int[] stride, int[] padding, int[] dilation, int groups, str? activation) -> Tensor");
  m.def(
      "ternary_conv2d_planned(Tensor input, Tensor planes, Tensor? scale, Tensor? negative_scale, Tensor? bias, "
      "Tensor packed, Tensor plan) -> Tensor");
  m.def("ternary_conv2d_pack(Tensor planes, int channels, int groups) -> Tensor");
  m.def("ternary_conv2d_pack_fixed(Tensor planes, int channels, int groups) -> Tensor");
  m.def("ternary_conv2d_fixed_bytes(int[] planes_shape, int channels, int groups) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CPU, m) {
  m.impl("ternary_conv2d", BASISCONV_BOX("ternary_conv2d", &basisconv::ternary_forward));
  m.impl("ternary_conv2d_bits", TORCH_BOX(&basisconv::ternary_forward_bits));
  m.impl("ternary_conv2d_plan", TORCH_BOX(&basisconv::ternary_plan_op));
  m.impl("ternary_conv2d_planned", TORCH_BOX(&basisconv::ternary_planned));
  m.impl("ternary_conv2d_pack", TORCH_BOX(&basisconv::ternary_pack_op));
  m.impl("ternary_conv2d_pack_fixed", TORCH_BOX(&basisconv::ternary_pack_fixed_op));
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CompositeExplicitAutograd, m) {
  m.impl("ternary_conv2d_fixed_bytes", TORCH_BOX(&basisconv::ternary_fixed_bytes));
}

// As the schema above says; see shim_glue.h.
BASISCONV_SHIM aoti_torch_cpu_ternary_conv2d(AtenTensorHandle input, AtenTensorHandle planes, AtenTensorHandle* scale,
                                             AtenTensorHandle* negative_scale, AtenTensorHandle* bias,
                                             AtenTensorHandle* packed, const int64_t* stride, int64_t strides,
                                             const int64_t* padding, int64_t paddings, const int64_t* dilation,
                                             int64_t dilations, int64_t groups, const char** activation,
                                             AtenTensorHandle* result) {
  using namespace basisconv;
  return shim::answer(result, [&] {
    return WithoutGradient<"ternary_conv2d", "ternary_conv2d", &ternary_forward>::call(
        shim::of(input), shim::of(planes), shim::of(scale), shim::of(negative_scale), shim::of(bias), shim::of(packed),
        shim::of(stride, strides), shim::of(padding, paddings), shim::of(dilation, dilations), groups,
        shim::of(activation));
  });
}
