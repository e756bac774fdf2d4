// basis_conv2d for bfloat16 on the matrix unit of x86 (AMX): both stages as products of 16x32 by 32x16 tiles.
//
// Four tiles of pixels at a time go through both stages: a tile of filters, or of coefficients, is loaded once for the
// four, which keeps the loads, from the second-level cache too, under the 16 cycles that each product takes. Sums are
// kept in float; z is rounded to bfloat16 once, which is also the operand of stage 2. `precise` and very few channels
// run on the vector kernels instead. Test: tests/ops/test_basis_conv2d.py with BASISCONV_CPU_ISA=amx. Bench: python -m
// bench run --suite C3.
#include "basis_conv2d.h"
#include "basis_conv2d_amx_band.h"
#include "basis_conv2d_amx_store.h"
#include "basis_conv2d_filters.h"

namespace basisconv {
namespace BASISCONV_ISA {

// The rows of a product are those of its first factor: pixels (channels_last, and stage 1), or outputs (NCHW).
enum class Rows { pixels, outputs };

// Accumulator 0, and so on. The intrinsics take numbers of tiles as they are written only, no template's.
template <Rows ROWS>
static BASISCONV_INLINE void product0() {
  if constexpr (ROWS == Rows::pixels) {
    _tile_dpbf16ps(0, 4, 6);
  } else {
    _tile_dpbf16ps(0, 6, 4);
  }
}
template <Rows ROWS>
static BASISCONV_INLINE void product1() {
  if constexpr (ROWS == Rows::pixels) {
    _tile_dpbf16ps(1, 5, 6);
  } else {
    _tile_dpbf16ps(1, 6, 5);
  }
}
template <Rows ROWS>
static BASISCONV_INLINE void product2() {
  if constexpr (ROWS == Rows::pixels) {
    _tile_dpbf16ps(2, 4, 6);
  } else {
    _tile_dpbf16ps(2, 6, 4);
  }
}
template <Rows ROWS>
static BASISCONV_INLINE void product3() {
  if constexpr (ROWS == Rows::pixels) {
    _tile_dpbf16ps(3, 5, 6);
  } else {
    _tile_dpbf16ps(3, 6, 5);
  }
}

// Tile t of sums, kBlock floats after the one before, its rows kOutputs apart = sum over i of the pixels at
// pixels[t] + steps[i] times tile i of the weights.
template <int TILES, Rows ROWS>
static void multiply(const bf16* const* pixels, int64_t pixel_row, const int64_t* steps, int64_t count,
                     const bf16* weights, float* sums) {
  static_assert(1 <= TILES && TILES <= kTogether);
  _tile_zero(0);
  if constexpr (TILES > 1) _tile_zero(1);
  if constexpr (TILES > 2) _tile_zero(2);
  if constexpr (TILES > 3) _tile_zero(3);
  for (int64_t i = 0; i < count; i++, weights += kTile) {
    const int64_t at = steps[i];
    _tile_loadd(6, weights, kTileRow);
    _tile_loadd(4, pixels[0] + at, pixel_row);
    product0<ROWS>();
    if constexpr (TILES > 1) {
      _tile_loadd(5, pixels[1] + at, pixel_row);
      product1<ROWS>();
    }
    if constexpr (TILES > 2) {
      _tile_loadd(4, pixels[2] + at, pixel_row);
      product2<ROWS>();
    }
    if constexpr (TILES > 3) {
      _tile_loadd(5, pixels[3] + at, pixel_row);
      product3<ROWS>();
    }
  }
  _tile_stored(0, sums, kOutputs * 4);
  if constexpr (TILES > 1) _tile_stored(1, sums + kBlock, kOutputs * 4);
  if constexpr (TILES > 2) _tile_stored(2, sums + 2 * kBlock, kOutputs * 4);
  if constexpr (TILES > 3) _tile_stored(3, sums + 3 * kBlock, kOutputs * 4);
}

template <Rows ROWS>
static void multiply(int64_t tiles, const bf16* const* pixels, int64_t pixel_row, const int64_t* steps, int64_t count,
                     const bf16* weights, float* sums) {
  switch (tiles) {
    case 1:
      return multiply<1, ROWS>(pixels, pixel_row, steps, count, weights, sums);
    case 2:
      return multiply<2, ROWS>(pixels, pixel_row, steps, count, weights, sums);
    case 3:
      return multiply<3, ROWS>(pixels, pixel_row, steps, count, weights, sums);
    default:
      return multiply<4, ROWS>(pixels, pixel_row, steps, count, weights, sums);
  }
}

struct Amx {
  const BasisConv2dParams& params;
  const CpuPlan& plan;
  InputBand band;
  const bf16* filters;
  const bf16* coefficients;  // [mixing groups][K/16][slots/32] tiles [pairs][16 outputs][2]   (channels_last)
  const bf16* planar;        // [mixing groups][K/16][slots/32] tiles [16 outputs][32 maps]    (NCHW)
  Store store;
  bf16* maps;             // z, rounded: [plan.tiles][16][all maps]
  bf16* turned;           // NCHW, z of a mixing group: [kTogether][slots/32] tiles [pairs][16 pixels][2]
  float* sums;            // of two filter blocks, then of a block of outputs, the one before beside it
  const int64_t* taps;    // for stage 1
  const int64_t* places;  // of maps for stage 2
  int64_t all_maps;

