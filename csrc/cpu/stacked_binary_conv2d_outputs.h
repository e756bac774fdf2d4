// Maps of the slices become outputs: selected, added up, scaled, shifted, activated.
#pragma once
#include "simd.h"
#include "stacked_binary_conv2d_plan.h"

namespace basisconv {
namespace BASISCONV_ISA {

// The maps [slices][slots] of neighbouring output pixels, a register of them at most; those behind the last are read
// and dropped.
struct Pixels {
  const float* at[kWidth];
  int64_t count;
};

static BASISCONV_INLINE Vec::Reg activated(const StackedBinaryConv2dParams& params, Vec::Reg value) {
  if (params.activation != Activation::none) value = Vec::max(Vec::zero(), value);
  if (params.activation == Activation::relu6) value = Vec::min(Vec::set1(6.0f), value);
  return value;
}

// The maps of one pixel are its outputs: expanded filters, channels_last.
template <typename T>
static void store_outputs(const StackedBinaryConv2dParams& params, const StackedPack& pack, const Pixels& maps, T* to) {
  const int64_t K = params.weights.K, outputs = pack.filters;
  for (int64_t p = 0; p < maps.count; p++) {
    for (int64_t slice = 0; slice < pack.slices; slice++) {
      const float* from = maps.at[p] + slice * pack.slots;
      for (int64_t j = 0; j < outputs; j += kWidth) {
        const int64_t k = slice * outputs + j, left = outputs - j;
        const Vec::Reg value = Vec::load(from + j);
        if (left >= kWidth) {
          const Vec::Reg out = Vec::fma(value, Vec::load(params.scale + k), Vec::load(params.bias + k));
          Vec::store(to + p * K + k, activated(params, out));
        } else {
          const Vec::Reg out = Vec::fma(value, Vec::load_n(params.scale + k, left), Vec::load_n(params.bias + k, left));
          Vec::store_n(to + p * K + k, activated(params, out), left);
        }
      }
    }
  }
}

// Select and stack: the maps turned, so that a register holds the pixels of one map; an output adds up whole registers;
// for channels_last a square of outputs is turned back.
template <typename T>
static void stack_maps(const StackedBinaryConv2dParams& params, const StackedPack& pack, const int32_t* rows,
                       const Pixels& maps, float* turned, T* to) {
  const int64_t K = params.weights.K, a_pixel = pack.slices * pack.slots, pixels = maps.count;
  for (int64_t i = 0; i < a_pixel; i += kWidth) {
    Vec::Reg square[kWidth];
    BASISCONV_UNROLL for (int p = 0; p < kWidth; p++) square[p] = Vec::load(maps.at[p] + i);
    transpose(square);
    BASISCONV_UNROLL for (int j = 0; j < kWidth; j++) Vec::store(turned + (i + j) * kWidth, square[j]);
  }
  const auto output = [&](int64_t k) BASISCONV_LAMBDA {
    const int32_t* row = rows + k * pack.splits;
    Vec::Reg sum = Vec::load(turned + row[0] * kWidth);
    for (int64_t i = 1; i < pack.splits; i++) sum = Vec::add(sum, Vec::load(turned + row[i] * kWidth));
    return activated(params, Vec::fma(sum, Vec::set1(params.scale[k]), Vec::set1(params.bias[k])));
  };
  if (!params.channels_last) {
    const int64_t to_plane = params.OH * params.OW;
    for (int64_t k = 0; k < K; k++) {
      if (pixels == kWidth) {
        Vec::store(to + k * to_plane, output(k));
      } else {
        Vec::store_n(to + k * to_plane, output(k), pixels);
      }
    }
    return;
  }
  for (int64_t k = 0; k < K; k += kWidth) {
    const int64_t left = K - k < kWidth ? K - k : kWidth;
    Vec::Reg square[kWidth];
    BASISCONV_UNROLL for (int i = 0; i < kWidth; i++) square[i] = i < left ? output(k + i) : Vec::zero();
    transpose(square);
    for (int64_t p = 0; p < pixels; p++) {
      if (left == kWidth) {
        Vec::store(to + p * K + k, square[p]);
      } else {
        Vec::store_n(to + p * K + k, square[p], left);
      }
    }
  }
}

#if defined(BASISCONV_AVX512)

// For each 16 outputs and split, which map of its slice each of them picks: [K/16][splits][16].
static inline void find_picks(const StackedBinaryWeights& w, const StackedPack& pack, const int32_t* rows,
                              int32_t* picks) {
  for (int64_t k = 0; k < w.K; k++) {
    for (int64_t i = 0; i < pack.splits; i++) {
      picks[(k / kWidth * pack.splits + i) * kWidth + k % kWidth] =
          rows[k * pack.splits + i] % static_cast<int32_t>(pack.slots);
    }
  }
}

// Maps at `at` of so many registers of them.
template <int REGISTERS>
static BASISCONV_INLINE Vec::Reg picked(const float* maps, __m512i at, __mmask16 upper) {
  static_assert(REGISTERS >= 1 && REGISTERS <= 4);
  if constexpr (REGISTERS == 1) return _mm512_permutexvar_ps(at, Vec::load(maps));
  const Vec::Reg low = _mm512_permutex2var_ps(Vec::load(maps), at, Vec::load(maps + kWidth));
  if constexpr (REGISTERS <= 2) return low;
  const Vec::Reg high = REGISTERS == 3 ? _mm512_permutexvar_ps(at, Vec::load(maps + 2 * kWidth))
                                       : _mm512_permutex2var_ps(Vec::load(maps + 2 * kWidth), at,
                                                                Vec::load(maps + (REGISTERS - 1) * kWidth));
  return _mm512_mask_blend_ps(upper, low, high);
}

// Select and stack for channels_last where a slice has few maps: a register of outputs picks its own from theirs.
template <typename T, int REGISTERS>
static void pick_maps(const StackedBinaryConv2dParams& params, const StackedPack& pack, const int32_t* picks,
                      const Pixels& maps, T* to) {
  const int64_t K = params.weights.K, outputs = K / params.weights.groups, splits = pack.splits;
  for (int64_t k = 0; k < K; k += kWidth, picks += splits * kWidth) {
    const int64_t left = K - k < kWidth ? K - k : kWidth, slice = k / outputs * splits;
    const Vec::Reg scale = Vec::load_n(params.scale + k, left), bias = Vec::load_n(params.bias + k, left);
    for (int64_t p = 0; p < maps.count; p++) {
      const float* from = maps.at[p] + slice * pack.slots;
      Vec::Reg sum = Vec::zero();
      for (int64_t i = 0; i < splits; i++, from += pack.slots) {
        const __m512i at = _mm512_loadu_si512(picks + i * kWidth);
        const Vec::Reg map = picked<REGISTERS>(from, at, _mm512_test_epi32_mask(at, _mm512_set1_epi32(2 * kWidth)));
        sum = i == 0 ? map : Vec::add(sum, map);
      }
      const Vec::Reg out = activated(params, Vec::fma(sum, scale, bias));
      if (left == kWidth) {
        Vec::store(to + p * K + k, out);
      } else {
        Vec::store_n(to + p * K + k, out, left);
      }
    }
  }
}

template <typename T>
static void pick_maps(const StackedBinaryConv2dParams& params, const StackedPack& pack, const int32_t* picks,
                      const Pixels& maps, T* to) {
  switch (pack.slots / kWidth) {
    case 1:
      return pick_maps<T, 1>(params, pack, picks, maps, to);
    case 2:
      return pick_maps<T, 2>(params, pack, picks, maps, to);
    case 3:
      return pick_maps<T, 3>(params, pack, picks, maps, to);
    default:
      return pick_maps<T, 4>(params, pack, picks, maps, to);
  }
}

#endif

// What finishes pixels, with memory for it: picks, or maps turned.
template <typename T>
class Finish {
 public:
  Finish(const StackedBinaryConv2dParams& params, const StackedPlan& plan, float* memory)
      : params_(params),
        plan_(plan),
        rows_(static_cast<const int32_t*>(params.packed) + plan.pack.words_size),
        memory_(memory) {
#if defined(BASISCONV_AVX512)
    if (plan.picks) find_picks(params.weights, plan.pack, rows_, reinterpret_cast<int32_t*>(memory));
#endif
  }

  // From pixel `first` of the output on, of an image.
  void operator()(const Pixels& maps, int64_t image, int64_t first) const {
    const int64_t K = params_.weights.K, plane = params_.OH * params_.OW;
    T* to = static_cast<T*>(params_.output) + image * K * plane + first * (params_.channels_last ? K : 1);
    if (plan_.pack.expanded && params_.channels_last) return store_outputs(params_, plan_.pack, maps, to);
#if defined(BASISCONV_AVX512)
    const int32_t* picks = reinterpret_cast<const int32_t*>(memory_);
    if (plan_.picks) return pick_maps(params_, plan_.pack, picks, maps, to);
#endif
    stack_maps(params_, plan_.pack, rows_, maps, memory_, to);
  }

 private:
  const StackedBinaryConv2dParams& params_;
  const StackedPlan& plan_;
  const int32_t* const rows_;
  float* const memory_;
};

}  // namespace BASISCONV_ISA
}  // namespace basisconv
