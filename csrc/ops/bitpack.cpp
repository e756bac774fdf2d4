// Torch glue of bitpack: check, fill the params, launch, register. LibTorch stable ABI only.
#include "bitpack_glue.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "../cpu/bitpack.h"
#include "../cpu/isa.h"
#include "gradients_glue.h"
#include "shim_glue.h"

namespace basisconv {
namespace {

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

Tensor bitpack(Tensor input, std::optional<Tensor> threshold, std::optional<Tensor> flip, int64_t bits, bool codes) {
  STD_TORCH_CHECK(input.is_cpu() && (!threshold || threshold->is_cpu()) && (!flip || flip->is_cpu()),
                  "bitpack: all tensors must be on the CPU");
  const FilledBitpack filled = fill_bitpack(input, threshold, flip, bits, codes);
  BitpackParams p = filled.params;
  std::vector<uint32_t> flipped(words_for(p.C), 0u);
  p.flip = flipped.data();
  if (threshold) {
    const bool* flags = static_cast<const bool*>(filled.flip.const_data_ptr());
    for (int64_t c = 0; c < p.C; c++) flipped[c / kWordBits] |= static_cast<uint32_t>(flags[c]) << (c % kWordBits);
  }
  const int64_t rows = p.N * p.H;
  if (rows == 0 || p.W == 0) return filled.output;
  const CpuBitpack kernel = kernel_in_use();
  const int64_t grain = kNumbersWorthAThread / (p.C * p.W) + 1;
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return filled.output;
}

}  // namespace
}  // namespace basisconv

STABLE_TORCH_LIBRARY_FRAGMENT(basisconv, m) {
  m.def("bitpack(Tensor input, Tensor? threshold, Tensor? flip, int bits, bool codes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(basisconv, CPU, m) { m.impl("bitpack", BASISCONV_BOX("bitpack", &basisconv::bitpack)); }

// As the schema above says; see shim_glue.h.
BASISCONV_SHIM aoti_torch_cpu_bitpack(AtenTensorHandle input, AtenTensorHandle* threshold, AtenTensorHandle* flip,
                                      int64_t bits, int32_t codes, AtenTensorHandle* result) {
  using namespace basisconv;
  return shim::answer(result, [&] {
    return WithoutGradient<"bitpack", "bitpack", &bitpack>::call(shim::of(input), shim::of(threshold), shim::of(flip),
                                                                 bits, codes != 0);
  });
}
