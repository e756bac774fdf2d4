// Torch glue of stacked_binary_conv2d: check, fill the params, launch, register. LibTorch stable ABI only.
//
// Python has checked already with better words; these checks protect memory where torch.ops, export or AOTInductor
// bypass Python.
#include "stacked_binary_conv2d.h"

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

#include "../cpu/stacked_binary_conv2d.h"

namespace basisconv {
namespace stacked {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAddsWorthAThread = 1 << 20;

CpuStackedBinaryConv2d kernels() {
  // What was not compiled must not be named: it could not be linked.
  if constexpr (kWidestIsa >= Isa::avx512) {
    if (isa_in_use() >= Isa::avx512) return cpu_stacked_binary_conv2d_avx512();
  }
  if constexpr (kWidestIsa >= Isa::avx2) {
    if (isa_in_use() >= Isa::avx2) return cpu_stacked_binary_conv2d_avx2();
  }
  return cpu_stacked_binary_conv2d_base();
}

StackedBinaryWeights describe(const std::vector<int64_t>& bank_shape, const std::vector<int64_t>& index_shape,
                              int64_t groups) {
  STD_TORCH_CHECK(
      bank_shape.size() == 4 && index_shape.size() == 2 && groups > 0,
      "stacked_binary_conv2d: bank must be [n, C/(groups*splits), R, S], index [K, splits], groups at least 1");
  StackedBinaryWeights w{};
  w.n = bank_shape[0];
  w.R = bank_shape[2];
  w.S = bank_shape[3];
  w.K = index_shape[0];
  w.splits = index_shape[1];
  w.groups = groups;
  w.C = bank_shape[1] * w.splits * groups;
  STD_TORCH_CHECK(w.n > 0 && w.C > 0 && w.R > 0 && w.S > 0 && w.K > 0 && w.splits > 0,
                  "stacked_binary_conv2d: bank and index must not be empty");
  STD_TORCH_CHECK(w.K % groups == 0, "stacked_binary_conv2d: K must be divisible by groups");
  return w;
}

Tensor pack(Tensor bank, Tensor index, int64_t groups, int64_t format) {
  STD_TORCH_CHECK(format == kStackedPackVersion, "stacked_binary_conv2d_pack: this library packs format ",
                  kStackedPackVersion, ", the caller expects format ", format,
                  "; a program traced with another version must be traced again");
  STD_TORCH_CHECK(bank.dim() == 4 && bank.is_cpu() && bank.scalar_type() == ScalarType::Float && index.dim() == 2 &&
                      index.is_cpu() && index.scalar_type() == ScalarType::Long,
                  "stacked_binary_conv2d_pack: bank must be [n, C/(groups*splits), R, S] in float32 and index "
                  "[K, splits] in int64, both on the CPU");
  const StackedBinaryWeights w =
      describe({bank.size(0), bank.size(1), bank.size(2), bank.size(3)}, {index.size(0), index.size(1)}, groups);
  const Tensor filters = torch::stable::contiguous(bank), chosen = torch::stable::contiguous(index);
  const float* values = static_cast<const float*>(filters.const_data_ptr());
  const int64_t* places = static_cast<const int64_t*>(chosen.const_data_ptr());
  for (int64_t i = 0; i < filters.numel(); i++) {
    STD_TORCH_CHECK(values[i] == 1.0f || values[i] == -1.0f,
                    "stacked_binary_conv2d: bank must hold +1 and -1 only, got ", values[i]);
  }
  for (int64_t i = 0; i < chosen.numel(); i++) {
    STD_TORCH_CHECK(places[i] >= 0 && places[i] < w.n, "stacked_binary_conv2d: index must name bank filters 0 to ",
                    w.n - 1, ", got ", places[i]);
  }
  Tensor packed = torch::stable::empty({stacked_packed_bytes(w)}, ScalarType::Byte);
  char* bytes = static_cast<char*>(packed.mutable_data_ptr());
  std::memset(bytes, 0, packed.numel());
  const StackedPackHeader header = stacked_pack_header(w, isa_in_use());
  std::memcpy(bytes, &header, sizeof(header));
  kernels().pack(w, stacked_pack(w, isa_in_use()), values, places,
                 reinterpret_cast<uint32_t*>(bytes + kStackedHeaderBytes));
  return packed;
}

int64_t packed_bytes(std::vector<int64_t> bank_shape, std::vector<int64_t> index_shape, int64_t groups) {
  return stacked_packed_bytes(describe(bank_shape, index_shape, groups));
}

// Whether the native kernel runs full filters instead of stacking maps, on the instruction set in use.
bool expanded(std::vector<int64_t> bank_shape, std::vector<int64_t> index_shape, int64_t groups) {
  return stacked_pack(describe(bank_shape, index_shape, groups), isa_in_use()).expanded;
}

// A thread's own memory between calls; grows to the largest plan seen.
float* thread_scratch(int64_t floats) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local int64_t held = 0;
  if (floats > held) {
    const size_t bytes = (static_cast<size_t>(floats) * 4 + 63) / 64 * 64;
    memory.reset(std::aligned_alloc(64, bytes));
    held = memory ? floats : 0;
    STD_TORCH_CHECK(memory != nullptr, "stacked_binary_conv2d: no memory for ", bytes, " bytes of scratch");
  }
  return static_cast<float*>(memory.get());
}

// The layout rule of PyTorch and of core.layout.memory_format.
bool is_channels_last(const Tensor& t) {
  if (t.numel() == 0 || t.stride(1) == 0) return false;
  int64_t span = 0;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (t.stride(dim) < span || (dim == 0 && t.stride(1) == span)) return false;
    span = t.size(dim) * t.stride(dim);
  }
  return true;
}