  // z of `count` tiles, at most kTogether.
  void stage1(const PixelTile* tiles, int64_t count, bf16* to) const {
    const BasisConv2dWeights& w = params.weights;
    const CpuPack& pack = plan.pack;
    const int64_t steps = pack.channel_blocks * w.R * w.S;
    const bf16* pixels[kTogether];
    for (int64_t group = 0; group < w.groups; group++) {
      for (int64_t t = 0; t < count; t++) {
        pixels[t] = band.pixels(group * pack.channel_blocks) + tiles[t].start * kDepth;
      }
      const bf16* weights = filters + group * pack.group_size;
      for (int64_t f = 0; f < pack.filter_blocks; f += 2) {
        float* now = sums + f / 2 % 2 * kTogether * kBlock;
        multiply<Rows::pixels>(count, pixels, kTileRow, taps, steps, weights + f * steps * kTile, now);
        if (f + 1 < pack.filter_blocks) {
          multiply<Rows::pixels>(count, pixels, kTileRow, taps, steps, weights + (f + 1) * steps * kTile, now + kSide);
        }
        if (f > 0) round(sums + (f / 2 - 1) % 2 * kTogether * kBlock, count, group, f - 2, to);
      }
      const int64_t last = (pack.filter_blocks - 1) / 2;
      round(sums + last % 2 * kTogether * kBlock, count, group, 2 * last, to);
    }
  }

  // Two filter blocks. Maps that only fill up a tile are zeros: an infinite input times a filter of zeros is NaN.
  void round(const float* of, int64_t count, int64_t group, int64_t filter_block, bf16* to) const {
    const int64_t rest = params.weights.Q / params.weights.groups - filter_block * kSide;
    const __mmask32 real = rest < kDepth ? (__mmask32{1} << rest) - 1 : ~__mmask32{0};
    to += group * plan.pack.maps + filter_block * kSide;
    for (int64_t i = 0; i < count * kSide; i++, of += kOutputs, to += all_maps) {
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(Vec::load(of + kSide), Vec::load(of));
      _mm512_storeu_si512(to, _mm512_maskz_mov_epi16(real, both));
    }
  }

