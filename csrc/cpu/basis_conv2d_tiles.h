// The two register tiles of basis_conv2d; everything else only feeds them.
//
//   stage 1:  z[p, q] = sum over channel blocks, taps, channels of pixel[p] * filter[q]      (P pixels, NV registers)
//   stage 2:  out[p, k] = act(bias[k] + sum_q coefficient[k, q] * z[p, q] + residual[p, k])  (P pixels, NK registers)
//
// Both keep P * registers accumulators in registers, load each weight once for P pixels and each pixel value once for all
// registers. The order of additions for one output does not depend on P: results do not depend on tiling or threads.
#pragma once
#include "simd.h"

namespace basisconv {
namespace BASISCONV_ISA {

// Where the taps of one output row lie: pixel x of tap t and channel block b is pixels + offset[t] + b*plane + x*BLOCK.
struct Taps {
  const float* pixels;
  const int64_t* offset;  // floats, one a tap
  const int64_t* weight;  // floats from the start of a channel block's weights
  int64_t count;
  int64_t plane;          // floats between channel blocks
  int64_t block_weights;  // floats of weights of one channel block
};

// Accumulators that wait between two visits of a tile when the weights are walked in chunks of channel blocks.
struct Partial {
  float* values;  // [P][NV][width], or unused when both flags are set
  bool first, last;
};

template <int P, int NV, int L, int BLOCK>
BASISCONV_NOINLINE void stage1_tile(const Taps& taps, int64_t block_begin, int64_t block_end, int64_t x,
                                    const float* weights, const float* ahead, Partial partial, float* z,
                                    int64_t z_stride) {
  Vec::Reg acc[P][NV];
  if (partial.first) {
    BASISCONV_UNROLL for (int p = 0; p < P; p++) BASISCONV_UNROLL for (int v = 0; v < NV; v++) acc[p][v] = Vec::zero();
  } else {
    BASISCONV_UNROLL for (int p = 0; p < P; p++) BASISCONV_UNROLL for (int v = 0; v < NV; v++) acc[p][v] =
        Vec::load(partial.values + (p * NV + v) * kWidth);
  }
  for (int64_t block = block_begin; block < block_end; block++) {
    const float* row = taps.pixels + block * taps.plane + x * BLOCK;
    const float* block_weights = weights + block * taps.block_weights;
    const int64_t to_ahead = ahead - weights;
    for (int64_t t = 0; t < taps.count; t++) {
      const float* pixel = row + taps.offset[t];
      const float* w = block_weights + taps.weight[t];
      _Pragma("GCC unroll 4") for (int step = 0; step < BLOCK / L; step++) {
        Vec::Reg filter[NV];
        BASISCONV_UNROLL for (int v = 0; v < NV; v++) filter[v] = Vec::load(w + v * kWidth);
        BASISCONV_UNROLL for (int v = 0; v < NV * kWidth / 16; v++) __builtin_prefetch(w + to_ahead + 16 * v, 0, 2);
        w += NV * kWidth;
        BASISCONV_UNROLL for (int p = 0; p < P; p++) {
          const Vec::Reg value = Vec::broadcast<L>(pixel + p * BLOCK + step * L);
          BASISCONV_UNROLL for (int v = 0; v < NV; v++) acc[p][v] = Vec::fma(value, filter[v], acc[p][v]);
        }
      }
    }
  }
  if (partial.last) {
    BASISCONV_UNROLL for (int p = 0; p < P; p++) BASISCONV_UNROLL for (int v = 0; v < NV; v++)
        Vec::store_sums<L>(z + p * z_stride + v * (kWidth / L), acc[p][v]);
  } else {
    BASISCONV_UNROLL for (int p = 0; p < P; p++) BASISCONV_UNROLL for (int v = 0; v < NV; v++)
        Vec::store(partial.values + (p * NV + v) * kWidth, acc[p][v]);
  }
}

template <typename T>
struct Stage2 {
  const float* z;
  int64_t z_stride;           // floats between pixels
  const float* coefficients;  // [slots][NK * width]
  int64_t slots;
  const float* bias;          // [count]
  const T* residual;          // or null; strided like out
  T* out;
  int64_t out_stride;         // elements between pixels: K
  int64_t count;              // outputs of this panel, at most NK * width
  Activation activation;
};

template <typename T, int P, int NK, bool FULL>
BASISCONV_NOINLINE void stage2_tile(const Stage2<T>& s) {
  Vec::Reg acc[P][NK];
  int64_t valid[NK];
  BASISCONV_UNROLL for (int v = 0; v < NK; v++) {
    const int64_t rest = s.count - v * kWidth;
    valid[v] = rest < 0 ? 0 : rest < kWidth ? rest : kWidth;
    const Vec::Reg bias = FULL ? Vec::load(s.bias + v * kWidth) : Vec::load_n(s.bias + v * kWidth, valid[v]);
    BASISCONV_UNROLL for (int p = 0; p < P; p++) acc[p][v] = bias;
  }
  const float* w = s.coefficients;
  for (int64_t q = 0; q < s.slots; q++) {
    Vec::Reg mix[NK];
    BASISCONV_UNROLL for (int v = 0; v < NK; v++) mix[v] = Vec::load(w + v * kWidth);
    w += NK * kWidth;
    BASISCONV_UNROLL for (int p = 0; p < P; p++) {
      const Vec::Reg value = Vec::broadcast<1>(s.z + p * s.z_stride + q);
      BASISCONV_UNROLL for (int v = 0; v < NK; v++) acc[p][v] = Vec::fma(value, mix[v], acc[p][v]);
    }
  }
  BASISCONV_UNROLL for (int p = 0; p < P; p++) BASISCONV_UNROLL for (int v = 0; v < NK; v++) {
    const int64_t at = p * s.out_stride + v * kWidth;
    Vec::Reg value = acc[p][v];
    if (s.residual) {
      value = Vec::add(value, FULL ? Vec::load(s.residual + at) : Vec::load_n(s.residual + at, valid[v]));
    }
    if (s.activation != Activation::none) value = Vec::max(Vec::zero(), value);
    if (s.activation == Activation::relu6) value = Vec::min(Vec::set1(6.0f), value);
    if constexpr (FULL) {
      Vec::store(s.out + at, value);
    } else {
      Vec::store_n(s.out + at, value, valid[v]);
    }
  }
}

using Stage1Function = void (*)(const Taps&, int64_t, int64_t, int64_t, const float*, const float*, Partial, float*,
                                int64_t);
template <typename T>
using Stage2Function = void (*)(const Stage2<T>&);

// Functions for 1 ... kMost pixels of one register shape, index = pixels.
template <int NV, int L, int BLOCK>
struct Stage1Table {
  static constexpr int kMost = Vec::kAccumulators / NV;
  Stage1Function function[kMost + 1];
  template <int P>
  constexpr void fill() {
    function[P] = stage1_tile<P, NV, L, BLOCK>;
    if constexpr (P > 1) fill<P - 1>();
  }
  constexpr Stage1Table() : function{} { fill<kMost>(); }
};

template <typename T, int NK, bool FULL>
struct Stage2Table {
  static constexpr int kMost = Vec::kAccumulators / NK;
  Stage2Function<T> function[kMost + 1];
  template <int P>
  constexpr void fill() {
    function[P] = stage2_tile<T, P, NK, FULL>;
    if constexpr (P > 1) fill<P - 1>();
  }
  constexpr Stage2Table() : function{} { fill<kMost>(); }
};

template <int NV, int L, int BLOCK>
static const Stage1Function* stage1_table() {
  static constexpr Stage1Table<NV, L, BLOCK> table;
  return table.function;
}

template <int BLOCK>
static const Stage1Function* stage1_functions(int lanes, int vectors) {
  if (lanes == 1 && vectors == 2) return stage1_table<2, 1, BLOCK>();
  if (lanes == 2 && vectors == 2) return stage1_table<2, 2, BLOCK>();
  if (lanes == 4 && vectors == 2) return stage1_table<2, 4, BLOCK>();
#if defined(BASISCONV_AVX512) || defined(BASISCONV_AVX2)
  if (lanes == 1 && vectors == 3) return stage1_table<3, 1, BLOCK>();
  if (lanes == 2 && vectors == 3) return stage1_table<3, 2, BLOCK>();
#endif
#if defined(BASISCONV_AVX512)
  if (lanes == 1 && vectors == 4) return stage1_table<4, 1, BLOCK>();
  if (lanes == 4 && vectors == 3) return stage1_table<3, 4, BLOCK>();
  if constexpr (BLOCK % 8 == 0) {
    if (lanes == 8 && vectors == 2) return stage1_table<2, 8, BLOCK>();
  }
#endif
  return nullptr;
}

static inline const Stage1Function* stage1_functions(int lanes, int vectors, int64_t block) {
  return block == 4 ? stage1_functions<4>(lanes, vectors) : stage1_functions<16>(lanes, vectors);
}

static inline int64_t stage1_pixels(int vectors) { return Vec::kAccumulators / vectors; }

// Pixels a tile when `count` pixels are cut into the fewest tiles of at most `most`: equal ones, no small rest.
static inline int64_t even_tile(int64_t count, int64_t most) {
  const int64_t tiles = (count + most - 1) / most;
  return (count + tiles - 1) / tiles;
}

}  // namespace BASISCONV_ISA
}  // namespace basisconv
