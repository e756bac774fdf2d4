// stacked_binary_conv2d on the matrix unit of x86 (AMX): a bit a weight. Wins where slices have enough channels to fill
// tiles: see stacked_pack. Test: tests/packaging/test_stacked_without_torch.py. Bench: python -m bench run --suite C9.
#include "stacked_binary_conv2d.h"

#include "sign_products.h"

namespace basisconv {
namespace BASISCONV_ISA {
namespace {

// +1 or -1.
struct OneBit {
  static constexpr int64_t kPlanes = 1;
  static BASISCONV_INLINE void expand(const uint32_t* words, int64_t, bf16* to) {
    const __m512i plus = _mm512_set1_epi16(0x3f80), minus = _mm512_set1_epi16(static_cast<int16_t>(0xbf80));
    BASISCONV_UNROLL for (int i = 0; i < kTilePlaces; i++) {
      _mm512_storeu_si512(to + i * kDepth, _mm512_mask_blend_epi16(static_cast<__mmask32>(words[i]), minus, plus));
    }
  }
};

void pack(const StackedBinaryWeights& w, const StackedPack& pack, const float* bank, const int64_t* index,
          uint32_t* packed) {
  const int64_t taps = w.R * w.S, bank_low = w.C / w.groups / w.splits;
  memset(packed, 0, pack.words_size * sizeof(uint32_t));
  for (int64_t set = 0; set < pack.sets; set++) {
    for (int64_t f = 0; f < pack.filters; f++) {
      for (int64_t c = 0; c < pack.low; c++) {
        const int64_t j = filter_of_channel(w, pack, index, set, f, c),
                      block = f / kTilePlaces * pack.count + c / kDepth;
        const int64_t bit = f % kTilePlaces * 2 + c % kDepth / kTilePlaces;
        for (int64_t t = 0; t < taps; t++) {
          const bool positive = bank[(j * bank_low + c % bank_low) * taps + t] > 0.0f;
          uint32_t* words = packed + set * pack.set_size + (block * taps + t) * kTilePlaces;
          words[c % kTilePlaces] |= static_cast<uint32_t>(positive) << bit;
        }
      }
    }
  }
  pack_rows(w, pack, index, packed);
}

}  // namespace
}  // namespace BASISCONV_ISA

CpuStackedBinaryConv2d cpu_stacked_binary_conv2d_amx() {
  return {BASISCONV_ISA::pack, BASISCONV_ISA::run_products<BASISCONV_ISA::OneBit, BASISCONV_ISA::Finish>};
}

}  // namespace basisconv
