// ternary_conv2d on the matrix unit of x86 (AMX): two bits a weight. Weights of 0 are multiplied too; the lists of
// ternary_conv2d.cpp win where few weights are there: see ternary_multiplies. With a scale for each sign +1 and -1 are
// filters of their own, whose maps lie beside each other. Test: tests/packaging/test_ternary_without_torch.py. Bench:
// python -m bench run --suite ternary.
#include "sign_products.h"
#include "ternary_conv2d.h"

namespace basisconv {
namespace BASISCONV_ISA {
namespace {

BASISCONV_INLINE __m512i ones(uint32_t bits) {
  return _mm512_maskz_mov_epi16(static_cast<__mmask32>(bits), _mm512_set1_epi16(0x3f80));
}

// +1, -1 or 0: a plane for each sign.
struct TwoBits {
  static constexpr int64_t kPlanes = 2;
  static BASISCONV_INLINE void expand(const uint32_t* words, int64_t plane, bf16* to) {
    const __m512i minus = _mm512_set1_epi16(static_cast<int16_t>(0xbf80));
    BASISCONV_UNROLL for (int i = 0; i < kTilePlaces; i++) {
      const uint32_t positive = words[i], negative = words[plane + i];  // both: +1 and -1 are 0
      const __mmask32 other = static_cast<__mmask32>(negative & ~positive);
      _mm512_storeu_si512(to + i * kDepth, _mm512_mask_blend_epi16(other, ones(positive & ~negative), minus));
    }
  }
};

// 1 or 0, of one sign: its planes as blocks of filters of their own.
struct OneSign {
  static constexpr int64_t kPlanes = 1;
  static BASISCONV_INLINE void expand(const uint32_t* words, int64_t, bf16* to) {
    BASISCONV_UNROLL for (int i = 0; i < kTilePlaces; i++) _mm512_storeu_si512(to + i * kDepth, ones(words[i]));
  }
};

// scale times the sums of +1, less negative_scale times those of -1: maps [slices][blocks][2 signs][16].
template <typename T>
class TwoScales {
 public:
  TwoScales(const StackedBinaryConv2dParams& params, const StackedPlan& plan, float*, const float* negative_scale)
      : params_(params), pack_(plan.pack), negative_scale_(negative_scale) {}

  // From pixel `first` of the output on, of an image.
  void operator()(const Pixels& maps, int64_t image, int64_t first) const {
    const int64_t K = params_.weights.K, plane = params_.OH * params_.OW;
    T* to = static_cast<T*>(params_.output) + image * K * plane;
    for (int64_t slice = 0; slice < pack_.slices; slice++) {
      for (int64_t j = 0; j < pack_.filters; j += kWidth) {
        const int64_t left = pack_.filters - j, count = left < kWidth ? left : kWidth;
        const int64_t k = slice * pack_.filters + j, from = slice * pack_.slots + 2 * j;
        Vec::Reg square[kWidth];
        for (int64_t p = 0; p < maps.count; p++) square[p] = output(maps.at[p] + from, k, count);
        if (params_.channels_last) {
          for (int64_t p = 0; p < maps.count; p++) Vec::store_n(to + (first + p) * K + k, square[p], count);
          continue;
        }
        for (int64_t p = maps.count; p < kWidth; p++) square[p] = Vec::zero();
        transpose(square);
        for (int64_t i = 0; i < count; i++) Vec::store_n(to + (k + i) * plane + first, square[i], maps.count);
      }
    }
  }

 private:
  Vec::Reg output(const float* sums, int64_t k, int64_t count) const {
    const Vec::Reg scale = Vec::load_n(params_.scale + k, count), bias = Vec::load_n(params_.bias + k, count);
    const Vec::Reg other = Vec::sub(Vec::zero(), Vec::load_n(negative_scale_ + k, count));
    return activated(params_, Vec::fma(Vec::load(sums + kWidth), other, Vec::fma(Vec::load(sums), scale, bias)));
  }

  const StackedBinaryConv2dParams& params_;
  const StackedPack& pack_;
  const float* const negative_scale_;
};

}  // namespace
}  // namespace BASISCONV_ISA

void cpu_ternary_conv2d_amx(const StackedBinaryConv2dParams& params, const StackedPlan& plan,
                            const float* negative_scale, float* scratch, int64_t begin, int64_t end) {
  using namespace BASISCONV_ISA;
  if (negative_scale == nullptr) return run_products<TwoBits, Finish>(params, plan, scratch, begin, end);
  run_products<OneSign, TwoScales>(params, plan, scratch, begin, end, negative_scale);
}

}  // namespace basisconv
