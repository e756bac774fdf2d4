// Torch glue of bitpack: check, fill the params, launch, register. LibTorch stable ABI only.
#include "bitpack.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "../cpu/bitpack.h"
#include "../cpu/isa.h"

namespace basisconv {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kNumbersWorthAThread = 1 << 17;

CpuBitpack kernel_in_use() {
  const Isa isa = isa_in_use();
  // What was not compiled must not be named: it could not be linked.
  if constexpr (kWidestIsa >= Isa::avx512) {
    if (isa >= Isa::avx512) return cpu_bitpack_avx512;
  }
  if constexpr (kWidestIsa >= Isa::avx2) {
    if (isa >= Isa::avx2) return cpu_bitpack_avx2;
  }
  return cpu_bitpack_base;
}

BitpackType type_of(const Tensor& input) {
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

Tensor bitpack(Tensor input, std::optional<Tensor> threshold, std::optional<Tensor> flip, int64_t bits, bool codes) {
  STD_TORCH_CHECK(input.dim() == 4 && input.is_cpu() && input.size(1) > 0,
                  "bitpack: input must be [N, C, H, W] on the CPU with at least one channel");
  STD_TORCH_CHECK(bits >= 1 && bits <= 4 && (codes || bits == 1), "bitpack: bits must be 1 to 4, and 1 for signs");
  BitpackParams p{};
  p.type = type_of(input);
  p.N = input.size(0);
  p.C = input.size(1);
  p.H = input.size(2);
  p.W = input.size(3);
  p.planes = static_cast<int32_t>(bits);
  p.codes = codes;
  p.input = input.const_data_ptr();
  p.stride_n = input.stride(0);
  p.stride_c = input.stride(1);
  p.stride_h = input.stride(2);
  p.stride_w = input.stride(3);
  const int64_t words = words_for(p.C);
  std::vector<uint32_t> flipped(words, 0u);
  p.flip = flipped.data();
  Tensor bounds;
  if (threshold) {
    const ScalarType expected = p.type == BitpackType::i32 ? ScalarType::Int : ScalarType::Float;
    STD_TORCH_CHECK(!codes && flip && threshold->is_cpu() && flip->is_cpu() && threshold->dim() == 1 &&
                        flip->dim() == 1 && threshold->size(0) == p.C && flip->size(0) == p.C &&
                        threshold->scalar_type() == expected && flip->scalar_type() == ScalarType::Bool,
                    "bitpack: threshold must be [C] in float32, for int32 in int32, and flip [C] in bool");
    bounds = torch::stable::contiguous(*threshold);
    p.threshold = bounds.const_data_ptr();
    const Tensor dense = torch::stable::contiguous(*flip);
    const bool* flags = static_cast<const bool*>(dense.const_data_ptr());
    for (int64_t c = 0; c < p.C; c++) flipped[c / kWordBits] |= static_cast<uint32_t>(flags[c]) << (c % kWordBits);
  }
  Tensor output = torch::stable::empty({p.N, bits, p.H, p.W, words}, ScalarType::Int);
  p.output = static_cast<uint32_t*>(output.mutable_data_ptr());
  const int64_t rows = p.N * p.H;
  if (rows == 0 || p.W == 0) return output;
  const CpuBitpack kernel = kernel_in_use();
  const int64_t grain = kNumbersWorthAThread / (p.C * p.W) + 1;
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return output;
}

}  // namespace
}  // namespace basisconv

STABLE_TORCH_LIBRARY_FRAGMENT(basisconv, m) {
  m.def("bitpack(Tensor input, Tensor? threshold, Tensor? flip, int bits, bool codes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CPU, m) { m.impl("bitpack", TORCH_BOX(&basisconv::bitpack)); }
