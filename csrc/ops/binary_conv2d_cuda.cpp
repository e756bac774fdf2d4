// Torch glue of binary_conv2d for CUDA tensors: check, fill the params, launch on the current stream, register.
// LibTorch stable ABI only; compiled against any torch, CPU-only ones too.
//
// Up to four kernels run: real input and real weights become words, weights are packed unless they are already, then
// the convolution. Bits of groups that end inside a byte are made of whole numbers by one more.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../cuda/binary_conv2d.h"
#include "../cuda/bitpack.h"
#include "binary_conv2d_glue.h"
#include "bitpack_glue.h"
#include "cuda_stream.h"
#include "gradients_glue.h"

namespace basisconv {
namespace {

void launched(const char* wrong) { STD_TORCH_CHECK(wrong == nullptr, "binary_conv2d on CUDA: ", wrong); }

// Words [N, 1, H, W, words_for(C)] of the signs of maps or filters, or of thresholds' bits.
Tensor packed_signs(const Tensor& maps, const std::optional<Tensor>& threshold, const std::optional<Tensor>& flip,
                    void* stream) {
  const FilledBitpack filled = fill_bitpack(maps, threshold, flip, 1, false);
  CudaBitpack call{};
  call.params = filled.params;
  if (threshold) call.flip = static_cast<const bool*>(filled.flip.const_data_ptr());
  launched(cuda_bitpack(call, stream));
  return filled.output;
}

Tensor pack_on(const BinaryConv2dWeights& w, const Tensor& weight, bool words, void* stream) {
  const Tensor signs = words ? weight : packed_signs(weight, std::nullopt, std::nullopt, stream);
  Tensor packed = torch::stable::empty({cuda_binary_packed_bytes(w)}, ScalarType::Byte, std::nullopt, weight.device());
  launched(
      cuda_binary_pack(w, static_cast<const uint32_t*>(signs.const_data_ptr()), packed.mutable_data_ptr(), stream));
  return packed;
}

Tensor pack(Tensor weight, bool words, int64_t channels, int64_t groups, int64_t /*format*/) {
  const BinaryConv2dWeights w = describe(weight, words, channels, groups);
  const int32_t device = weight.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  return pack_on(w, weight, words, current_cuda_stream(device));
}

int64_t packed_bytes(int64_t K, int64_t R, int64_t S, int64_t channels, int64_t groups) {
  STD_TORCH_CHECK(K > 0 && R > 0 && S > 0 && channels > 0 && groups > 0,
                  "binary_conv2d_cuda_packed_bytes: no empty sizes");
  return cuda_binary_packed_bytes(BinaryConv2dWeights{channels, K, R, S, groups});
}

// Numbers for the kernel, which reads every float type; `kept` holds them.
CudaFactor factor(const std::optional<Tensor>& given, Tensor& kept, const char* name) {
  if (!given) return {nullptr, FactorType::f32};
  kept = torch::stable::contiguous(*given);
  const void* values = kept.const_data_ptr();
  switch (kept.scalar_type()) {
    case ScalarType::Float:
      return {values, FactorType::f32};
    case ScalarType::BFloat16:
      return {values, FactorType::bf16};
    case ScalarType::Half:
      return {values, FactorType::f16};
    case ScalarType::Double:
      return {values, FactorType::f64};
    default:
      STD_TORCH_CHECK(false, "binary_conv2d: ", name, " must be real numbers");
  }
}

// The result on the device of `input`; channels_last where the params say so.
Tensor fresh_output(const BinaryConv2dParams& p, BinaryOutput type, const Tensor& input, Memory memory) {
  const int64_t K = p.weights.K;
  if (type != BinaryOutput::packed) {
    return empty_maps(input, scalar_of(type), {p.N, K, p.OH, p.OW}, p.channels_last, memory);
  }
  return torch::stable::empty({p.N, 1, p.OH, p.OW, words_for(K)}, ScalarType::Int, std::nullopt, input.device());
}

Tensor run(const BinaryCall& tensors, const Tensor* packed, const BinarySettings& settings, Memory memory) {
  const auto& [input, weight, scale, bias, pixel_scale, threshold, flip] = tensors;
  const torch::stable::Device device_of_input = input.device();
  const auto beside = [&](const std::optional<Tensor>& t) { return !t || t->device() == device_of_input; };
  STD_TORCH_CHECK(weight.device() == device_of_input && beside(scale) && beside(bias) && beside(pixel_scale) &&
                      beside(threshold) && beside(flip) && (packed == nullptr || packed->device() == device_of_input),
                  "binary_conv2d: all tensors must be on one device");
  CudaBinaryConv2d call{};
  BinaryConv2dParams& p = call.params;
  p.weights = describe(weight, settings.packed_weight != 0, settings.channels, settings.groups);
  const BinaryConv2dWeights& w = p.weights;
  fill_input(p, input, settings.encoding);
  fill_settings(p, settings);
  check_sums(p);
  p.channels_last = settings.encoding != 0 || is_channels_last(input);
  const BinaryOutput wanted = p.output_type;
  const bool numbers = wanted != BinaryOutput::i32 && wanted != BinaryOutput::packed;
  for (const auto* t : {&scale, &bias}) {
    STD_TORCH_CHECK(!*t || (numbers && (*t)->dim() == 1 && (*t)->size(0) == w.K),
                    "binary_conv2d: scale and bias must be [K], and belong to float results");
  }
  if (pixel_scale) {
    STD_TORCH_CHECK(numbers, "binary_conv2d: pixel_scale belongs to float results");
    check_pixel_scale(p, *pixel_scale);
  }
  check_threshold(threshold, flip, w.K);

  const int32_t index = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  // Bits of groups that end inside a byte are made of whole numbers.
  const bool in_two = wanted == BinaryOutput::packed && !cuda_binary_packs_output(w);
  p.channels_last |= in_two;
  p.output_type = in_two ? BinaryOutput::i32 : wanted;
  Tensor result = fresh_output(p, p.output_type, input, memory);
  if (p.N == 0) return in_two ? fresh_output(p, wanted, input, memory) : result;
  p.output = result.mutable_data_ptr();
  void* stream = current_cuda_stream(index);
  CudaDevice device{};
  launched(cuda_device(index, &device));

  Tensor scales, biases, pixels, bounds, flips, words, own;
  call.scale = factor(scale, scales, "scale");
  call.bias = factor(bias, biases, "bias");
  call.pixel_scale = factor(pixel_scale, pixels, "pixel_scale");
  if (threshold && !in_two) {
    bounds = torch::stable::contiguous(*threshold);
    flips = torch::stable::contiguous(*flip);
    call.threshold = static_cast<const int32_t*>(bounds.const_data_ptr());
    call.flip = static_cast<const bool*>(flips.const_data_ptr());
  }
  if (packed) {
    STD_TORCH_CHECK(packed->scalar_type() == ScalarType::Byte && packed->is_contiguous() &&
                        packed->numel() == cuda_binary_packed_bytes(w),
                    "binary_conv2d: packed has ", packed->numel(), " bytes, these weights pack to ",
                    cuda_binary_packed_bytes(w), " on CUDA; call binary_conv2d_pack again");
    p.packed = packed->const_data_ptr();
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(p.packed) % 16 == 0,
                    "binary_conv2d: packed must begin at a multiple of 16 bytes, as binary_conv2d_pack gives it");
  } else {
    own = pack_on(w, weight, settings.packed_weight != 0, stream);
    p.packed = own.const_data_ptr();
  }
  if (p.input_type != BinaryInput::packed) {
    words = packed_signs(input, std::nullopt, std::nullopt, stream);
    p.input = words.const_data_ptr();
    p.input_type = BinaryInput::packed;
  }
  launched(cuda_binary_conv2d(call, device, stream));
  return in_two ? packed_signs(result, threshold, flip, stream) : result;
}

}  // namespace
}  // namespace basisconv

STABLE_TORCH_LIBRARY_FRAGMENT(basisconv, m) {
  m.def("binary_conv2d_cuda_packed_bytes(int K, int R, int S, int channels, int groups) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CUDA, m) {
  m.impl("binary_conv2d", BASISCONV_BOX("binary_conv2d", &basisconv::binary_forward<basisconv::run>));
  m.impl("binary_conv2d_plan", TORCH_BOX(&basisconv::binary_call_plan));
  m.impl("binary_conv2d_planned", TORCH_BOX(&basisconv::binary_planned<basisconv::run>));
  m.impl("binary_conv2d_pack", BASISCONV_BOX_FOR("binary_conv2d_pack", "binary_conv2d", &basisconv::pack));
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CompositeExplicitAutograd, m) {
  m.impl("binary_conv2d_cuda_packed_bytes", TORCH_BOX(&basisconv::packed_bytes));
}
