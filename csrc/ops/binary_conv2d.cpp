// Torch glue of binary_conv2d: check, fill the params, launch, register. LibTorch stable ABI only.
//
// Python has checked already with better words; these checks protect memory where torch.ops, export or AOTInductor
// bypass Python.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "../cpu/binary_conv2d.h"
#include "../cpu/binary_conv2d_table.h"
#include "../cpu/bitpack.h"
#include "binary_conv2d_glue.h"
#include "gradients_glue.h"
#include "shim_glue.h"

namespace basisconv {
namespace {

constexpr int64_t kMacsWorthAThread = 1 << 22;

CpuBinaryConv2d kernels_for(BinaryRaw raw) {
  const Isa isa = binary_isa_for(isa_in_use());
  // What was not compiled must not be named: it could not be linked.
  if constexpr (kWidestIsa >= Isa::amx) {
    if (raw == BinaryRaw::products) return cpu_binary_conv2d_amx();
  }
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
  kernels_for(BinaryRaw::counts)
      .pack(w, layout, sign_words(w, weight, words).data(), reinterpret_cast<int32_t*>(counts),
            reinterpret_cast<uint8_t*>(counts + layout.counts_bytes));
}

Tensor pack(const Tensor& weight, bool words, int64_t channels, int64_t groups, int64_t format) {
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

Tensor run(const BinaryCall& call, const Tensor* packed, const BinarySettings& settings, Memory memory) {
  const auto& [input, weight, scale, bias, pixel_scale, threshold, flip] = call;
  const auto on_cpu = [](const std::optional<Tensor>& t) { return !t || t->is_cpu(); };
  STD_TORCH_CHECK(input.is_cpu() && weight.is_cpu() && on_cpu(scale) && on_cpu(bias) && on_cpu(pixel_scale) &&
                      on_cpu(threshold) && on_cpu(flip),
                  "binary_conv2d: all tensors must be on the CPU");
  BinaryConv2dParams p{};
  p.weights = describe(weight, settings.packed_weight != 0, settings.channels, settings.groups);
  const BinaryConv2dWeights& w = p.weights;
  fill_input(p, input, settings.encoding);
  fill_settings(p, settings);
  check_sums(p);
  p.channels_last = settings.encoding != 0 || is_channels_last(input);
  const ScalarType type = scalar_of(p.output_type);
  std::optional<Tensor> made;
  if (p.output_type != BinaryOutput::packed) {
    made = empty_maps(input, type, {p.N, w.K, p.OH, p.OW}, p.channels_last, memory);
  } else if (const int64_t words = words_for(w.K); memory == Memory::raw) {
    const std::array<int64_t, 5> strides{p.OH * p.OW * words, p.OH * p.OW * words, p.OW * words, words, 1};
    made = raw_tensor<5>(input, type, {p.N, 1, p.OH, p.OW, words}, strides);
  } else {
    made = torch::stable::empty({p.N, 1, p.OH, p.OW, words}, type);
  }
  Tensor& result = *made;
  p.output = result.mutable_data_ptr();
  std::optional<PerOutput> scales, biases;
  std::optional<Tensor> pixels;
  if (p.output_type != BinaryOutput::i32 && p.output_type != BinaryOutput::packed) {
    check_per_output(scale, w.K, "binary_conv2d", "scale");
    check_per_output(bias, w.K, "binary_conv2d", "bias");
    p.scale = scales.emplace(scale, w.K, 1.0f).values();
    p.bias = biases.emplace(bias, w.K, 0.0f).values();
    if (pixel_scale) {
      check_pixel_scale(p, *pixel_scale);
      pixels = as_float(*pixel_scale);
      p.pixel_scale = static_cast<const float*>(pixels->const_data_ptr());
    }
  }
  check_threshold(threshold, flip, w.K);
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
    pack_into(w, weight, settings.packed_weight != 0, own.data());
    bytes = own.data();
  }
  p.packed = bytes + sizeof(BinaryPackHeader);

  const int64_t macs = p.N * p.OH * p.OW * p.planes * w.K * (w.C / w.groups) * w.R * w.S;
  const int64_t most = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t wanted = macs / kMacsWorthAThread;
  const int64_t threads = wanted < 1 ? 1 : wanted < most ? wanted : most;
  const BinaryPlan plan = binary_plan(p, layout, isa, threads);

  BinaryBorders borders = binary_borders(p, plan, static_cast<const int32_t*>(p.packed));
  p.factor = borders.factor;
  std::vector<int32_t> flipped(w.groups * layout.padded, 0);
  if (p.output_type == BinaryOutput::packed) {
    std::vector<int32_t> bounds(w.groups * layout.padded, 0);
    if (threshold) {
      bounds = spread<int32_t>(*threshold, w, layout, 1);
      flipped = spread<bool>(*flip, w, layout, -1);
    }
    binary_limits(p, layout, borders.rows.count() * borders.columns.count(), bounds.data(), flipped.data(),
                  borders.table.data());
  }
  p.table = borders.table.data();
  p.flip = flipped.data();
  p.row_class = borders.rows.of.data();
  p.column_class = borders.columns.of.data();
  p.column_classes = borders.columns.count();

  const CpuBinaryConv2d kernels = kernels_for(plan.raw);
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
  m.def(
      "binary_conv2d_plan(Tensor input, Tensor weight, Tensor? scale, Tensor? bias, Tensor? pixel_scale, "
      "Tensor? threshold, Tensor? flip, int[] stride, int[] padding, int padding_value, int[] dilation, int groups, "
      "str? activation, str output, int channels, str? encoding, bool packed_weight) -> Tensor");
  m.def(
      "binary_conv2d_planned(Tensor input, Tensor weight, Tensor? scale, Tensor? bias, Tensor? pixel_scale, "
      "Tensor? threshold, Tensor? flip, Tensor packed, Tensor plan) -> Tensor");
  m.def("binary_conv2d_pack(Tensor weight, bool words, int channels, int groups, int format) -> Tensor");
  m.def("binary_conv2d_packed_bytes(int K, int R, int S, int channels, int groups) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CPU, m) {
  m.impl("binary_conv2d", BASISCONV_BOX("binary_conv2d", &basisconv::binary_forward<basisconv::run>));
  m.impl("binary_conv2d_plan", TORCH_BOX(&basisconv::binary_call_plan));
  m.impl("binary_conv2d_planned", TORCH_BOX(&basisconv::binary_planned<basisconv::run>));
  m.impl("binary_conv2d_pack", BASISCONV_BOX_FOR("binary_conv2d_pack", "binary_conv2d", &basisconv::pack));
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CompositeExplicitAutograd, m) {
  m.impl("binary_conv2d_packed_bytes", TORCH_BOX(&basisconv::packed_bytes));
}

// As the schema above says; see shim_glue.h.
BASISCONV_SHIM aoti_torch_cpu_binary_conv2d(AtenTensorHandle input, AtenTensorHandle weight, AtenTensorHandle* scale,
                                            AtenTensorHandle* bias, AtenTensorHandle* pixel_scale,
                                            AtenTensorHandle* threshold, AtenTensorHandle* flip,
                                            AtenTensorHandle* packed, const int64_t* stride, int64_t strides,
                                            const int64_t* padding, int64_t paddings, int64_t padding_value,
                                            const int64_t* dilation, int64_t dilations, int64_t groups,
                                            const char** activation, const char* output, int64_t channels,
                                            const char** encoding, int32_t packed_weight, AtenTensorHandle* result) {
  using namespace basisconv;
  return shim::answer(result, [&] {
    return WithoutGradient<"binary_conv2d", "binary_conv2d", &binary_forward<run>>::call(
        shim::of(input), shim::of(weight), shim::of(scale), shim::of(bias), shim::of(pixel_scale), shim::of(threshold),
        shim::of(flip), shim::of(packed), shim::of(stride, strides), shim::of(padding, paddings), padding_value,
        shim::of(dilation, dilations), groups, shim::of(activation), output, channels, shim::of(encoding),
        packed_weight != 0);
  });
}
