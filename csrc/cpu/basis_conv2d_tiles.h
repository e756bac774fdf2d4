// The two register tiles of basis_conv2d; everything else only feeds them.
//
//   stage 1:  z[p, q] = sum over channel blocks, taps, channels of pixel[p] * filter[q]      (P pixels, NV registers)
//   stage 2:  out[p, k] = act(bias[k] + sum_q coefficient[k, q] * z[p, q] + residual[p, k])  (P pixels, NK registers)
//
// Operands are slots (slots.h) of one value, or of two: then a pair of channels, or of maps, is multiplied at once.
// Both keep P * registers accumulators in registers, load each weight once for P pixels and each pixel value once for
// all registers. The order of additions for one output does not depend on P: results do not depend on tiling or
// threads.
#pragma once
#include "slots.h"

namespace basisconv {
namespace BASISCONV_ISA {

// One run of the stage-1 tile; pointers and distances count values. Pixel x of tap t and channel block b lies at pixels
// + offset[t] + b*plane + x*pixel_stride; pixel_stride is BLOCK, the channels of a block, in rows that were copied, and
// of any size where input is read in place. The weights of a channel block may be visited in chunks; accumulators wait
// in `partial` [P][NV][width] in between.
struct Stage1 {
  const Slots::Value* pixels;
  const int64_t* offset;  // one a tap
  const Slots::Value* weights;
  const int64_t* tap_weights;  // from the start of a channel block's weights, one a tap
  int64_t taps;
  int64_t blocks;         // channel blocks of this chunk
  int64_t plane;          // between channel blocks
  int64_t pixel_stride;   // between pixels, read if IN_PLACE
  int64_t block_weights;  // weights of one channel block
  const char* fetched;    // what is fetched towards the core meanwhile, or null: so many bytes on with every 64 of
  int64_t fetch_step;     // weights
  int64_t fetch_beside;   // so far from each of them another line is fetched; 0: none
  Slots::Value* z;
  int64_t z_stride;  // between pixels
  float* partial;
  bool first, last;  // of the chunks
  // The run repeats `times`, moving on by these many values: short sums follow each other without a call between.
  int64_t times, next_pixels, next_weights, next_z, next_partial;
};

template <int P, int NV, int L, int BLOCK, bool IN_PLACE>
BASISCONV_NOINLINE void stage1_tile(const Stage1& s) {
  const int64_t pixel_bytes = (IN_PLACE ? s.pixel_stride : BLOCK) * static_cast<int64_t>(sizeof(Slots::Value));
  const int64_t three_pixels = 3 * pixel_bytes;
  constexpr int kStep = L * Slots::kValues, kSteps = BLOCK / kStep;  // channels of a step, steps of a block
  const Slots::Value *pixels = s.pixels, *weights = s.weights;
  Slots::Value* z = s.z;
  float* partial = s.partial;
  const char* fetched = s.fetched;
  const int64_t fetch_step = s.fetch_step, fetch_beside = s.fetch_beside;
  // Products of pairs take longer than so few sums can wait for: then every other step adds to sums of its own.
  constexpr int kChains = Slots::kValues > 1 && P * NV <= Vec::kAccumulators / 2 && kSteps % 2 == 0 ? 2 : 1;
  for (int64_t time = 0; time < s.times; time++) {
    Vec::Reg chain[kChains][P][NV];
    Vec::Reg(&acc)[P][NV] = chain[0];
    if constexpr (kChains > 1) {
      BASISCONV_UNROLL for (int p = 0; p < P; p++) BASISCONV_UNROLL for (int v = 0; v < NV; v++) chain[1][p][v] =
          Vec::zero();
    }
    if (s.first) {
      BASISCONV_UNROLL for (int p = 0; p < P; p++) BASISCONV_UNROLL for (int v = 0; v < NV; v++) acc[p][v] =
          Vec::zero();
    } else {
      BASISCONV_UNROLL for (int p = 0; p < P; p++) BASISCONV_UNROLL for (int v = 0; v < NV; v++) acc[p][v] =
          Vec::load(partial + (p * NV + v) * kWidth);
    }
    // One loop over channel blocks and taps: two would shuffle the accumulators between them.
    const Slots::Value *row = pixels, *row_weights = weights;
    int64_t t = 0;
    for (int64_t left = s.blocks * s.taps; left > 0; left--) {
      const char* at[(P + 4) / 5];  // of every fifth pixel: the others are one address from there
      BASISCONV_UNROLL for (int i = 0; i < (P + 4) / 5; i++) at[i] =
          reinterpret_cast<const char*>(row + s.offset[t]) + 5 * i * pixel_bytes;
      const Slots::Value* w = row_weights + s.tap_weights[t];
      _Pragma("GCC unroll 4") for (int first = 0; first < kSteps; first += kChains) {
        BASISCONV_UNROLL for (int c = 0; c < kChains; c++) {
          Vec::Reg filter[NV];
          BASISCONV_UNROLL for (int v = 0; v < NV; v++) filter[v] = Slots::load(w + v * kRegisterValues);
          if (fetched) {
            BASISCONV_UNROLL for (int v = 0; v < NV * kWidth / 16; v++) {
              __builtin_prefetch(fetched, 0, 2);
              if (fetch_beside) __builtin_prefetch(fetched + fetch_beside, 0, 2);
              fetched += fetch_step;
            }
          }
          w += NV * kRegisterValues;
          BASISCONV_UNROLL for (int p = 0; p < P; p++) {
            const char* pixel = at[p / 5] + (p % 5 == 3 ? three_pixels : p % 5 * pixel_bytes);
            const Vec::Reg value =
                Slots::broadcast<L>(reinterpret_cast<const Slots::Value*>(pixel) + (first + c) * kStep);
            BASISCONV_UNROLL for (int v = 0; v < NV; v++) chain[c][p][v] =
                Slots::multiply_add(value, filter[v], chain[c][p][v]);
          }
        }
      }
      if (++t == s.taps) {
        t = 0;
        row += s.plane;
        row_weights += s.block_weights;
      }
    }
    if constexpr (kChains > 1) {
      BASISCONV_UNROLL for (int p = 0; p < P; p++) BASISCONV_UNROLL for (int v = 0; v < NV; v++) acc[p][v] =
          Vec::add(acc[p][v], chain[1][p][v]);
    }
    if (s.last) {
      constexpr int kOdd = (NV - 1) * (kWidth / L);
      BASISCONV_UNROLL for (int p = 0; p < P; p++) {
        Slots::Value* to = z + p * s.z_stride;
        BASISCONV_UNROLL for (int v = 0; v + 1 < NV; v += 2)
            Slots::store_sums<L>(to + v * (kWidth / L), acc[p][v], acc[p][v + 1]);
        if constexpr (NV % 2 == 1) {
          if (p % 2 == 1) Slots::store_sums<L>(to - s.z_stride + kOdd, acc[p - 1][NV - 1], to + kOdd, acc[p][NV - 1]);
          if (p % 2 == 0 && p + 1 == P) Slots::store_sums<L>(to + kOdd, acc[p][NV - 1]);
        }
      }
    } else {
      BASISCONV_UNROLL for (int p = 0; p < P; p++) BASISCONV_UNROLL for (int v = 0; v < NV; v++)
          Vec::store(partial + (p * NV + v) * kWidth, acc[p][v]);
    }
    pixels += s.next_pixels;
    weights += s.next_weights;
    z += s.next_z;
    partial += s.next_partial;
  }
}

template <typename T>
struct Stage2 {
  const Slots::Value* z;
  int64_t z_stride;                  // values between pixels
  const Slots::Value* coefficients;  // [slots][NK * width][values of a slot]
  int64_t slots;
  const float* bias;  // [count]
  const T* residual;  // or null; strided like out
  T* out;
  int64_t out_stride;  // elements between pixels: K
  int64_t panels;      // of NK * width outputs, one after the other
  int64_t count;       // outputs of a panel: NK * width, or fewer in a last one
  Activation activation;
};

template <typename T, int P, int NK, bool FULL>
BASISCONV_NOINLINE void stage2_tile(const Stage2<T>& s) {
  int64_t valid[NK];
  BASISCONV_UNROLL for (int v = 0; v < NK; v++) {
    const int64_t rest = s.count - v * kWidth;
    valid[v] = rest < 0 ? 0 : rest < kWidth ? rest : kWidth;
  }
  const Slots::Value* w = s.coefficients;
  const float* bias = s.bias;
  const T* residual = s.residual;
  T* out = s.out;
  for (int64_t panel = 0; panel < s.panels; panel++) {
    Vec::Reg acc[P][NK];
    BASISCONV_UNROLL for (int v = 0; v < NK; v++) {
      const Vec::Reg start = FULL ? Vec::load(bias + v * kWidth) : Vec::load_n(bias + v * kWidth, valid[v]);
      BASISCONV_UNROLL for (int p = 0; p < P; p++) acc[p][v] = start;
    }
    for (int64_t q = 0; q < s.slots; q++) {
      Vec::Reg mix[NK];
      BASISCONV_UNROLL for (int v = 0; v < NK; v++) mix[v] = Slots::load(w + v * kRegisterValues);
      w += NK * kRegisterValues;
      BASISCONV_UNROLL for (int p = 0; p < P; p++) {
        const Vec::Reg value = Slots::broadcast<1>(s.z + p * s.z_stride + q * Slots::kValues);
        BASISCONV_UNROLL for (int v = 0; v < NK; v++) acc[p][v] = Slots::multiply_add(value, mix[v], acc[p][v]);
      }
    }
    BASISCONV_UNROLL for (int p = 0; p < P; p++) BASISCONV_UNROLL for (int v = 0; v < NK; v++) {
      const int64_t at = p * s.out_stride + v * kWidth;
      Vec::Reg value = acc[p][v];
      if (residual) value = Vec::add(value, FULL ? Vec::load(residual + at) : Vec::load_n(residual + at, valid[v]));
      if (s.activation != Activation::none) value = Vec::max(Vec::zero(), value);
      if (s.activation == Activation::relu6) value = Vec::min(Vec::set1(6.0f), value);
      if constexpr (FULL) {
        Vec::store(out + at, value);
      } else {
        Vec::store_n(out + at, value, valid[v]);
      }
    }
    bias += NK * kWidth;
    out += NK * kWidth;
    if (residual) residual += NK * kWidth;
  }
}

using Stage1Function = void (*)(const Stage1&);
template <typename T>
using Stage2Function = void (*)(const Stage2<T>&);

// Pixels of a full tile; one register of filters leaves room for more, but not for more than a pass has.
static constexpr int stage1_pixels(int vectors) { return vectors == 1 ? 16 : Vec::kAccumulators / vectors; }

// Functions for 1 ... kMost pixels of one register shape, index = pixels.
template <int NV, int L, int BLOCK, bool IN_PLACE>
struct Stage1Table {
  static constexpr int kMost = stage1_pixels(NV);
  Stage1Function function[kMost + 1];
  template <int P>
  constexpr void fill() {
    function[P] = stage1_tile<P, NV, L, BLOCK, IN_PLACE>;
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

template <int NV, int L, int BLOCK, bool IN_PLACE>
static const Stage1Function* stage1_table() {
  static constexpr Stage1Table<NV, L, BLOCK, IN_PLACE> table;
  return table.function;
}

template <int BLOCK, bool IN_PLACE>
static const Stage1Function* stage1_functions(int lanes, int vectors) {
  if (lanes == 1 && vectors == 2) return stage1_table<2, 1, BLOCK, IN_PLACE>();
  if (lanes == 2 && vectors == 2) return stage1_table<2, 2, BLOCK, IN_PLACE>();
  if (lanes == 4 && vectors == 2) return stage1_table<2, 4, BLOCK, IN_PLACE>();
#if defined(BASISCONV_AVX512) || defined(BASISCONV_AVX2)
  if (lanes == 1 && vectors == 3) return stage1_table<3, 1, BLOCK, IN_PLACE>();
  if (lanes == 2 && vectors == 3) return stage1_table<3, 2, BLOCK, IN_PLACE>();
#endif
#if defined(BASISCONV_AVX512)
  if (lanes == 4 && vectors == 3) return stage1_table<3, 4, BLOCK, IN_PLACE>();
  if (lanes == 1 && vectors == 1) return stage1_table<1, 1, BLOCK, IN_PLACE>();
  if (lanes == 2 && vectors == 1) return stage1_table<1, 2, BLOCK, IN_PLACE>();
  if (lanes == 4 && vectors == 1) return stage1_table<1, 4, BLOCK, IN_PLACE>();
  if constexpr (BLOCK % (8 * Slots::kValues) == 0) {
    if (lanes == 8 && vectors == 2) return stage1_table<2, 8, BLOCK, IN_PLACE>();
  }
#endif
  return nullptr;
}

static inline const Stage1Function* stage1_functions(int lanes, int vectors, int64_t block, bool in_place = false) {
  constexpr int kWhole = 16 * Slots::kValues, kFew = Slots::kValues == 1 ? 4 : 16;
  if (in_place) return stage1_functions<kWhole, true>(lanes, vectors);
  return block == kFew ? stage1_functions<kFew, false>(lanes, vectors)
                       : stage1_functions<kWhole, false>(lanes, vectors);
}

// Pixels a tile when `count` pixels are cut into the fewest tiles of at most `most`: equal ones, no small rest.
static inline int64_t even_tile(int64_t count, int64_t most) {
  const int64_t tiles = (count + most - 1) / most;
  return (count + tiles - 1) / tiles;
}

}  // namespace BASISCONV_ISA
}  // namespace basisconv
