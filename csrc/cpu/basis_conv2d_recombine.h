// Stage 2 over a run of output pixels, for both layouts of the result.
//
//   channels_last   registers hold outputs of one pixel; z is broadcast          (stage2_tile)
//   NCHW            registers hold pixels of one output; coefficients are broadcast, z is turned once a pixel block
#pragma once
#include "basis_conv2d_tiles.h"

namespace basisconv {
namespace BASISCONV_ISA {

// Maps that only fill up registers, or pairs, and are read between those of two groups or behind the last: zeros, as an
// infinite input times a filter of zeros is NaN.
static inline void clear_filling(const BasisConv2dWeights& w, const CpuPack& pack, Slots::Value* z, int64_t values) {
  const int64_t real = w.Q / w.groups, read = w.groups == 1 ? Slots::kValues * pack.slots : pack.maps;
  if (real >= read) return;
  for (int64_t at = 0; at < values; at += pack.maps) memset(z + at + real, 0, (read - real) * sizeof(Slots::Value));
}

template <typename T>
struct Stage2Planar {
  const Slots::Value* turned;        // [slots][2 * width][values of a slot]: z of up to 2 * width pixels
  const Slots::Value* coefficients;  // [slots][planar_rows][values of a slot]
  int64_t slots;
  int64_t row_stride;  // planar_rows of the packed coefficients
  const float* bias;   // [P]
  const T* residual;   // or null; strided like out
  T* out;
  int64_t out_stride;  // elements between outputs: OH * OW
  int64_t pixels;      // of this block, at most NV * width
  Activation activation;
};

template <typename T, int P, int NV>
BASISCONV_NOINLINE void stage2_planar_tile(const Stage2Planar<T>& s) {
  Vec::Reg acc[P][NV];
  BASISCONV_UNROLL for (int k = 0; k < P; k++) {
    BASISCONV_UNROLL for (int v = 0; v < NV; v++) acc[k][v] = Vec::set1(s.bias[k]);
  }
  const Slots::Value* w = s.coefficients;
  const Slots::Value* z = s.turned;
  for (int64_t q = 0; q < s.slots; q++, w += s.row_stride * Slots::kValues, z += 2 * kRegisterValues) {
    Vec::Reg map[NV];
    BASISCONV_UNROLL for (int v = 0; v < NV; v++) map[v] = Slots::load(z + v * kRegisterValues);
    BASISCONV_UNROLL for (int k = 0; k < P; k++) {
      const Vec::Reg mix = Slots::broadcast<1>(w + k * Slots::kValues);
      BASISCONV_UNROLL for (int v = 0; v < NV; v++) acc[k][v] = Slots::multiply_add(mix, map[v], acc[k][v]);
    }
  }
  const int64_t last = s.pixels - (NV - 1) * kWidth;  // pixels in the last register
  BASISCONV_UNROLL for (int k = 0; k < P; k++) BASISCONV_UNROLL for (int v = 0; v < NV; v++) {
    const int64_t at = k * s.out_stride + v * kWidth;
    const bool full = v + 1 < NV || last == kWidth;
    Vec::Reg value = acc[k][v];
    if (s.residual) value = Vec::add(value, full ? Vec::load(s.residual + at) : Vec::load_n(s.residual + at, last));
    if (s.activation != Activation::none) value = Vec::max(Vec::zero(), value);
    if (s.activation == Activation::relu6) value = Vec::min(Vec::set1(6.0f), value);
    if (full) {
      Vec::store(s.out + at, value);
    } else {
      Vec::store_n(s.out + at, value, last);
    }
  }
}

template <typename T, int NV>
struct Stage2PlanarTable {
  static constexpr int kMost = Vec::kAccumulators / 2;
  void (*function[kMost + 1])(const Stage2Planar<T>&);
  template <int P>
  constexpr void fill() {
    function[P] = stage2_planar_tile<T, P, NV>;
    if constexpr (P > 1) fill<P - 1>();
  }
  constexpr Stage2PlanarTable() : function{} { fill<kMost>(); }
};

// turned[slot][pixel] = z[pixel][slot] for `registers` * width pixels; z is readable that far.
static inline void turn(const Slots::Value* z, int64_t z_stride, int64_t slots, int registers, Slots::Value* turned) {
  for (int v = 0; v < registers; v++) {
    for (int64_t q = 0; q < slots; q += kWidth) {
      Vec::Reg block[kWidth];
      BASISCONV_UNROLL for (int p = 0; p < kWidth; p++) block[p] =
          Slots::load(z + (v * kWidth + p) * z_stride + q * Slots::kValues);
      transpose(block);
      BASISCONV_UNROLL for (int i = 0; i < kWidth; i++)
          Slots::store(turned + (2 * (q + i) + v) * kRegisterValues, block[i]);
    }
  }
}

template <typename T>
struct Recombination {
  const BasisConv2dParams& params;
  const CpuPack& pack;
  const Slots::Value* coefficients;
  const Slots::Value* planar;
  Slots::Value* turned;

  // Outputs of `pixels` consecutive pixels of one image from z [pixels][z_stride].
  void run(const Slots::Value* z, int64_t z_stride, int64_t n, int64_t first_pixel, int64_t pixels) const {
    if (params.maps && params.channels_last) keep_maps(z, z_stride, n, first_pixel, pixels);
    if (params.maps && !params.channels_last) keep_maps_planar(z, z_stride, n, first_pixel, pixels);
    if (!params.channels_last) return planar_run(z, z_stride, n, first_pixel, pixels);
    if (pack.output_vectors == 2) return packed_run<2>(z, z_stride, n, first_pixel, pixels);
    return packed_run<1>(z, z_stride, n, first_pixel, pixels);
  }

