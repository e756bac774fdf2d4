// Torch glue of basis_conv2d: check, fill the params, launch, register. LibTorch stable ABI only.
//
// Python has checked already with better words; these checks protect memory where torch.ops, export or AOTInductor
// bypass Python.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/basis_conv2d.h"
#include "../cpu/binary_conv2d_plan.h"
#include "basis_conv2d_glue.h"
#include "gradients_glue.h"
#include "shim_glue.h"

namespace basisconv {
namespace {

constexpr int64_t kMacsWorthAThread = 1 << 19;

CpuBasisConv2d kernels_for(const BasisConv2dWeights& weights) {
  const Isa isa = isa_for(weights, isa_in_use());
  // What was not compiled must not be named: it could not be linked.
  if constexpr (kWidestIsa >= Isa::amx) {
    if (isa == Isa::amx) return cpu_basis_conv2d_amx();
  }
  if constexpr (kWidestIsa >= Isa::avx512_bf16) {
    if (isa == Isa::avx512_bf16) return cpu_basis_conv2d_avx512_bf16();
  }
  if constexpr (kWidestIsa >= Isa::avx512) {
    if (isa == Isa::avx512) return cpu_basis_conv2d_avx512();
  }
  if constexpr (kWidestIsa >= Isa::avx2) {
    if (isa == Isa::avx2) return cpu_basis_conv2d_avx2();
  }
  return cpu_basis_conv2d_base();
}

// The parts of `layout` that have a size.
void pack_into(const BasisConv2dWeights& w, const CpuPack& layout, const Tensor& basis_weight,
               const Tensor& coefficients, float* packed) {
  const int64_t channels = w.C / w.groups, taps = w.R * w.S;
  const Tensor& f = basis_weight;
  const bool channels_last = f.scalar_type() == ScalarType::Float && f.stride(0) == channels * taps &&
                             f.stride(1) == 1 && f.stride(2) == w.S * channels && f.stride(3) == channels;
  const Tensor read = channels_last ? f : as_float(f), mixing = as_float(coefficients);
  const BasisFilters filters{static_cast<const float*>(read.const_data_ptr()), channels * taps,
                             channels_last ? 1 : taps, channels_last ? channels : 1};
  kernels_for(w).pack(w, layout, filters, static_cast<const float*>(mixing.const_data_ptr()), packed);
}

Tensor pack(const Tensor& basis_weight, const Tensor& coefficients, const std::vector<int64_t>& stride,
            const std::vector<int64_t>& dilation, int64_t groups, bool precise, int64_t format) {
  STD_TORCH_CHECK(format == kCpuPackVersion, "basis_conv2d_pack: this library packs format ", kCpuPackVersion,
                  ", the caller expects format ", format,
                  "; a program traced with another version must be traced again");
  STD_TORCH_CHECK(basis_weight.is_cpu() && coefficients.is_cpu(), "basis_conv2d: the weights must be on the CPU");
  const BasisConv2dWeights w = describe(basis_weight, coefficients, settings_of(stride, dilation, groups, precise));
  Tensor packed = torch::stable::empty({cpu_packed_bytes(w)}, ScalarType::Byte);
  char* bytes = static_cast<char*>(packed.mutable_data_ptr());
  std::memset(bytes, 0, packed.numel());
  const Isa isa = isa_in_use();
  const CpuPackHeader header = cpu_pack_header(w, isa);
  std::memcpy(bytes, &header, sizeof(header));
  pack_into(w, cpu_pack(w, isa), basis_weight, coefficients, reinterpret_cast<float*>(bytes + kCpuPackHeaderBytes));
  return packed;
}

int64_t packed_bytes(const std::vector<int64_t>& basis_weight_shape, const std::vector<int64_t>& coefficients_shape,
                     const std::vector<int64_t>& stride, const std::vector<int64_t>& dilation, int64_t groups,
                     bool precise) {
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

// The result and, if `keep_maps`, z, both in the dtype and the layout of input. A planned call knows the size that
// packed must have.
FilledBasisConv2d run(const BasisConv2dCall& call, const Tensor* packed, bool keep_maps,
                      std::optional<int64_t> planned_bytes = std::nullopt) {
  const auto on_cpu = [](const std::optional<Tensor>& t) { return !t || t->is_cpu(); };
  STD_TORCH_CHECK(call.input.is_cpu() && call.basis_weight.is_cpu() && call.coefficients.is_cpu() &&
                      on_cpu(call.bias) && on_cpu(call.residual),
                  "basis_conv2d: all tensors must be on the CPU");
  FilledBasisConv2d filled = fill(call, keep_maps, planned_bytes ? Memory::raw : Memory::by_torch);
  BasisConv2dParams& p = filled.params;
  const BasisConv2dWeights& w = p.weights;
  if (p.N == 0) return filled;
  const PerOutput bias(call.bias, w.K, 0.0f);
  p.bias = bias.values();

  const int64_t macs = p.N * p.OH * p.OW * (w.Q * (w.C / w.groups) * w.R * w.S + w.K * (w.Q / w.mixing_groups));
  const int64_t most = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t wanted = macs / kMacsWorthAThread;
  const int64_t threads = wanted < 1 ? 1 : wanted < most ? wanted : most;
  const Isa isa = isa_in_use();
  const CpuPack layout = cpu_pack(w, isa);
  const CpuPlan plan = cpu_plan(p, layout, threads, packed ? Packing::ahead : Packing::in_call);
  std::optional<Tensor> own;
  if (packed) {
    STD_TORCH_CHECK(packed->is_cpu() && packed->scalar_type() == ScalarType::Byte && packed->is_contiguous(),
                    "basis_conv2d: packed must be a contiguous uint8 tensor on the CPU");
    const int64_t expected_bytes = planned_bytes ? *planned_bytes : cpu_packed_bytes(w);
    STD_TORCH_CHECK(packed->numel() == expected_bytes && expected_bytes >= cpu_packed_bytes(layout),
                    "basis_conv2d: packed has ", packed->numel(), " bytes, these weights pack to ",
                    cpu_packed_bytes(w));
    const char* bytes = static_cast<const char*>(packed->const_data_ptr());
    const CpuPackHeader expected = cpu_pack_header(w, isa);
    STD_TORCH_CHECK(std::memcmp(bytes, &expected, sizeof(expected)) == 0,
                    "basis_conv2d: packed was made for other weights, another geometry or another instruction set; "
                    "call basis_conv2d_pack again");
    p.packed = bytes + kCpuPackHeaderBytes;
  } else {
    own = torch::stable::empty({cpu_packed_floats(plan.pack)}, ScalarType::Float);
    float* floats = static_cast<float*>(own->mutable_data_ptr());
    pack_into(w, plan.pack, call.basis_weight, call.coefficients, floats);
    p.packed = floats;
  }

  const CpuBasisConv2d kernels = kernels_for(w);
  torch::stable::parallel_for(0, plan.units, (plan.units + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    kernels.run(p, plan, static_cast<float*>(thread_memory(plan.scratch() * 4)), begin, end);
  });
  return filled;
}

const Tensor* address(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

Tensor forward(const Tensor& input, const Tensor& basis_weight, const Tensor& coefficients,
               const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
               const std::optional<Tensor>& packed, const std::vector<int64_t>& stride,
               const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
               const std::optional<std::string>& activation, bool precise) {
  const BasisConv2dSettings settings = settings_of(stride, padding, dilation, groups, activation, precise);
  const BasisConv2dCall call{input, basis_weight, coefficients, bias, residual, settings};
  return run(call, address(packed), false).output;
}

std::tuple<Tensor, Tensor> forward_maps(const Tensor& input, const Tensor& basis_weight, const Tensor& coefficients,
                                        const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                                        const std::optional<Tensor>& packed, const std::vector<int64_t>& stride,
                                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                        int64_t groups, const std::optional<std::string>& activation, bool precise) {
  const BasisConv2dSettings settings = settings_of(stride, padding, dilation, groups, activation, precise);
  const BasisConv2dCall call{input, basis_weight, coefficients, bias, residual, settings};
  const FilledBasisConv2d filled = run(call, address(packed), true);
  return {filled.output, *filled.maps};
}

Tensor plan(const Tensor& input, const Tensor& basis_weight, const Tensor& coefficients,
            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
            const std::vector<int64_t>& dilation, int64_t groups, const std::optional<std::string>& activation,
            bool precise, bool any_layout) {
  const BasisConv2dSettings settings = settings_of(stride, padding, dilation, groups, activation, precise);
  const BasisConv2dWeights w = describe(basis_weight, coefficients, settings);
  return bytes_of(plan_of(input, basis_weight, coefficients, settings, any_layout, cpu_packed_bytes(w)));
}

Tensor planned(const Tensor& input, const Tensor& basis_weight, const Tensor& coefficients,
               const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, const Tensor& packed,
               const Tensor& plan) {
  const BasisConv2dPlan p = plan_for(input, basis_weight, coefficients, plan);
  return run({input, basis_weight, coefficients, bias, residual, p.settings}, &packed, false, p.packed_bytes).output;
}

#if defined(__GNUC__) && !defined(__clang__)
#define BASISCONV_COMPILER "GCC " __VERSION__
#else
#define BASISCONV_COMPILER __VERSION__  // says its name
#endif
#define BASISCONV_TEXT_OF(...) #__VA_ARGS__
#define BASISCONV_TEXT(...) BASISCONV_TEXT_OF(__VA_ARGS__)

std::string build_facts() {
  std::string facts = "{\"compiler\": \"" BASISCONV_COMPILER "\", \"pack_format\": " + std::to_string(kCpuPackVersion) +
                      ", \"binary_pack_format\": " + std::to_string(kBinaryPackVersion) +
                      ", \"cpu\": {\"built\": [\"base\"";
  for (Isa isa : {Isa::avx2, Isa::avx512, Isa::avx512_vpopcntdq, Isa::avx512_bf16, Isa::amx}) {
    if (isa <= kWidestIsa) facts += ", \"" + std::string(isa_name(isa)) + "\"";
  }
  facts += "], \"processor\": \"" + std::string(isa_name(isa_of_processor()));
  facts += "\", \"in_use\": \"" + std::string(isa_name(isa_in_use())) + "\"}";
#ifdef BASISCONV_CUDA
  facts += ", \"cuda\": {\"built\": \"" BASISCONV_TEXT(BASISCONV_CUDA) "\", \"nvcc\": \"" BASISCONV_TEXT(
      BASISCONV_NVCC) "\"}";
#endif
  facts += "}";
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
      "basis_conv2d_plan(Tensor input, Tensor basis_weight, Tensor coefficients, int[] stride, int[] padding, "
      "int[] dilation, int groups, str? activation, bool precise, bool any_layout) -> Tensor");
  m.def(
      "basis_conv2d_planned(Tensor input, Tensor basis_weight, Tensor coefficients, Tensor? bias, Tensor? residual, "
      "Tensor packed, Tensor plan) -> Tensor");
  m.def(
      "basis_conv2d_pack(Tensor basis_weight, Tensor coefficients, int[] stride, int[] dilation, int groups, "
      "bool precise, int format) -> Tensor");
  m.def(
      "basis_conv2d_packed_bytes(int[] basis_weight_shape, int[] coefficients_shape, int[] stride, int[] dilation, "
      "int groups, bool precise) -> int");
  m.def("build_facts() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CPU, m) {
  m.impl("basis_conv2d", BASISCONV_BOX("basis_conv2d", &basisconv::forward));
  m.impl("basis_conv2d_maps", BASISCONV_BOX_FOR("basis_conv2d_maps", "basis_conv2d", &basisconv::forward_maps));
  m.impl("basis_conv2d_plan", TORCH_BOX(&basisconv::plan));
  m.impl("basis_conv2d_planned", TORCH_BOX(&basisconv::planned));
  m.impl("basis_conv2d_pack", BASISCONV_BOX_FOR("basis_conv2d_pack", "basis_conv2d", &basisconv::pack));
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CompositeExplicitAutograd, m) {
  m.impl("basis_conv2d_packed_bytes", TORCH_BOX(&basisconv::packed_bytes));
  m.impl("build_facts", TORCH_BOX(&basisconv::build_facts));
}

// As the schema above says; see shim_glue.h.
BASISCONV_SHIM aoti_torch_cpu_basis_conv2d(AtenTensorHandle input, AtenTensorHandle basis_weight,
                                           AtenTensorHandle coefficients, AtenTensorHandle* bias,
                                           AtenTensorHandle* residual, AtenTensorHandle* packed, const int64_t* stride,
                                           int64_t strides, const int64_t* padding, int64_t paddings,
                                           const int64_t* dilation, int64_t dilations, int64_t groups,
                                           const char** activation, int32_t precise, AtenTensorHandle* result) {
  using namespace basisconv;
  return shim::answer(result, [&] {
    return WithoutGradient<"basis_conv2d", "basis_conv2d", &forward>::call(
        shim::of(input), shim::of(basis_weight), shim::of(coefficients), shim::of(bias), shim::of(residual),
        shim::of(packed), shim::of(stride, strides), shim::of(padding, paddings), shim::of(dilation, dilations), groups,
        shim::of(activation), precise != 0);
  });
}