StackedMode mode_of(const std::string& mode) {
  if (mode == "real") return StackedMode::real;
  if (mode == "signs") return StackedMode::signs;
  if (mode == "packed_signs") return StackedMode::packed_signs;
  STD_TORCH_CHECK(mode == "packed_codes",
                  "stacked_binary_conv2d: mode must be 'real', 'signs', 'packed_signs' or 'packed_codes'");
  return StackedMode::packed_codes;
}

// Shape, dtype and strides of the input, and the memory format of the output.
ScalarType take_input(const Tensor& input, StackedBinaryConv2dParams& p) {
  const int64_t C = p.weights.C;
  p.input = input.const_data_ptr();
  p.N = input.size(0);
  p.H = input.size(2);
  p.W = input.size(3);
  if (p.mode == StackedMode::packed_signs || p.mode == StackedMode::packed_codes) {
    STD_TORCH_CHECK(input.dim() == 5 && input.is_cpu() && input.scalar_type() == ScalarType::Int &&
                        input.is_contiguous() && input.size(4) == (C + 31) / 32 && input.size(1) > 0 &&
                        input.size(1) <= 4,
                    "stacked_binary_conv2d: packed input must be dense int32 words [N, planes, H, W, ceil(C/32)]");
    p.planes = input.size(1);
    p.dtype = DType::f32;
    p.channels_last = true;
    return ScalarType::Float;
  }
  STD_TORCH_CHECK(input.dim() == 4 && input.is_cpu(), "stacked_binary_conv2d: input must be [N, C, H, W] on the CPU");
  STD_TORCH_CHECK(input.size(1) == C, "stacked_binary_conv2d: input has ", input.size(1),
                  " channels, bank and index take ", C);
  p.input_stride_n = input.stride(0);
  p.input_stride_c = input.stride(1);
  p.input_stride_h = input.stride(2);
  p.input_stride_w = input.stride(3);
  p.channels_last = is_channels_last(input);
  const ScalarType type = input.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "stacked_binary_conv2d: input must be float32, bfloat16 or float16 in the native op");
  p.dtype = type == ScalarType::Float ? DType::f32 : type == ScalarType::BFloat16 ? DType::bf16 : DType::f16;
  return type;
}

// A factor or an offset as [K] floats.
std::vector<float> per_output(const std::optional<Tensor>& given, int64_t K, float absent, const char* name) {
  std::vector<float> values(K, absent);
  if (given) {
    STD_TORCH_CHECK(given->dim() == 1 && given->size(0) == K && given->is_cpu(), "stacked_binary_conv2d: ", name,
                    " must be [K] on the CPU");
    const Tensor dense = torch::stable::contiguous(
        given->scalar_type() == ScalarType::Float ? *given : torch::stable::to(*given, ScalarType::Float));
    std::memcpy(values.data(), dense.const_data_ptr(), K * sizeof(float));
  }
  return values;
}

