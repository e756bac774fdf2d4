// Torch glue of basis_conv2d: check, fill the params, launch, register. LibTorch stable ABI only.
//
// Python has checked already with better words; these checks protect memory where torch.ops, export or AOTInductor
// bypass Python.
#include "basis_conv2d.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/basis_conv2d.h"
#include "../cpu/binary_conv2d_plan.h"
#include "glue.h"

namespace basisconv {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMacsWorthAThread = 1 << 19;

DType dtype_of(const Tensor& t, const char* name) {
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

CpuBasisConv2d kernels_for(const BasisConv2dWeights& weights) {
  const Isa isa = isa_for(weights, isa_in_use());
  // What was not compiled must not be named: it could not be linked.
  if constexpr (kWidestIsa >= Isa::amx) {
    if (isa == Isa::amx) return cpu_basis_conv2d_amx();
  }
  if constexpr (kWidestIsa >= Isa::avx512) {
    if (isa == Isa::avx512) return cpu_basis_conv2d_avx512();
  }
  if constexpr (kWidestIsa >= Isa::avx2) {
    if (isa == Isa::avx2) return cpu_basis_conv2d_avx2();
  }
  return cpu_basis_conv2d_base();
}

BasisConv2dWeights describe(const Tensor& basis_weight, const Tensor& coefficients, const std::vector<int64_t>& stride,
                            const std::vector<int64_t>& dilation, int64_t groups, bool precise) {
  STD_TORCH_CHECK(basis_weight.is_cpu() && coefficients.is_cpu(), "basis_conv2d: the weights must be on the CPU");
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

Tensor as_float(const Tensor& t) {
  const Tensor dense = torch::stable::contiguous(t);
  return dense.scalar_type() == ScalarType::Float ? dense : torch::stable::to(dense, ScalarType::Float);
}

void pack_into(const BasisConv2dWeights& w, const Tensor& basis_weight, const Tensor& coefficients, char* bytes) {
  const Isa isa = isa_in_use();
  const CpuPackHeader header = cpu_pack_header(w, isa);
  std::memset(bytes, 0, kCpuPackHeaderBytes);
  std::memcpy(bytes, &header, sizeof(header));
  const Tensor filters = as_float(basis_weight), mixing = as_float(coefficients);
  kernels_for(w).pack(w, cpu_pack(w, isa), static_cast<const float*>(filters.const_data_ptr()),
                      static_cast<const float*>(mixing.const_data_ptr()),
                      reinterpret_cast<float*>(bytes + kCpuPackHeaderBytes));
}

Tensor pack(Tensor basis_weight, Tensor coefficients, std::vector<int64_t> stride, std::vector<int64_t> dilation,
            int64_t groups, bool precise, int64_t format) {
  STD_TORCH_CHECK(format == kCpuPackVersion, "basis_conv2d_pack: this library packs format ", kCpuPackVersion,
                  ", the caller expects format ", format,
                  "; a program traced with another version must be traced again");
  const BasisConv2dWeights w = describe(basis_weight, coefficients, stride, dilation, groups, precise);
  Tensor packed = torch::stable::empty({cpu_packed_bytes(w)}, ScalarType::Byte);
  char* bytes = static_cast<char*>(packed.mutable_data_ptr());
  std::memset(bytes, 0, packed.numel());
  pack_into(w, basis_weight, coefficients, bytes);
  return packed;
}

int64_t packed_bytes(std::vector<int64_t> basis_weight_shape, std::vector<int64_t> coefficients_shape,
                     std::vector<int64_t> stride, std::vector<int64_t> dilation, int64_t groups, bool precise) {
  STD_TORCH_CHECK(basis_weight_shape.size() == 4 && coefficients_shape.size() == 2 && stride.size() == 2 &&
                      dilation.size() == 2 && groups > 0,
                  "basis_conv2d_packed_bytes: two shapes, stride and dilation pairs and groups expected");
  BasisConv2dWeights w{};
  w.Q = basis_weight_shape[0];
  w.C = basis_weight_shape[1] * groups;
  w.R = basis_weight_shape[2];
  w.S = basis_weight_shape[3];
  w.K = coefficients_shape[0];
  w.groups = groups;
  w.mixing_groups = groups > 1 && coefficients_shape[1] != w.Q ? groups : 1;
  w.stride_h = stride[0];
  w.stride_w = stride[1];
  w.dilation_h = dilation[0];
  w.dilation_w = dilation[1];
  w.precise = precise;
  return cpu_packed_bytes(w);
}

// The result and, if `keep_maps`, z, both in the dtype and the layout of input.
std::tuple<Tensor, Tensor> run(const Tensor& input, const Tensor& basis_weight, const Tensor& coefficients,
                               const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                               const std::optional<Tensor>& packed, const std::vector<int64_t>& stride,
                               const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                               int64_t groups, const std::optional<std::string>& activation, bool precise,
                               bool keep_maps) {
  BasisConv2dParams p{};
  p.weights = describe(basis_weight, coefficients, stride, dilation, groups, precise);
  const BasisConv2dWeights& w = p.weights;
  STD_TORCH_CHECK(input.dim() == 4 && input.is_cpu(), "basis_conv2d: input must be [N, C, H, W] on the CPU");
  STD_TORCH_CHECK(input.scalar_type() == basis_weight.scalar_type(),
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
  p.activation = !activation              ? Activation::none
                 : *activation == "relu"  ? Activation::relu
                 : *activation == "relu6" ? Activation::relu6
                                          : Activation::none;
  STD_TORCH_CHECK(!activation || p.activation != Activation::none,
                  "basis_conv2d: activation must be None, 'relu' or 'relu6'");

  p.channels_last = is_channels_last(input);
  const MemoryFormat format = p.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  Tensor output = torch::stable::empty({p.N, w.K, p.OH, p.OW}, input.scalar_type(), std::nullopt, std::nullopt,
                                       std::nullopt, format);
  p.output = output.mutable_data_ptr();
  Tensor maps;
  if (keep_maps) {
    maps = torch::stable::empty({p.N, w.Q, p.OH, p.OW}, input.scalar_type(), std::nullopt, std::nullopt, std::nullopt,
                                format);
    p.maps = maps.mutable_data_ptr();
  }
  p.input = input.const_data_ptr();
  p.input_stride_n = input.stride(0);
  p.input_stride_c = input.stride(1);
  p.input_stride_h = input.stride(2);
  p.input_stride_w = input.stride(3);

  std::vector<float> offset(w.K, 0.0f);
  if (bias) {
    STD_TORCH_CHECK(
        bias->dim() == 1 && bias->size(0) == w.K && bias->is_cpu() && bias->scalar_type() == input.scalar_type(),
        "basis_conv2d: bias must be [K] in the dtype of input");
    const Tensor dense = as_float(*bias);
    std::memcpy(offset.data(), dense.const_data_ptr(), w.K * sizeof(float));
  }
  p.bias = offset.data();
  Tensor added;
  if (residual) {
    STD_TORCH_CHECK(residual->dim() == 4 && residual->size(0) == p.N && residual->size(1) == w.K &&
                        residual->size(2) == p.OH && residual->size(3) == p.OW && residual->is_cpu() &&
                        residual->scalar_type() == input.scalar_type(),
                    "basis_conv2d: residual must be [N, K, OH, OW] in the dtype of input");
    added = torch::stable::contiguous(*residual, format);
    p.residual = added.const_data_ptr();
  }
  if (p.N == 0) return {output, maps};

  const Isa isa = isa_in_use();
  std::vector<char> own;
  const char* bytes;
  if (packed) {
    STD_TORCH_CHECK(packed->is_cpu() && packed->scalar_type() == ScalarType::Byte && packed->is_contiguous(),
                    "basis_conv2d: packed must be a contiguous uint8 tensor on the CPU");
    STD_TORCH_CHECK(packed->numel() == cpu_packed_bytes(w), "basis_conv2d: packed has ", packed->numel(),
                    " bytes, these weights pack to ", cpu_packed_bytes(w));
    bytes = static_cast<const char*>(packed->const_data_ptr());
    const CpuPackHeader expected = cpu_pack_header(w, isa);
    STD_TORCH_CHECK(std::memcmp(bytes, &expected, sizeof(expected)) == 0,
                    "basis_conv2d: packed was made for other weights, another geometry or another instruction set; "
                    "call basis_conv2d_pack again");
  } else {
    own.resize(cpu_packed_bytes(w));
    pack_into(w, basis_weight, coefficients, own.data());
    bytes = own.data();
  }
  p.packed = bytes + kCpuPackHeaderBytes;

  const int64_t macs = p.N * p.OH * p.OW * (w.Q * (w.C / w.groups) * w.R * w.S + w.K * (w.Q / w.mixing_groups));
  const int64_t most = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t wanted = macs / kMacsWorthAThread;
  const int64_t threads = wanted < 1 ? 1 : wanted < most ? wanted : most;
  const CpuPlan plan = cpu_plan(p, cpu_pack(w, isa), threads);
  const CpuBasisConv2d kernels = kernels_for(w);
  torch::stable::parallel_for(0, plan.units, (plan.units + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    kernels.run(p, plan, static_cast<float*>(thread_memory(plan.scratch() * 4)), begin, end);
  });
  return {output, maps};
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

#if defined(__GNUC__) && !defined(__clang__)
#define BASISCONV_COMPILER "GCC " __VERSION__
#else
#define BASISCONV_COMPILER __VERSION__  // says its name
#endif

std::string build_facts() {
  std::string facts = "{\"compiler\": \"" BASISCONV_COMPILER "\", \"pack_format\": " + std::to_string(kCpuPackVersion) +
                      ", \"binary_pack_format\": " + std::to_string(kBinaryPackVersion) +
                      ", \"cpu\": {\"built\": [\"base\"";
  for (Isa isa : {Isa::avx2, Isa::avx512, Isa::avx512_vpopcntdq, Isa::amx}) {
    if (isa <= kWidestIsa) facts += ", \"" + std::string(isa_name(isa)) + "\"";
  }
  facts += "], \"processor\": \"" + std::string(isa_name(isa_of_processor()));
  facts += "\", \"in_use\": \"" + std::string(isa_name(isa_in_use())) + "\"}}";
  return facts;
}

}  // namespace
}  // namespace basisconv

STABLE_TORCH_LIBRARY(basisconv, m) {
  m.def(
      "basis_conv2d(Tensor input, Tensor basis_weight, Tensor coefficients, Tensor? bias, Tensor? residual, "
      "Tensor? packed, int[] stride, int[] padding, int[] dilation, int groups, str? activation, bool precise) "
      "-> Tensor");
  m.def(
      "basis_conv2d_maps(Tensor input, Tensor basis_weight, Tensor coefficients, Tensor? bias, Tensor? residual, "
      "Tensor? packed, int[] stride, int[] padding, int[] dilation, int groups, str? activation, bool precise) "
      "-> (Tensor, Tensor)");
  m.def(
      "basis_conv2d_pack(Tensor basis_weight, Tensor coefficients, int[] stride, int[] dilation, int groups, "
      "bool precise, int format) -> Tensor");
  m.def(
      "basis_conv2d_packed_bytes(int[] basis_weight_shape, int[] coefficients_shape, int[] stride, int[] dilation, "
      "int groups, bool precise) -> int");
  m.def("build_facts() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CPU, m) {
  m.impl("basis_conv2d", TORCH_BOX(&basisconv::forward));
  m.impl("basis_conv2d_maps", TORCH_BOX(&basisconv::forward_maps));
  m.impl("basis_conv2d_pack", TORCH_BOX(&basisconv::pack));
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CompositeExplicitAutograd, m) {
  m.impl("basis_conv2d_packed_bytes", TORCH_BOX(&basisconv::packed_bytes));
  m.impl("build_facts", TORCH_BOX(&basisconv::build_facts));
}
