// basis_conv2d for bfloat16 on the matrix unit of x86 (AMX): both stages as products of 16x32 by 32x16 tiles.
//
// Up to six tiles of pixels at a time go through a stage: a tile of filters, or of coefficients, is loaded once for all
// of them, which keeps the loads, from the second-level cache too, under the 16 cycles that each product takes. Sums
// are kept in float; z is rounded to bfloat16 once, which is also the operand of stage 2. Input rows are copied into a
// band, or read where they lie (basis_conv2d_amx_columns.h). `precise` and very few channels run on the vector kernels
// instead. Test: tests/ops/test_basis_conv2d.py with BASISCONV_CPU_ISA=amx. Bench: python -m bench run --suite C3.
#include "basis_conv2d.h"
#include "basis_conv2d_amx_band.h"
#include "basis_conv2d_amx_columns.h"
#include "basis_conv2d_amx_products.h"
#include "basis_conv2d_amx_store.h"
#include "basis_conv2d_filters.h"

namespace basisconv {
namespace BASISCONV_ISA {

struct Amx {
  const BasisConv2dParams& params;
  const CpuPlan& plan;
  InputBand band;
  Columns columns;
  const bf16* filters;
  const bf16* coefficients;  // [mixing groups][K/16][slots/32] tiles [pairs][16 outputs][2]   (channels_last)
  const bf16* planar;        // [mixing groups][K/16][slots/32] tiles [16 outputs][32 maps]    (NCHW)
  Store store;
  bf16* maps;          // z, rounded: [tiles][16][all maps]
  bf16* turned;        // NCHW, z of a mixing group: [kTogether][slots/32] tiles [pairs][16 pixels][2]
  float* sums;         // of two filter blocks, then of a block of outputs, the one before beside it
  const Step* taps;    // for stage 1 from the band
  const Step* places;  // of maps for stage 2
  int64_t all_maps;

  // Sums of block `index`, beside those of the block before; from a column of 16 on.
  float* sums_of(int64_t index) const { return sums + index % 2 * kTogether * kBlock; }
  Sums into(int64_t index, int64_t column, int64_t count) const {
    Sums to{{}, kOutputs * 4};
    for (int64_t t = 0; t < count; t++) to.tiles[t] = sums_of(index) + t * kBlock + column;
    return to;
  }

  // z of `count` tiles of the band, at most kTogether.
  void stage1(const PixelTile* tiles, int64_t count, bf16* to) const {
    const BasisConv2dWeights& w = params.weights;
    const CpuPack& pack = plan.pack;
    const int64_t steps = pack.channel_blocks * w.R * w.S;
    Pixels pixels{{}, count, kTileRow};
    for (int64_t group = 0; group < w.groups; group++) {
      for (int64_t t = 0; t < count; t++) {
        pixels.tiles[t] = band.pixels(group * pack.channel_blocks) + tiles[t].start * kDepth;
      }
      const bf16* weights = filters + group * pack.group_size;
      for (int64_t f = 0; f < pack.filter_blocks; f++, weights += steps * kTile) {
        multiply<Rows::pixels>(pixels, taps, steps, weights, into(f / 2, f % 2 * kSide, count));
        // While the matrix unit works at two filter blocks, the vector units round the two before.
        const bool both = f % 2 == 1 || f + 1 == pack.filter_blocks;
        if (both && f > 1) round(f / 2 - 1, count, group, to);
      }
      round((pack.filter_blocks - 1) / 2, count, group, to);
    }
  }

  // Two filter blocks. Maps that only fill up a tile are zeros: an infinite input times a filter of zeros is NaN.
  void round(int64_t pair, int64_t count, int64_t group, bf16* to) const {
    const float* of = sums_of(pair);
    const int64_t rest = params.weights.Q / params.weights.groups - pair * kDepth;
    const __mmask32 real = rest < kDepth ? (__mmask32{1} << rest) - 1 : ~__mmask32{0};
    to += group * plan.pack.maps + pair * kDepth;
    for (int64_t i = 0; i < count * kSide; i++, of += kOutputs, to += all_maps) {
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(Vec::load(of + kSide), Vec::load(of));
      _mm512_storeu_si512(to, _mm512_maskz_mov_epi16(real, both));
    }
  }

