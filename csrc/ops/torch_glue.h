// What the torch glue of several ops shares and needs torch's headers for: fresh and dense maps. Included by
// csrc/ops/*.cpp and their glue alone; LibTorch stable ABI only.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "../common/dtype.h"

namespace basisconv {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using MapSizes = std::array<int64_t, 4>;  // N, C, H, W

// Strides of dense maps.
inline MapSizes dense_strides(const MapSizes& sizes, bool channels_last) {
  const int64_t C = sizes[1], H = sizes[2], W = sizes[3];
  if (channels_last) return {C * H * W, 1, C * W, C};
  return {C * H * W, H * W, W, 1};
}

// `raw` is not filled in torch's deterministic mode, so callers that torch's users see directly take `by_torch`.
enum class Memory { by_torch, raw };

// A fresh dense tensor beside another one. torch::stable::empty looks its op up by name and boxes every argument; this
// takes half the time.
template <size_t D>
Tensor raw_tensor(const Tensor& beside, ScalarType type, const std::array<int64_t, D>& sizes,
                  const std::array<int64_t, D>& strides) {
  const int32_t dtype = type == ScalarType::Float      ? aoti_torch_dtype_float32()
                        : type == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                        : type == ScalarType::Half     ? aoti_torch_dtype_float16()
                                                       : aoti_torch_dtype_int32();
  STD_TORCH_CHECK(type == ScalarType::Int || dtype != aoti_torch_dtype_int32(), "basisconv: a result of an odd dtype");
  int32_t device = 0;
  AtenTensorHandle made = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_device_type(beside.get(), &device) == AOTI_TORCH_SUCCESS &&
                      aoti_torch_empty_strided(D, sizes.data(), strides.data(), dtype, device,
                                               beside.get_device_index(), &made) == AOTI_TORCH_SUCCESS,
                  "basisconv: no memory for a result");
  return Tensor(made);
}

// Uninitialised maps beside another tensor.
inline Tensor empty_maps(const Tensor& beside, ScalarType type, const MapSizes& sizes, bool channels_last,
                         Memory memory) {
  if (memory == Memory::raw) return raw_tensor(beside, type, sizes, dense_strides(sizes, channels_last));
  return torch::stable::empty({sizes.data(), sizes.size()}, type, std::nullopt, beside.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// `maps` themselves where they are dense in that layout already.
inline Tensor dense_maps(const Tensor& maps, bool channels_last) {
  const MapSizes strides = dense_strides({maps.size(0), maps.size(1), maps.size(2), maps.size(3)}, channels_last);
  bool same = true;
  for (int i = 0; i < 4; ++i) same = same && maps.stride(i) == strides[i];
  if (same) return maps;
  return torch::stable::contiguous(maps, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// `t` itself where it is dense, in the order of its dimensions, and float32 already.
inline Tensor as_float(const Tensor& t) {
  const Tensor dense = t.is_contiguous() ? t : torch::stable::contiguous(t);
  return dense.scalar_type() == ScalarType::Float ? dense : torch::stable::to(dense, ScalarType::Float);
}

// Numbers of outputs, factors or offsets, must be one an output.
inline void check_per_output(const std::optional<Tensor>& given, int64_t K, const char* op, const char* name) {
  STD_TORCH_CHECK(!given || (given->dim() == 1 && given->size(0) == K && given->is_cpu()), op, ": ", name,
                  " must be [K] on the CPU");
}

// A number an output as [K] floats: those of the tensor where they lie side by side, else copies; one number counts for
// all outputs. 16-bit numbers are converted here: torch's own conversion takes 1.4 us.
class PerOutput {
 public:
  PerOutput(const std::optional<Tensor>& given, int64_t K, float absent) {
    if (!given) {
      own_.assign(K, absent);
    } else if (given->scalar_type() == ScalarType::BFloat16) {
      copy<bf16>(*given, K);
    } else if (given->scalar_type() == ScalarType::Half) {
      copy<f16>(*given, K);
    } else {
      kept_ = as_float(*given);
      if (kept_->numel() == 1) copy<float>(*kept_, K);
    }
  }
  PerOutput(const PerOutput&) = delete;
  PerOutput& operator=(const PerOutput&) = delete;

  const float* values() const {
    return own_.empty() && kept_ ? static_cast<const float*>(kept_->const_data_ptr()) : own_.data();
  }

 private:
  template <typename T>
  void copy(const Tensor& given, int64_t K) {
    const T* from = static_cast<const T*>(given.const_data_ptr());
    const int64_t step = given.numel() == 1 ? 0 : given.stride(0);
    own_.resize(K);
    for (int64_t k = 0; k < K; k++) own_[k] = to_float(from[k * step]);
  }

  std::optional<Tensor> kept_;
  std::vector<float> own_;
};

// The bytes of a struct of numbers as a tensor, and back: see docs/dispatch.md on plans.
template <typename T>
Tensor bytes_of(const T& numbers) {
  Tensor bytes = torch::stable::empty({sizeof(T)}, ScalarType::Byte);
  std::memcpy(bytes.mutable_data_ptr(), &numbers, sizeof(T));
  return bytes;
}

template <typename T>
T from_bytes(const Tensor& bytes, const char* op) {
  STD_TORCH_CHECK(
      bytes.is_cpu() && bytes.scalar_type() == ScalarType::Byte && bytes.is_contiguous() && bytes.numel() == sizeof(T),
      op, "_planned: plan must be what ", op, "_plan gives");
  T numbers;
  std::memcpy(&numbers, bytes.const_data_ptr(), sizeof(T));
  return numbers;
}

}  // namespace basisconv