Tensor forward(Tensor input, Tensor packed, std::optional<Tensor> scale, std::optional<Tensor> bias,
               std::vector<int64_t> bank_shape, std::vector<int64_t> index_shape, std::vector<int64_t> stride,
               std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, std::string mode,
               std::optional<std::string> activation) {
  StackedBinaryConv2dParams p{};
  p.weights = describe(bank_shape, index_shape, groups);
  const StackedBinaryWeights& w = p.weights;
  p.mode = mode_of(mode);
  STD_TORCH_CHECK(input.dim() >= 4, "stacked_binary_conv2d: input must be [N, C, H, W] or packed words");
  const ScalarType type = take_input(input, p);
  STD_TORCH_CHECK(stride.size() == 2 && dilation.size() == 2 && stride[0] > 0 && stride[1] > 0 && dilation[0] > 0 &&
                      dilation[1] > 0,
                  "stacked_binary_conv2d: stride and dilation must be two numbers, at least 1");
  STD_TORCH_CHECK(padding.size() == 4 && padding[0] >= 0 && padding[1] >= 0 && padding[2] >= 0 && padding[3] >= 0,
                  "stacked_binary_conv2d: padding must be (top, bottom, left, right), none negative");
  p.stride_h = stride[0];
  p.stride_w = stride[1];
  p.dilation_h = dilation[0];
  p.dilation_w = dilation[1];
  p.pad_top = padding[0];
  p.pad_left = padding[2];
  const int64_t free_h = p.H + padding[0] + padding[1] - p.dilation_h * (w.R - 1) - 1;
  const int64_t free_w = p.W + padding[2] + padding[3] - p.dilation_w * (w.S - 1) - 1;
  STD_TORCH_CHECK(free_h >= 0 && free_w >= 0,
                  "stacked_binary_conv2d: the padded input is smaller than the dilated kernel");
  p.OH = free_h / p.stride_h + 1;
  p.OW = free_w / p.stride_w + 1;
  p.activation = !activation              ? Activation::none
                 : *activation == "relu"  ? Activation::relu
                 : *activation == "relu6" ? Activation::relu6
                                          : Activation::none;
  STD_TORCH_CHECK(!activation || p.activation != Activation::none,
                  "stacked_binary_conv2d: activation must be None, 'relu' or 'relu6'");
  const MemoryFormat format = p.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  Tensor output = torch::stable::empty({p.N, w.K, p.OH, p.OW}, type, std::nullopt, std::nullopt, std::nullopt, format);
  p.output = output.mutable_data_ptr();
  const std::vector<float> factors = per_output(scale, w.K, 1.0f, "scale"),
                           offsets = per_output(bias, w.K, 0.0f, "bias");
  p.scale = factors.data();
  p.bias = offsets.data();
  STD_TORCH_CHECK(
      packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
          packed.numel() == stacked_packed_bytes(w),
      "stacked_binary_conv2d: packed must be what stacked_binary_conv2d_pack gives for this bank and index");
  const char* bytes = static_cast<const char*>(packed.const_data_ptr());
  const StackedPackHeader expected = stacked_pack_header(w, isa_in_use());
  STD_TORCH_CHECK(std::memcmp(bytes, &expected, sizeof(expected)) == 0,
                  "stacked_binary_conv2d: packed was made for another bank or index, another version or another "
                  "instruction set; call stacked_binary_conv2d_pack again");
  p.packed = bytes + kStackedHeaderBytes;
  if (p.N == 0) return output;

  const StackedPlan plan = stacked_plan(p, stacked_pack(w, isa_in_use()));
  const int64_t filters = plan.pack.slices * plan.pack.filters;
  const int64_t wanted = p.N * p.OH * p.OW * filters * plan.pack.low * w.R * w.S / kAddsWorthAThread;
  const int64_t most = static_cast<int64_t>(torch::stable::get_num_threads()), units = p.N * p.OH;
  const int64_t threads = wanted < 1 ? 1 : wanted < most ? wanted : most;
  const CpuStackedBinaryConv2d compiled = kernels();
  torch::stable::parallel_for(0, units, (units + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    compiled.run(p, plan, thread_scratch(plan.scratch()), begin, end);
  });
  return output;
}

}  // namespace stacked
}  // namespace basisconv

STABLE_TORCH_LIBRARY_FRAGMENT(basisconv, m) {
  m.def(
      "stacked_binary_conv2d(Tensor input, Tensor packed, Tensor? scale, Tensor? bias, int[] bank_shape, "
      "int[] index_shape, int[] stride, int[] padding, int[] dilation, int groups, str mode, str? activation) "
      "-> Tensor");
  m.def("stacked_binary_conv2d_pack(Tensor bank, Tensor index, int groups, int format) -> Tensor");
  m.def("stacked_binary_conv2d_packed_bytes(int[] bank_shape, int[] index_shape, int groups) -> int");
  m.def("stacked_binary_conv2d_expanded(int[] bank_shape, int[] index_shape, int groups) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CPU, m) {
  m.impl("stacked_binary_conv2d", TORCH_BOX(&basisconv::stacked::forward));
  m.impl("stacked_binary_conv2d_pack", TORCH_BOX(&basisconv::stacked::pack));
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CompositeExplicitAutograd, m) {
  m.impl("stacked_binary_conv2d_packed_bytes", TORCH_BOX(&basisconv::stacked::packed_bytes));
  m.impl("stacked_binary_conv2d_expanded", TORCH_BOX(&basisconv::stacked::expanded));
}