 private:
  void keep_maps(const Slots::Value* z, int64_t z_stride, int64_t n, int64_t first_pixel, int64_t pixels) const {
    const BasisConv2dWeights& w = params.weights;
    const int64_t group_maps = w.Q / w.groups;
    T* to = static_cast<T*>(params.maps) + (n * params.OH * params.OW + first_pixel) * w.Q;
    for (int64_t x = 0; x < pixels; x++) {
      for (int64_t group = 0; group < w.groups; group++, to += group_maps) {
        const Slots::Value* from = z + x * z_stride + group * pack.maps;
        for (int64_t q = 0; q < group_maps; q += kWidth) {
          if (group_maps - q >= kWidth) {
            Vec::store(to + q, Vec::load(from + q));
          } else {
            Vec::store_n(to + q, Vec::load_n(from + q, group_maps - q), group_maps - q);
          }
        }
      }
    }
  }

  void keep_maps_planar(const Slots::Value* z, int64_t z_stride, int64_t n, int64_t first_pixel, int64_t pixels) const {
    const BasisConv2dWeights& w = params.weights;
    const int64_t group_maps = w.Q / w.groups, plane = params.OH * params.OW;
    for (int64_t x = 0; x < pixels; x += kWidth) {
      const int64_t count = pixels - x < kWidth ? pixels - x : kWidth;
      for (int64_t group = 0; group < w.groups; group++) {
        turn(z + x * z_stride + group * pack.maps, z_stride, (group_maps + Slots::kValues - 1) / Slots::kValues, 1,
             turned);
        T* to = static_cast<T*>(params.maps) + (n * w.Q + group * group_maps) * plane + first_pixel + x;
        for (int64_t q = 0; q < group_maps; q++)
          Vec::store_n(to + q * plane,
                       Slots::values(turned + q / Slots::kValues * 2 * kRegisterValues, q % Slots::kValues), count);
      }
    }
  }

  template <int NK>
  void packed_run(const Slots::Value* z, int64_t z_stride, int64_t n, int64_t first_pixel, int64_t pixels) const {
    static constexpr Stage2Table<T, NK, true> full;
    static constexpr Stage2Table<T, NK, false> partial;
    const BasisConv2dWeights& w = params.weights;
    const int64_t outputs = w.K / w.mixing_groups, panel = NK * kWidth;
    const int64_t tile = even_tile(pixels, full.kMost);
    Stage2<T> s{};
    s.z_stride = z_stride;
    s.slots = pack.slots;
    s.out_stride = w.K;
    s.activation = params.activation;
    for (int64_t x = 0; x < pixels; x += tile) {
      const int64_t count = pixels - x < tile ? pixels - x : tile;
      const int64_t at = (n * params.OH * params.OW + first_pixel + x) * w.K;
      for (int64_t group = 0; group < w.mixing_groups; group++) {
        s.z = z + x * z_stride + group * (w.groups / w.mixing_groups) * pack.maps;
        const int64_t out = group * outputs;
        s.coefficients = coefficients + group * pack.panels * pack.slots * panel * Slots::kValues;
        s.bias = params.bias + out;
        s.residual = params.residual ? static_cast<const T*>(params.residual) + at + out : nullptr;
        s.out = static_cast<T*>(params.output) + at + out;
        s.panels = outputs / panel;
        s.count = panel;
        if (s.panels > 0) full.function[count](s);
        const int64_t done = s.panels * panel;
        if (done < outputs) {
          s.coefficients += done * pack.slots * Slots::kValues;
          s.bias += done;
          if (s.residual) s.residual += done;
          s.out += done;
          s.panels = 1;
          s.count = outputs - done;
          partial.function[count](s);
        }
      }
    }
  }

  void planar_run(const Slots::Value* z, int64_t z_stride, int64_t n, int64_t first_pixel, int64_t pixels) const {
    static constexpr Stage2PlanarTable<T, 1> narrow;
    static constexpr Stage2PlanarTable<T, 2> wide;
    const BasisConv2dWeights& w = params.weights;
    const int64_t outputs = w.K / w.mixing_groups, plane = params.OH * params.OW;
    Stage2Planar<T> s{};
    s.turned = turned;
    s.slots = pack.slots;
    s.row_stride = pack.planar_rows;
    s.out_stride = plane;
    s.activation = params.activation;
    for (int64_t x = 0; x < pixels; x += 2 * kWidth) {
      s.pixels = pixels - x < 2 * kWidth ? pixels - x : 2 * kWidth;
      const bool one = s.pixels <= kWidth;
      for (int64_t group = 0; group < w.mixing_groups; group++) {
        turn(z + x * z_stride + group * (w.groups / w.mixing_groups) * pack.maps, z_stride, pack.slots, one ? 1 : 2,
             turned);
        for (int64_t p = 0; p < pack.planar_panels; p++) {
          const int64_t k = group * outputs + p * pack.planar_rows;
          const int64_t rows = outputs - p * pack.planar_rows;
          const int64_t at = (n * w.K + k) * plane + first_pixel + x;
          s.coefficients = planar + (group * pack.planar_panels + p) * pack.slots * pack.planar_rows * Slots::kValues;
          s.bias = params.bias + k;
          s.residual = params.residual ? static_cast<const T*>(params.residual) + at : nullptr;
          s.out = static_cast<T*>(params.output) + at;
          const int64_t count = rows < pack.planar_rows ? rows : pack.planar_rows;
          (one ? narrow.function[count] : wide.function[count])(s);
        }
      }
    }
  }
};

}  // namespace BASISCONV_ISA
}  // namespace basisconv