  void stage2(const PixelTile* tiles, int64_t count, const bf16* from) const {
    const BasisConv2dWeights& w = params.weights;
    const CpuPack& pack = plan.pack;
    const int64_t outputs = w.K / w.mixing_groups, depth = pack.slots / kDepth;
    const int64_t width = params.channels_last ? kOutputs : kSide;
    const bf16* pixels[kTogether];
    for (int64_t group = 0; group < w.mixing_groups; group++) {
      const bf16* source = from + group * (w.groups / w.mixing_groups) * pack.maps;
      for (int64_t t = 0; t < count; t++) {
        pixels[t] = source + t * kSide * all_maps;
        if (!params.channels_last) pixels[t] = turn(pixels[t], turned + t * depth * kTile, depth);
      }
      stores_before_tile_loads();
      Block before{};
      for (int64_t k = 0; k < outputs; k += width) {
        const int64_t tile = (group * pack.panels + k / kSide) * depth * kTile;
        float* now = sums + k / width % 2 * kTogether * kBlock;
        if (params.channels_last) {
          multiply<Rows::pixels>(count, pixels, all_maps * 2, places, depth, coefficients + tile, now);
          if (k + kSide < outputs) {
            multiply<Rows::pixels>(count, pixels, all_maps * 2, places, depth, coefficients + tile + depth * kTile,
                                   now + kSide);
          }
        } else {
          multiply<Rows::outputs>(count, pixels, kTileRow, places, depth, planar + tile, now);
        }
        // While the matrix unit works at one block, the vector units finish the one before.
        if (k > 0) store(params, before);
        before = {now, tiles, count, band.image(), group * outputs + k, outputs - k < width ? outputs - k : width};
      }
      store(params, before);
    }
  }

  // 16 pixels of maps as pairs of maps of 16 pixels: the second factor of a product whose rows are outputs.
  const bf16* turn(const bf16* pixels, bf16* to, int64_t depth) const {
    for (int64_t d = 0; d < depth; d++) {
      Vec::Reg square[kSide];
      for (int64_t i = 0; i < kSide; i++) square[i] = Slots::load(pixels + i * all_maps + d * kDepth);
      transpose(square);
      for (int64_t i = 0; i < kSide; i++) Slots::store(to + d * kTile + i * kDepth, square[i]);
    }
    return to;
  }

  // z for the backward.
  void keep_maps(const PixelTile* tiles, int64_t count) const {
    const BasisConv2dWeights& w = params.weights;
    const int64_t group_maps = w.Q / w.groups, plane = params.OH * params.OW, image = band.image();
    bf16* const to = static_cast<bf16*>(params.maps);
    for (int64_t t = 0; t < count; t++) {
      int64_t pixel = tiles[t].output;
      for (uint32_t valid = tiles[t].valid; valid; valid &= valid - 1, pixel++) {
        const bf16* from = maps + (t * kSide + __builtin_ctz(valid)) * all_maps;
        for (int64_t group = 0; group < w.groups; group++, from += plan.pack.maps) {
          if (params.channels_last) {
            memcpy(to + (image * plane + pixel) * w.Q + group * group_maps, from, group_maps * sizeof(bf16));
          } else {
            for (int64_t q = 0; q < group_maps; q++) {
              to[(image * w.Q + group * group_maps + q) * plane + pixel] = from[q];
            }
          }
        }
      }
    }
  }

  // Output rows oy ... oy+rows-1 of an image. Each stage takes several times kTogether tiles in a row, so that its
  // weights come into the first-level cache once for all of them.
  void pass(int64_t image, int64_t oy, int64_t rows) {
    band.begin(image, oy);
    const int64_t tiles = plan.band.tiles(rows);
    for (int64_t done = 0; done < tiles; done += plan.tiles) {
      const int64_t count = tiles - done < plan.tiles ? tiles - done : plan.tiles;
      PixelTile at[kAmxMostTiles];
      for (int64_t t = 0; t < count; t++) at[t] = plan.band.tile(done + t, oy, rows);
      band.fill_for(at[count - 1].row);
      stores_before_tile_loads();
      const int64_t share = even_share(count, kTogether);
      const auto together = [&](int64_t t) BASISCONV_LAMBDA { return count - t < share ? count - t : share; };
      for (int64_t t = 0; t < count; t += share) stage1(at + t, together(t), maps_of(t));
      if (params.maps) keep_maps(at, count);
      for (int64_t t = 0; t < count; t += share) stage2(at + t, together(t), maps_of(t));
    }
  }
  bf16* maps_of(int64_t tile) const { return maps + tile * kSide * all_maps; }

