// ternary_conv2d on the matrix unit of x86 (AMX): two bits a weight. Weights of 0 are multiplied too; the lists of
// ternary_conv2d.cpp win where few weights are there: see ternary_multiplies. Test:
// tests/packaging/test_ternary_without_torch.py. Bench: python -m bench run --suite ternary.
#include "sign_products.h"
#include "ternary_conv2d.h"

namespace basisconv {
namespace BASISCONV_ISA {
namespace {

// In the words of a row bit 2j is channel i of the block, bit 2j+1 channel 16 + i, of filter j.
struct TwoBits {
  static constexpr int64_t kWords = kTernaryTileWords;
  static BASISCONV_INLINE void expand(const uint32_t* words, bf16* to) {
    const __m512i plus = _mm512_set1_epi16(0x3f80), minus = _mm512_set1_epi16(static_cast<int16_t>(0xbf80));
    BASISCONV_UNROLL for (int i = 0; i < kTilePlaces; i++) {
      const __m512i positive = _mm512_maskz_mov_epi16(static_cast<__mmask32>(words[i]), plus);
      const __mmask32 negative = static_cast<__mmask32>(words[kTilePlaces + i]);
      _mm512_storeu_si512(to + i * kDepth, _mm512_mask_blend_epi16(negative, positive, minus));
    }
  }
};

}  // namespace
}  // namespace BASISCONV_ISA

void cpu_ternary_conv2d_amx(const StackedBinaryConv2dParams& params, const StackedPlan& plan, float* scratch,
                            int64_t begin, int64_t end) {
  BASISCONV_ISA::run_products<BASISCONV_ISA::TwoBits>(params, plan, scratch, begin, end);
}

}  // namespace basisconv