  void stage2(const PixelTile* tiles, int64_t count, int64_t image, const bf16* from) const {
    const BasisConv2dWeights& w = params.weights;
    const CpuPack& pack = plan.pack;
    const int64_t outputs = w.K / w.mixing_groups, depth = pack.slots / kDepth;
    const int64_t width = params.channels_last ? kOutputs : kSide;
    Pixels pixels{{}, count, params.channels_last ? all_maps * 2 : kTileRow};
    for (int64_t group = 0; group < w.mixing_groups; group++) {
      const bf16* source = from + group * (w.groups / w.mixing_groups) * pack.maps;
      for (int64_t t = 0; t < count; t++) {
        pixels.tiles[t] = source + t * kSide * all_maps;
        if (!params.channels_last) pixels.tiles[t] = turn(pixels.tiles[t], turned + t * depth * kTile, depth);
      }
      stores_before_tile_loads();
      const auto finish = [&](int64_t k) BASISCONV_LAMBDA {
        const int64_t of_block = outputs - k < width ? outputs - k : width;
        store(params, {sums_of(k / width), tiles, count, image, group * outputs + k, of_block});
      };
      for (int64_t k = 0; k < outputs; k += width) {
        const int64_t tile = (group * pack.panels + k / kSide) * depth * kTile;
        if (params.channels_last) {
          const bf16* weights = coefficients + tile;
          multiply<Rows::pixels>(pixels, places, depth, weights, into(k / width, 0, count));
          if (k + kSide < outputs) {
            multiply<Rows::pixels>(pixels, places, depth, weights + depth * kTile, into(k / width, kSide, count));
          }
        } else {
          multiply<Rows::outputs>(pixels, places, depth, planar + tile, into(k / width, 0, count));
        }
        // While the matrix unit works at one block, the vector units finish the one before.
        if (k > 0) finish(k - width);
      }
      finish((outputs - 1) / width * width);
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
  void keep_maps(const PixelTile* tiles, int64_t count, int64_t image) const {
    const BasisConv2dWeights& w = params.weights;
    const int64_t group_maps = w.Q / w.groups, plane = params.OH * params.OW;
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
      in_shares(count, [&](int64_t t, int64_t together) { stage1(at + t, together, maps_of(t)); });
      after_stage1(at, count, image);
    }
  }

  // The same where the input lies.
  void pass(const Part& part) const {
    const int64_t pixels = part.rows * params.OW, count = (pixels + kSide - 1) / kSide;
    PixelTile at[kAmxMostTiles];
    for (int64_t t = 0; t < count; t++) {
      const int64_t left = pixels - t * kSide;
      at[t] = {0, part.oy * params.OW + t * kSide, 0, left < kSide ? (1u << left) - 1 : 0xFFFFu};
    }
    columns.run(part, maps, all_maps);
    after_stage1(at, count, part.image);
  }

  void after_stage1(const PixelTile* tiles, int64_t count, int64_t image) const {
    if (params.maps) keep_maps(tiles, count, image);
    in_shares(count, [&](int64_t t, int64_t together) { stage2(tiles + t, together, image, maps_of(t)); });
  }

  bf16* maps_of(int64_t tile) const { return maps + tile * kSide * all_maps; }

  void run(int64_t begin, int64_t end) {
    if (!plan.in_place) {
      plan.band.each_pass(begin, end, [&](int64_t image, int64_t oy, int64_t rows) { pass(image, oy, rows); });
      return;
    }
    while (begin < end) {
      const Part part = columns.part_from(begin / params.OH, begin % params.OH, end - begin);
      pass(part);
      begin += part.rows;
    }
  }
};

static void run(const BasisConv2dParams& params, const CpuPlan& plan, float* scratch, int64_t begin, int64_t end) {
  const CpuPack& pack = plan.pack;
  const BasisConv2dWeights& w = params.weights;
  float* maps = scratch + plan.ring_size;
  float* turned = maps + plan.maps_size;
  float* columns = turned + plan.turned_size;
  float* sums = columns + plan.partial_size;
  const bf16* filters = static_cast<const bf16*>(params.packed);
  const bf16* coefficients = filters + 2 * pack.filters_size;
  const bf16* planar = coefficients + 2 * pack.coefficients_size;
  const InputBand band(params, plan, reinterpret_cast<bf16*>(scratch));
  const int64_t taps = w.R * w.S, count = pack.channel_blocks * taps, depth = pack.slots / kDepth;
  Step* steps = new Step[count + depth];
  for (int64_t i = 0; i < count && !plan.in_place; i++) {
    steps[i] = {band.tap(i / taps, i / w.S % w.R, i % w.S), i * kTile};
  }
  for (int64_t d = 0; d < depth; d++) steps[count + d] = {d * (params.channels_last ? kDepth : kTile), d * kTile};
  const TileRegisters registers;
  Amx{params,
      plan,
      band,
      Columns(params, plan, filters, columns, steps),
      filters,
      coefficients,
      planar,
      store_for(params),
      reinterpret_cast<bf16*>(maps),
      reinterpret_cast<bf16*>(turned),
      sums,
      steps,
      steps + count,
      w.groups * pack.maps}
      .run(begin, end);
  delete[] steps;
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
