// Torch glue of ternary_conv2d: check, fill the params, launch, register. LibTorch stable ABI only.
//
// Python has checked already with better words; these checks protect memory where torch.ops, export or AOTInductor
// bypass Python.
#include "ternary_conv2d.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../cpu/isa.h"
#include "../cpu/ternary_conv2d.h"

namespace basisconv {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

TernaryConv2dWeights describe_planes(const Tensor& planes, int64_t channels, int64_t groups) {
  STD_TORCH_CHECK(
      planes.is_cpu() && planes.scalar_type() == ScalarType::Int && planes.dim() == 5 && planes.size(1) == 2,
      "ternary_conv2d: planes must be int32 [K, 2, R, S, words] on the CPU");
  TernaryConv2dWeights w{};
  STD_TORCH_CHECK(groups > 0 && channels > 0, "ternary_conv2d: channels and groups must be at least 1");
  w.C = channels * groups;
  w.K = planes.size(0);
  w.R = planes.size(2);
  w.S = planes.size(3);
  w.groups = groups;
  STD_TORCH_CHECK(w.K > 0 && w.R > 0 && w.S > 0 && w.K % groups == 0 && planes.size(4) == (channels + 31) / 32,
                  "ternary_conv2d: planes must be [K, 2, R, S, ceil(channels / 32)] with K divisible by groups");
  STD_TORCH_CHECK(w.R * w.S <= 65535 && w.K * channels * w.R * w.S < (int64_t{1} << 32),
                  "ternary_conv2d: the filters are too large for the native op");
  return w;
}

std::vector<char> packed_lists(const TernaryConv2dWeights& w, const Tensor& planes) {
  const Tensor dense = torch::stable::contiguous(planes);
  std::vector<char> bytes(ternary_most_packed_bytes(w));
  const int64_t entries = ternary_pack_planes(w, static_cast<const int32_t*>(dense.const_data_ptr()), bytes.data());
  bytes.resize(ternary_pack(w).bytes(entries));
  return bytes;
}

Tensor ternary_pack_op(Tensor planes, int64_t channels, int64_t groups) {
  const std::vector<char> bytes = packed_lists(describe_planes(planes, channels, groups), planes);
  Tensor packed = torch::stable::empty({static_cast<int64_t>(bytes.size())}, ScalarType::Byte);
  std::memcpy(packed.mutable_data_ptr(), bytes.data(), bytes.size());
  return packed;
}

// A thread's own memory between calls; grows to the largest plan seen.
float* ternary_scratch(int64_t floats) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local int64_t held = 0;
  if (floats > held) {
    const size_t bytes = (static_cast<size_t>(floats) * 4 + 63) / 64 * 64;
    memory.reset(std::aligned_alloc(64, bytes));
    held = memory ? floats : 0;
    STD_TORCH_CHECK(memory != nullptr, "ternary_conv2d: no memory for ", bytes, " bytes of scratch");
  }
  return static_cast<float*>(memory.get());
}

// The layout rule of PyTorch and of core.layout.memory_format.
bool states_channels_last(const Tensor& t) {
  if (t.numel() == 0 || t.stride(1) == 0) return false;
  int64_t span = 0;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (t.stride(dim) < span || (dim == 0 && t.stride(1) == span)) return false;
    span = t.size(dim) * t.stride(dim);
  }
  return true;
}

// [K] as float: the tensor's numbers, or `otherwise` where there is none.
std::vector<float> numbers(const std::optional<Tensor>& t, ScalarType dtype, int64_t K, float otherwise) {
  std::vector<float> values(K, otherwise);
  if (t) {
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == K && t->is_cpu() && t->scalar_type() == dtype,
                    "ternary_conv2d: scale, negative_scale and bias must be [K] in the dtype of input");
    const Tensor dense = torch::stable::contiguous(*t);
    const Tensor wide = dense.scalar_type() == ScalarType::Float ? dense : torch::stable::to(dense, ScalarType::Float);
    std::memcpy(values.data(), wide.const_data_ptr(), K * sizeof(float));
  }
  return values;
}

using Numbers = std::vector<int64_t>;