  void run(int64_t begin, int64_t end) {
    plan.band.each_pass(begin, end, [&](int64_t image, int64_t oy, int64_t rows) { pass(image, oy, rows); });
  }
};

static void run(const BasisConv2dParams& params, const CpuPlan& plan, float* scratch, int64_t begin, int64_t end) {
  const CpuPack& pack = plan.pack;
  const BasisConv2dWeights& w = params.weights;
  float* maps = scratch + plan.ring_size;
  float* turned = maps + plan.maps_size;
  float* sums = turned + plan.turned_size;
  const bf16* filters = static_cast<const bf16*>(params.packed);
  const bf16* coefficients = filters + 2 * pack.filters_size;
  const bf16* planar = coefficients + 2 * pack.coefficients_size;
  const InputBand band(params, plan, reinterpret_cast<bf16*>(scratch));
  const int64_t count = pack.channel_blocks * w.R * w.S, depth = pack.slots / kDepth;
  int64_t* taps = new int64_t[count + depth];
  for (int64_t i = 0; i < count; i++) taps[i] = band.tap(i / (w.R * w.S), i / w.S % w.R, i % w.S);
  for (int64_t d = 0; d < depth; d++) taps[count + d] = d * (params.channels_last ? kDepth : kTile);
  const TileRegisters registers;
  Amx{params,
      plan,
      band,
      filters,
      coefficients,
      planar,
      store_for(params),
      reinterpret_cast<bf16*>(maps),
      reinterpret_cast<bf16*>(turned),
      sums,
      taps,
      taps + count,
      w.groups * pack.maps}
      .run(begin, end);
  delete[] taps;
}

static void pack(const BasisConv2dWeights& w, const CpuPack& pack, const BasisFilters& filters,
                 const float* coefficients, float* packed) {
  const int64_t group_filters = w.Q / w.groups, taps = w.R * w.S;
  const int64_t outputs = w.K / w.mixing_groups, mixed = w.Q / w.mixing_groups;
  bf16* to = reinterpret_cast<bf16*>(packed);
  FilterBlock filter_block(w, pack, filters);
  for (int64_t group = 0; group < w.groups; group++) {
    for (int64_t f = 0; f < pack.filter_blocks; f++) {
      for (int64_t b = 0; b < pack.channel_blocks; b++) {
        filter_block.read(group, f, b);
        for (int64_t tap = 0; tap < taps; tap++) {
          for (int64_t i = 0; i < kTile; i++) {  // [pair][filter][channel of the pair]
            const int64_t place = filter_block.place(i / 2 % kSide, tap, i / kDepth * 2 + i % 2);
            from_float(*filter_block.at(place), to++);
          }
        }
      }
    }
  }
  for (int planar = 0; planar < 2; planar++) {
    if ((planar ? pack.planar_size : pack.coefficients_size) == 0) continue;
    for (int64_t group = 0; group < w.mixing_groups; group++) {
      for (int64_t block = 0; block < pack.panels; block++) {
        for (int64_t d = 0; d < pack.slots / kDepth; d++) {
          for (int64_t i = 0; i < kTile; i++) {
            const int64_t k = block * kSide + (planar ? i / kDepth : i / 2 % kSide);
            const int64_t slot = d * kDepth + (planar ? i % kDepth : i / kDepth * 2 + i % 2);
            const int64_t within = slot % pack.maps, q = slot / pack.maps * group_filters + within;
            const bool real = within < group_filters && k < outputs;
            from_float(real ? coefficients[(group * outputs + k) * mixed + q] : 0.0f, to++);
          }
        }
      }
    }
  }
}

}  // namespace BASISCONV_ISA

CpuBasisConv2d cpu_basis_conv2d_amx() { return {BASISCONV_ISA::pack, BASISCONV_ISA::run}; }

}  // namespace basisconv
