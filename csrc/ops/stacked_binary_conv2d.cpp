// Torch glue of stacked_binary_conv2d: check, fill the params, launch, register. LibTorch stable ABI only.
//
// Python has checked already with better words; these checks protect memory where torch.ops, export or AOTInductor
// bypass Python.
#include "stacked_binary_conv2d.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "../cpu/stacked_binary_conv2d.h"
#include "glue.h"
#include "gradients_glue.h"
#include "shim_glue.h"
#include "torch_glue.h"

namespace basisconv {
namespace stacked {

constexpr int64_t kAddsWorthAThread = 1 << 20;

CpuStackedBinaryConv2d kernels(const StackedPack& pack) {
  // What was not compiled must not be named: it could not be linked.
  if constexpr (kWidestIsa >= Isa::amx) {
    if (pack.matrix) return cpu_stacked_binary_conv2d_amx();
  }
  if constexpr (kWidestIsa >= Isa::avx512) {
    if (isa_in_use() >= Isa::avx512) return cpu_stacked_binary_conv2d_avx512();
  }
  if constexpr (kWidestIsa >= Isa::avx2) {
    if (isa_in_use() >= Isa::avx2) return cpu_stacked_binary_conv2d_avx2();
  }
  return cpu_stacked_binary_conv2d_base();
}

// The arguments of a call that are no tensors, as numbers alone.
struct StackedSettings {
  int64_t bank[4], index[2];                   // shapes of the values
  int64_t stride[2], padding[4], dilation[2];  // padding: top, bottom, left, right
  int64_t groups, mode, activation;
};

template <size_t N>
void fill(int64_t (&to)[N], const std::vector<int64_t>& from, const char* name) {
  STD_TORCH_CHECK(from.size() == N, "stacked_binary_conv2d: ", name, " must have ", N, " numbers");
  std::copy(from.begin(), from.end(), to);
}

// Of the weights alone.
StackedSettings settings_of(const std::vector<int64_t>& bank_shape, const std::vector<int64_t>& index_shape,
                            int64_t groups) {
  StackedSettings s{};
  fill(s.bank, bank_shape, "the shape of bank [n, C/(groups*splits), R, S]");
  fill(s.index, index_shape, "the shape of index [K, splits]");
  s.groups = groups;
  return s;
}

StackedBinaryWeights describe(const StackedSettings& settings) {
  const auto& bank_shape = settings.bank;
  const auto& index_shape = settings.index;
  const int64_t groups = settings.groups;
  STD_TORCH_CHECK(groups > 0, "stacked_binary_conv2d: groups must be at least 1");
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

Tensor pack(const Tensor& bank, const Tensor& index, int64_t groups, int64_t format) {
  STD_TORCH_CHECK(format == kStackedPackVersion, "stacked_binary_conv2d_pack: this library packs format ",
                  kStackedPackVersion, ", the caller expects format ", format,
                  "; a program traced with another version must be traced again");
  STD_TORCH_CHECK(bank.dim() == 4 && bank.is_cpu() && bank.scalar_type() == ScalarType::Float && index.dim() == 2 &&
                      index.is_cpu() && index.scalar_type() == ScalarType::Long,
                  "stacked_binary_conv2d_pack: bank must be [n, C/(groups*splits), R, S] in float32 and index "
                  "[K, splits] in int64, both on the CPU");
  const StackedBinaryWeights w = describe(
      settings_of({bank.size(0), bank.size(1), bank.size(2), bank.size(3)}, {index.size(0), index.size(1)}, groups));
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
  const StackedPack tables = stacked_pack(w, isa_in_use()), matrix = stacked_matrix_pack(w, isa_in_use());
  const StackedPackHeader header = stacked_pack_header(w, matrix, isa_in_use());
  std::memcpy(bytes, &header, sizeof(header));
  uint32_t* words = reinterpret_cast<uint32_t*>(bytes + kStackedHeaderBytes);
  kernels(tables).pack(w, tables, values, places, words);
  if (matrix.matrix) kernels(matrix).pack(w, matrix, values, places, words + tables.size());
  return packed;
}

int64_t packed_bytes(const std::vector<int64_t>& bank_shape, const std::vector<int64_t>& index_shape, int64_t groups) {
  return stacked_packed_bytes(describe(settings_of(bank_shape, index_shape, groups)));
}

// Whether the native kernel runs full filters instead of stacking maps, on the instruction set in use.
bool expanded(const std::vector<int64_t>& bank_shape, const std::vector<int64_t>& index_shape, int64_t groups) {
  const StackedBinaryWeights w = describe(settings_of(bank_shape, index_shape, groups));
  const StackedPack matrix = stacked_matrix_pack(w, isa_in_use());
  return (matrix.matrix ? matrix : stacked_pack(w, isa_in_use())).expanded;
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

StackedSettings settings_of(const std::vector<int64_t>& bank_shape, const std::vector<int64_t>& index_shape,
                            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                            const std::vector<int64_t>& dilation, int64_t groups, const std::string& mode,
                            const std::optional<std::string>& activation) {
  StackedSettings s = settings_of(bank_shape, index_shape, groups);
  fill(s.stride, stride, "stride");
  fill(s.padding, padding, "padding (top, bottom, left, right)");
  fill(s.dilation, dilation, "dilation");
  s.mode = static_cast<int64_t>(mode_of(mode));
  STD_TORCH_CHECK(!activation || *activation == "relu" || *activation == "relu6",
                  "stacked_binary_conv2d: activation must be None, 'relu' or 'relu6'");
  s.activation = static_cast<int64_t>(!activation             ? Activation::none
                                      : *activation == "relu" ? Activation::relu
                                                              : Activation::relu6);
  return s;
}

Tensor run(const Tensor& input, const Tensor& packed, const std::optional<Tensor>& scale,
           const std::optional<Tensor>& bias, const StackedSettings& settings, Memory memory) {
  const auto& stride = settings.stride;
  const auto& padding = settings.padding;
  const auto& dilation = settings.dilation;
  StackedBinaryConv2dParams p{};
  p.weights = describe(settings);
  const StackedBinaryWeights& w = p.weights;
  STD_TORCH_CHECK(settings.mode >= 0 && settings.mode <= static_cast<int64_t>(StackedMode::packed_codes) &&
                      settings.activation >= 0 && settings.activation <= static_cast<int64_t>(Activation::relu6),
                  "stacked_binary_conv2d: no mode or activation has this number");
  p.mode = static_cast<StackedMode>(settings.mode);
  p.activation = static_cast<Activation>(settings.activation);
  STD_TORCH_CHECK(input.dim() >= 4, "stacked_binary_conv2d: input must be [N, C, H, W] or packed words");
  const ScalarType type = take_input(input, p);
  STD_TORCH_CHECK(stride[0] > 0 && stride[1] > 0 && dilation[0] > 0 && dilation[1] > 0,
                  "stacked_binary_conv2d: stride and dilation must be two numbers, at least 1");
  STD_TORCH_CHECK(padding[0] >= 0 && padding[1] >= 0 && padding[2] >= 0 && padding[3] >= 0,
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
  Tensor output = empty_maps(input, type, {p.N, w.K, p.OH, p.OW}, p.channels_last, memory);
  p.output = output.mutable_data_ptr();
  check_per_output(scale, w.K, "stacked_binary_conv2d", "scale");
  check_per_output(bias, w.K, "stacked_binary_conv2d", "bias");
  const PerOutput factors(scale, w.K, 1.0f), offsets(bias, w.K, 0.0f);
  p.scale = factors.values();
  p.bias = offsets.values();
  StackedPack layout = stacked_pack(w, isa_in_use());
  const StackedPack matrix = stacked_matrix_pack(w, isa_in_use());
  STD_TORCH_CHECK(
      packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
          packed.numel() == stacked_packed_bytes(w),
      "stacked_binary_conv2d: packed must be what stacked_binary_conv2d_pack gives for this bank and index");
  const char* bytes = static_cast<const char*>(packed.const_data_ptr());
  const StackedPackHeader expected = stacked_pack_header(w, matrix, isa_in_use());
  STD_TORCH_CHECK(std::memcmp(bytes, &expected, sizeof(expected)) == 0,
                  "stacked_binary_conv2d: packed was made for another bank or index, another version or another "
                  "instruction set; call stacked_binary_conv2d_pack again");
  p.packed = bytes + kStackedHeaderBytes;
  if (p.N == 0) return output;

  if (stacked_multiplies(p, matrix)) {
    p.packed = static_cast<const uint32_t*>(p.packed) + layout.size();
    layout = matrix;
  }
  STD_TORCH_CHECK(rows_fit(w, layout, p.packed),
                  "stacked_binary_conv2d: packed is damaged; call stacked_binary_conv2d_pack again");
  const StackedPlan plan = stacked_plan(p, layout);
  const int64_t filters = plan.pack.slices * plan.pack.filters;
  const int64_t wanted = p.N * p.OH * p.OW * filters * plan.pack.low * w.R * w.S / kAddsWorthAThread;
  const int64_t most = static_cast<int64_t>(torch::stable::get_num_threads()), units = p.N * p.OH;
  const int64_t threads = wanted < 1 ? 1 : wanted < most ? wanted : most;
  const CpuStackedBinaryConv2d compiled = kernels(plan.pack);
  torch::stable::parallel_for(0, units, (units + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    compiled.run(p, plan, static_cast<float*>(thread_memory(plan.scratch() * 4)), begin, end);
  });
  return output;
}

Tensor forward(const Tensor& input, const Tensor& packed, const std::optional<Tensor>& scale,
               const std::optional<Tensor>& bias, const std::vector<int64_t>& bank_shape,
               const std::vector<int64_t>& index_shape, const std::vector<int64_t>& stride,
               const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
               const std::string& mode, const std::optional<std::string>& activation) {
  const StackedSettings settings =
      settings_of(bank_shape, index_shape, stride, padding, dilation, groups, mode, activation);
  return run(input, packed, scale, bias, settings, Memory::by_torch);
}

// A call in one tensor of bytes, as in basis_conv2d.cpp: the settings, and what its maker saw of the tensors.
struct StackedPlanned {
  StackedSettings settings;
  int64_t bank[5], index[2];  // sizes as held: words of a packed bank have five
  int64_t planes, channels_last;
  int64_t types[5];  // of input, bank, index, scale and bias, -1 where there is none
};

StackedPlanned seen(const Tensor& input, const Tensor& bank, const Tensor& index, const std::optional<Tensor>& scale,
                    const std::optional<Tensor>& bias, const StackedSettings& settings) {
  StackedPlanned s{};
  s.settings = settings;
  const bool words = settings.mode >= static_cast<int64_t>(StackedMode::packed_signs);
  const int64_t dims = bank.dim();
  STD_TORCH_CHECK(input.dim() == (words ? 5 : 4) && (dims == 4 || dims == 5) && index.dim() == 2,
                  "stacked_binary_conv2d_planned: input, bank or index has another number of dimensions");
  for (int64_t i = 0; i < dims; ++i) s.bank[i] = bank.size(i);
  for (int64_t i = 0; i < 2; ++i) s.index[i] = index.size(i);
  s.planes = words ? input.size(1) : 0;
  s.channels_last = words || is_channels_last(input);
  const auto type = [](const std::optional<Tensor>& t) { return t ? static_cast<int64_t>(t->scalar_type()) : -1; };
  s.types[0] = static_cast<int64_t>(input.scalar_type());
  s.types[1] = static_cast<int64_t>(bank.scalar_type());
  s.types[2] = static_cast<int64_t>(index.scalar_type());
  s.types[3] = type(scale);
  s.types[4] = type(bias);
  return s;
}

Tensor plan(const Tensor& input, const Tensor& bank, const Tensor& index, const std::optional<Tensor>& scale,
            const std::optional<Tensor>& bias, const std::vector<int64_t>& bank_shape,
            const std::vector<int64_t>& index_shape, const std::vector<int64_t>& stride,
            const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
            const std::string& mode, const std::optional<std::string>& activation) {
  const StackedSettings settings =
      settings_of(bank_shape, index_shape, stride, padding, dilation, groups, mode, activation);
  return bytes_of(seen(input, bank, index, scale, bias, settings));
}

Tensor planned(const Tensor& input, const Tensor& bank, const Tensor& index, const std::optional<Tensor>& scale,
               const std::optional<Tensor>& bias, const Tensor& packed, const Tensor& plan) {
  const StackedPlanned p = from_bytes<StackedPlanned>(plan, "stacked_binary_conv2d");
  const StackedPlanned now = seen(input, bank, index, scale, bias, p.settings);
  STD_TORCH_CHECK(std::memcmp(&now, &p, sizeof(p)) == 0,
                  "stacked_binary_conv2d_planned: plan was made for other dtypes, another layout or other filters");
  return run(input, packed, scale, bias, p.settings, Memory::raw);
}

}  // namespace stacked
}  // namespace basisconv

STABLE_TORCH_LIBRARY_FRAGMENT(basisconv, m) {
  m.def(
      "stacked_binary_conv2d(Tensor input, Tensor packed, Tensor? scale, Tensor? bias, int[] bank_shape, "
      "int[] index_shape, int[] stride, int[] padding, int[] dilation, int groups, str mode, str? activation) "
      "-> Tensor");
  m.def(
      "stacked_binary_conv2d_plan(Tensor input, Tensor bank, Tensor index, Tensor? scale, Tensor? bias, "
      "int[] bank_shape, int[] index_shape, int[] stride, int[] padding, int[] dilation, int groups, str mode, "
      "str? activation) -> Tensor");
  m.def(
      "stacked_binary_conv2d_planned(Tensor input, Tensor bank, Tensor index, Tensor? scale, Tensor? bias, "
      "Tensor packed, Tensor plan) -> Tensor");
  m.def("stacked_binary_conv2d_pack(Tensor bank, Tensor index, int groups, int format) -> Tensor");
  m.def("stacked_binary_conv2d_packed_bytes(int[] bank_shape, int[] index_shape, int groups) -> int");
  m.def("stacked_binary_conv2d_expanded(int[] bank_shape, int[] index_shape, int groups) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CPU, m) {
  m.impl("stacked_binary_conv2d", BASISCONV_BOX("stacked_binary_conv2d", &basisconv::stacked::forward));
  m.impl("stacked_binary_conv2d_plan", TORCH_BOX(&basisconv::stacked::plan));
  m.impl("stacked_binary_conv2d_planned", TORCH_BOX(&basisconv::stacked::planned));
  m.impl("stacked_binary_conv2d_pack",
         BASISCONV_BOX_FOR("stacked_binary_conv2d_pack", "stacked_binary_conv2d", &basisconv::stacked::pack));
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CompositeExplicitAutograd, m) {
  m.impl("stacked_binary_conv2d_packed_bytes", TORCH_BOX(&basisconv::stacked::packed_bytes));
  m.impl("stacked_binary_conv2d_expanded", TORCH_BOX(&basisconv::stacked::expanded));
}

// As the schema above says; see shim_glue.h.
BASISCONV_SHIM aoti_torch_cpu_stacked_binary_conv2d(
    AtenTensorHandle input, AtenTensorHandle packed, AtenTensorHandle* scale, AtenTensorHandle* bias,
    const int64_t* bank_shape, int64_t bank_dims, const int64_t* index_shape, int64_t index_dims, const int64_t* stride,
    int64_t strides, const int64_t* padding, int64_t paddings, const int64_t* dilation, int64_t dilations,
    int64_t groups, const char* mode, const char** activation, AtenTensorHandle* result) {
  using namespace basisconv;
  return shim::answer(result, [&] {
    return WithoutGradient<"stacked_binary_conv2d", "stacked_binary_conv2d", &stacked::forward>::call(
        shim::of(input), shim::of(packed), shim::of(scale), shim::of(bias), shim::of(bank_shape, bank_dims),
        shim::of(index_shape, index_dims), shim::of(stride, strides), shim::of(padding, paddings),
        shim::of(dilation, dilations), groups, mode, shim::of(activation));
  });
}