// Everything but the input, which `p` holds already with N, H, W and its dtype; the result.
Tensor run(TernaryConv2dParams p, ScalarType dtype, bool channels_last, const Tensor& planes,
           const std::optional<Tensor>& scale, const std::optional<Tensor>& negative_scale,
           const std::optional<Tensor>& bias, const std::optional<Tensor>& packed, const Numbers& stride,
           const Numbers& padding, const Numbers& dilation, const std::optional<std::string>& activation) {
  STD_TORCH_CHECK(stride.size() == 2 && dilation.size() == 2 && stride[0] > 0 && stride[1] > 0 && dilation[0] > 0 &&
                      dilation[1] > 0,
                  "ternary_conv2d: stride and dilation must be two numbers of at least 1");
  STD_TORCH_CHECK(padding.size() == 4 && padding[0] >= 0 && padding[1] >= 0 && padding[2] >= 0 && padding[3] >= 0,
                  "ternary_conv2d: padding must be (top, bottom, left, right), none negative");
  STD_TORCH_CHECK(!negative_scale || scale, "ternary_conv2d: negative_scale needs scale");
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
  p.activation = !activation              ? Activation::none
                 : *activation == "relu"  ? Activation::relu
                 : *activation == "relu6" ? Activation::relu6
                                          : Activation::none;
  STD_TORCH_CHECK(!activation || p.activation != Activation::none,
                  "ternary_conv2d: activation must be None, 'relu' or 'relu6'");

  p.channels_last = channels_last;
  const MemoryFormat format = p.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  Tensor output = torch::stable::empty({p.N, w.K, p.OH, p.OW}, dtype, std::nullopt, std::nullopt, std::nullopt, format);
  p.output = output.mutable_data_ptr();
  const std::vector<float> plus = numbers(scale, dtype, w.K, 1.0f), minus = numbers(negative_scale, dtype, w.K, 1.0f);
  const std::vector<float> offset = numbers(bias, dtype, w.K, 0.0f);
  p.scale = plus.data();
  p.negative_scale = negative_scale ? minus.data() : nullptr;
  p.bias = offset.data();
  if (p.N == 0) return output;

  std::vector<char> own;
  if (packed) {
    STD_TORCH_CHECK(packed->is_cpu() && packed->scalar_type() == ScalarType::Byte && packed->is_contiguous(),
                    "ternary_conv2d: packed must be a contiguous uint8 tensor on the CPU");
    p.packed = static_cast<const char*>(packed->const_data_ptr());
    STD_TORCH_CHECK(ternary_packed_fits(w, p.packed, packed->numel()),
                    "ternary_conv2d: packed was made for other planes, or is damaged; call ternary_conv2d_pack again");
  } else {
    own = packed_lists(w, planes);
    p.packed = own.data();
  }
  const CpuTernaryConv2d kernels = ternary_kernels();
  const int64_t macs = p.N * p.OH * p.OW * w.K * (w.C / w.groups) * w.R * w.S;
  const int64_t most = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t wanted = macs / kMacsWorthAThread;
  const int64_t threads = wanted < 1 ? 1 : wanted < most ? wanted : most;
  const int64_t width = p.words != nullptr ? 2 * kernels.width : kernels.width;
  const TernaryPlan plan = ternary_plan(p, width, threads);
  STD_TORCH_CHECK(plan.input_floats < (int64_t{1} << 31), "ternary_conv2d: the map is too large for the native op");
  std::vector<int32_t> offsets(plan.pack.chunk_taps);
  ternary_offsets(p, plan, offsets.data());
  torch::stable::parallel_for(0, plan.units, (plan.units + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    kernels.run(p, plan, offsets.data(), ternary_scratch(plan.scratch()), begin, end);
  });
  return output;
}

void take_size(TernaryConv2dParams& p, int64_t N, int64_t H, int64_t W) {
  p.N = N;
  p.H = H;
  p.W = W;
}

Tensor ternary_forward(Tensor input, Tensor planes, std::optional<Tensor> scale, std::optional<Tensor> negative_scale,
                       std::optional<Tensor> bias, std::optional<Tensor> packed, std::vector<int64_t> stride,
                       std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                       std::optional<std::string> activation) {
  STD_TORCH_CHECK(input.dim() == 4 && input.is_cpu(), "ternary_conv2d: input must be [N, C, H, W] on the CPU");
  STD_TORCH_CHECK(groups > 0 && input.size(1) % groups == 0, "ternary_conv2d: C must be divisible by groups");
  TernaryConv2dParams p{};
  p.weights = describe_planes(planes, input.size(1) / groups, groups);
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
  take_size(p, input.size(0), input.size(2), input.size(3));
  p.input = input.const_data_ptr();
  p.input_stride_n = input.stride(0);
  p.input_stride_c = input.stride(1);
  p.input_stride_h = input.stride(2);
  p.input_stride_w = input.stride(3);
  return run(p, input.scalar_type(), states_channels_last(input), planes, scale, negative_scale, bias, packed, stride,
             padding, dilation, activation);
}

// words [N, bit planes, H, W, words of C] of packed activations; float32, channels_last.
Tensor ternary_forward_bits(Tensor words, int64_t channels, bool signs, Tensor planes, std::optional<Tensor> scale,
                            std::optional<Tensor> negative_scale, std::optional<Tensor> bias,
                            std::optional<Tensor> packed, std::vector<int64_t> stride, std::vector<int64_t> padding,
                            std::vector<int64_t> dilation, int64_t groups, std::optional<std::string> activation) {
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
  take_size(p, words.size(0), words.size(2), words.size(3));
  return run(p, ScalarType::Float, true, planes, scale, negative_scale, bias, packed, stride, padding, dilation,
             activation);
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
  m.def("ternary_conv2d_pack(Tensor planes, int channels, int groups) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CPU, m) {
  m.impl("ternary_conv2d", TORCH_BOX(&basisconv::ternary_forward));
  m.impl("ternary_conv2d_bits", TORCH_BOX(&basisconv::ternary_forward_bits));
  m.impl("ternary_conv2d_pack", TORCH_BOX(&basisconv::ternary_pack_op));
}
