// What the torch glue of bitpack has in common for all devices: checks and the filling of the params. Included by
// csrc/ops/*.cpp alone; LibTorch stable ABI only.
#pragma once
#include "bitpack.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

namespace basisconv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline BitpackType bitpack_type(const Tensor& input) {
  switch (input.scalar_type()) {
    case ScalarType::Float:
      return BitpackType::f32;
    case ScalarType::BFloat16:
      return BitpackType::bf16;
    case ScalarType::Half:
      return BitpackType::f16;
    case ScalarType::Int:
      return BitpackType::i32;
    default:
      STD_TORCH_CHECK(false, "bitpack: input must be float32, bfloat16, float16 or int32 in the native op");
  }
}

inline void fill_bitpack_input(BitpackParams& p, const Tensor& input) {
  STD_TORCH_CHECK(input.dim() == 4 && input.size(1) > 0,
                  "bitpack: input must be [N, C, H, W] with at least one channel");
  p.type = bitpack_type(input);
  p.N = input.size(0);
  p.C = input.size(1);
  p.H = input.size(2);
  p.W = input.size(3);
  p.input = input.const_data_ptr();
  p.stride_n = input.stride(0);
  p.stride_c = input.stride(1);
  p.stride_h = input.stride(2);
  p.stride_w = input.stride(3);
}

// Params with the tensors that they point to.
struct FilledBitpack {
  BitpackParams params;  // without `flip`
  Tensor output, threshold, flip;
};

// Checks everything but where the tensors are, and allocates the words beside input.
inline FilledBitpack fill_bitpack(const Tensor& input, const std::optional<Tensor>& threshold,
                                  const std::optional<Tensor>& flip, int64_t bits, bool codes) {
  STD_TORCH_CHECK(bits >= 1 && bits <= 4 && (codes || bits == 1), "bitpack: bits must be 1 to 4, and 1 for signs");
  FilledBitpack filled{};
  BitpackParams& p = filled.params;
  fill_bitpack_input(p, input);
  p.planes = static_cast<int32_t>(bits);
  p.codes = codes;
  if (threshold) {
    const ScalarType expected = p.type == BitpackType::i32 ? ScalarType::Int : ScalarType::Float;
    STD_TORCH_CHECK(!codes && flip && threshold->dim() == 1 && flip->dim() == 1 && threshold->size(0) == p.C &&
                        flip->size(0) == p.C && threshold->scalar_type() == expected &&
                        flip->scalar_type() == ScalarType::Bool,
                    "bitpack: threshold must be [C] in float32, for int32 in int32, and flip [C] in bool");
    filled.threshold = torch::stable::contiguous(*threshold);
    filled.flip = torch::stable::contiguous(*flip);
    p.threshold = filled.threshold.const_data_ptr();
  }
  filled.output =
      torch::stable::empty({p.N, bits, p.H, p.W, words_for(p.C)}, ScalarType::Int, std::nullopt, input.device());
  p.output = static_cast<uint32_t*>(filled.output.mutable_data_ptr());
  return filled;
}

}  // namespace basisconv
