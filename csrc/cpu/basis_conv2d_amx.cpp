// basis_conv2d for bfloat16 on the matrix unit of x86 (AMX): both stages as products of 16x32 by 32x16 tiles.
//
// A tile row is 64 bytes: one pixel's 32 channels of a ring row, so a tap of 16 neighbouring pixels is one tile load
// with a stride of 64 bytes, whatever the convolution's stride. Sums are kept in float; z is rounded to bfloat16 once,
// which is also the operand of stage 2. `precise` and very few channels run on the vector kernels instead.
// Test: tests/ops/test_basis_conv2d.py with BASISCONV_CPU_ISA=amx. Bench: python -m bench run --suite C3.
#include "basis_conv2d.h"
#include "basis_conv2d_amx_tiles.h"
#include "basis_conv2d_rows.h"

namespace basisconv {
namespace BASISCONV_ISA {

// One tap of one channel block for all pixel tiles of a pass: where its pixels lie, and its filters.
struct Step {
  int64_t pixels, filters;  // elements
};

// z of PIXELS tiles of 16 pixels and FILTERS tiles of 16 filters: the accumulators are tiles 0 ... 3.
template <int PIXELS, int FILTERS>
static void stage1(const Step* steps, int64_t count, const bf16* const* pixels, const bf16* filters,
                   int64_t filter_block, float* const* z, int64_t z_stride) {
  static_assert(PIXELS * FILTERS <= 4, "four accumulator tiles");
  _tile_zero(0);
  if constexpr (PIXELS * FILTERS > 1) _tile_zero(1);
  if constexpr (PIXELS * FILTERS > 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < count; i++) {
    const bf16* f = filters + steps[i].filters;
    const int64_t at = steps[i].pixels;
    _tile_loadd(6, f, kTileRow);
    if constexpr (FILTERS == 2) _tile_loadd(7, f + filter_block, kTileRow);
    _tile_loadd(4, pixels[0] + at, kTileRow);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (FILTERS == 2) {
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (PIXELS == 2) {
        _tile_loadd(5, pixels[1] + at, kTileRow);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    } else if constexpr (PIXELS > 1) {
      _tile_loadd(5, pixels[1] + at, kTileRow);
      _tile_dpbf16ps(1, 5, 6);
      if constexpr (PIXELS == 4) {
        _tile_loadd(4, pixels[2] + at, kTileRow);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(5, pixels[3] + at, kTileRow);
        _tile_dpbf16ps(3, 5, 6);
      }
    }
  }
  const int64_t stride = z_stride * 4;
  _tile_stored(0, z[0], stride);
  if constexpr (FILTERS == 2) {
    _tile_stored(1, z[0] + kSide, stride);
    if constexpr (PIXELS == 2) {
      _tile_stored(2, z[1], stride);
      _tile_stored(3, z[1] + kSide, stride);
    }
  } else if constexpr (PIXELS > 1) {
    _tile_stored(1, z[1], stride);
    if constexpr (PIXELS == 4) {
      _tile_stored(2, z[2], stride);
      _tile_stored(3, z[3], stride);
    }
  }
}

// out += bias + residual, activation, one rounding; for n <= 16 neighbouring elements of out.
static BASISCONV_INLINE void finish(Vec::Reg value, const bf16* residual, bf16* out, int64_t n, Activation activation) {
  const __mmask16 valid = Vec::first(n);
  if (residual) value = Vec::add(value, Vec::load_n(residual, n));
  if (activation != Activation::none) value = Vec::max(Vec::zero(), value);
  if (activation == Activation::relu6) value = Vec::min(Vec::set1(6.0f), value);
  _mm256_mask_storeu_epi16(out, valid, Vec::to_bf16(value));
}

struct Amx {
  const BasisConv2dParams& params;
  const CpuPlan& plan;
  const bf16* filters;
  const bf16* coefficients;  // [mixing groups][K/16][slots/32] tiles [pairs][16 outputs][2]   (channels_last)
  const bf16* planar;        // [mixing groups][K/16][slots/32] tiles [16 outputs][32 maps]    (NCHW)
  Ring ring;
  float* z;         // [tiles][16][all maps], stage 1 sums
  bf16* maps;       // the same rounded: [tiles][16][all maps]
  bf16* turned;     // NCHW: [slots/32] tiles [pairs][16 pixels][2] of one pixel tile
  float* products;  // two tiles [16][32]
  int64_t all_maps;

  // 16 pixels times all outputs of one mixing group; `first` is the first pixel in its image.
  void recombine(int64_t group, const bf16* maps16, int64_t n, int64_t first, int64_t pixels) const {
    const BasisConv2dWeights& w = params.weights;
    const CpuPack& pack = plan.pack;
    const int64_t outputs = w.K / w.mixing_groups, plane = params.OH * params.OW, depth = pack.slots / kDepth;
    const bf16* source = maps16 + group * (w.groups / w.mixing_groups) * pack.maps;
    if (!params.channels_last) {
      for (int64_t d = 0; d < depth; d++) {
        Vec::Reg square[kSide];
        for (int64_t i = 0; i < kSide; i++)
          square[i] = Vec::load(reinterpret_cast<const float*>(source + i * all_maps + d * kDepth));
        transpose(square);
        for (int64_t i = 0; i < kSide; i++)
          Vec::store(reinterpret_cast<float*>(turned + d * kTile + i * kDepth), square[i]);
      }
    }
    stores_before_tile_loads();
    for (int64_t block = 0; block < pack.panels; block += 2) {
      const bool two = block + 1 < pack.panels;
      const int64_t at = (group * pack.panels + block) * depth * kTile, next = depth * kTile;
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t d = 0; d < depth; d++) {
        if (params.channels_last) {
          _tile_loadd(4, source + d * kDepth, all_maps * 2);
          _tile_loadd(6, coefficients + at + d * kTile, kTileRow);
          _tile_dpbf16ps(0, 4, 6);
          if (two) {
            _tile_loadd(7, coefficients + at + next + d * kTile, kTileRow);
            _tile_dpbf16ps(1, 4, 7);
          }
        } else {
          _tile_loadd(6, turned + d * kTile, kTileRow);
          _tile_loadd(4, planar + at + d * kTile, kTileRow);
          _tile_dpbf16ps(0, 4, 6);
          if (two) {
            _tile_loadd(5, planar + at + next + d * kTile, kTileRow);
            _tile_dpbf16ps(1, 5, 6);
          }
        }
      }
      const int64_t k = group * outputs + block * kSide;
      const int64_t count = outputs - block * kSide < 2 * kSide ? outputs - block * kSide : 2 * kSide;
      if (params.channels_last) {
        _tile_stored(0, products, 2 * kTileRow);
        _tile_stored(1, products + kSide, 2 * kTileRow);
        const int64_t low = count < kSide ? count : kSide, high = count - low;
        const Vec::Reg bias0 = Vec::load_n(params.bias + k, low), bias1 = Vec::load_n(params.bias + k + kSide, high);
        for (int64_t p = 0; p < pixels; p++) {
          const int64_t to = (n * plane + first + p) * w.K + k;
          bf16* out = static_cast<bf16*>(params.output) + to;
          const bf16* residual = params.residual ? static_cast<const bf16*>(params.residual) + to : nullptr;
          finish(Vec::add(Vec::load(products + p * kDepth), bias0), residual, out, low, params.activation);
          if (high) {
            finish(Vec::add(Vec::load(products + p * kDepth + kSide), bias1), residual ? residual + kSide : nullptr,
                   out + kSide, high, params.activation);
          }
        }
      } else {
        _tile_stored(0, products, kTileRow);
        _tile_stored(1, products + kSide * kSide, kTileRow);
        for (int64_t i = 0; i < count; i++) {
          const int64_t to = (n * w.K + k + i) * plane + first;
          bf16* out = static_cast<bf16*>(params.output) + to;
          const bf16* residual = params.residual ? static_cast<const bf16*>(params.residual) + to : nullptr;
          finish(Vec::add(Vec::load(products + i * kSide), Vec::set1(params.bias[k + i])), residual, out, pixels,
                 params.activation);
        }
      }
    }
  }

  void keep_maps(const bf16* maps16, int64_t n, int64_t first, int64_t pixels) const {
    const BasisConv2dWeights& w = params.weights;
    const int64_t group_maps = w.Q / w.groups, plane = params.OH * params.OW;
    bf16* to = static_cast<bf16*>(params.maps);
    for (int64_t p = 0; p < pixels; p++) {
      for (int64_t group = 0; group < w.groups; group++) {
        const bf16* from = maps16 + p * all_maps + group * plan.pack.maps;
        if (params.channels_last) {
          memcpy(to + (n * plane + first + p) * w.Q + group * group_maps, from, group_maps * sizeof(bf16));
        } else {
          for (int64_t q = 0; q < group_maps; q++) to[(n * w.Q + group * group_maps + q) * plane + first + p] = from[q];
        }
      }
    }
  }

  // Rows oy ... oy+rows-1 of image n: every row is cut into tiles of 16 pixels, the last one reaching past the row.
  void pass(int64_t n, int64_t oy, int64_t rows, Step* steps, const bf16** pixels, float** sums) const {
    const BasisConv2dWeights& w = params.weights;
    const CpuPack& pack = plan.pack;
    const int64_t row_tiles = (params.OW + kSide - 1) / kSide, tiles = rows * row_tiles;
    const int64_t taps = w.R * w.S;
    for (int64_t group = 0; group < w.groups; group++) {
      const bf16* group_filters = filters + group * pack.group_size;
      for (int64_t row = 0; row < rows; row++) {
        // Taps outside the image add nothing; the steps differ from row to row at the border only.
        int64_t count = 0;
        for (int64_t b = 0; b < pack.channel_blocks; b++) {
          for (int64_t r = 0; r < w.R; r++) {
            const int64_t y = (oy + row) * w.stride_h + r * w.dilation_h - params.pad_top;
            if (y < 0 || y >= params.H) continue;
            for (int64_t s = 0; s < w.S; s++) {
              steps[count].pixels = y % plan.ring_rows * ring.row_size +
                                    (group * pack.channel_blocks + b) * ring.plane + ring.column(s * w.dilation_w);
              steps[count].filters = (b * taps + r * w.S + s) * kTile;
              count++;
            }
          }
        }
        for (int64_t t = 0; t < row_tiles; t++) {
          pixels[t] = ring.rows + t * kSide * kDepth;
          sums[t] = z + (row * row_tiles + t) * kSide * all_maps + group * pack.maps;
        }
        const int64_t block = pack.channel_blocks * taps * kTile;
        for (int64_t f = 0; f < pack.filter_blocks;) {
          const bf16* here = group_filters + f * block;
          const bool pair = f + 1 < pack.filter_blocks;
          float* to[4];
          for (int64_t t = 0; t < row_tiles;) {
            const int64_t rest = row_tiles - t;
            for (int i = 0; i < 4; i++) to[i] = sums[t + i < row_tiles ? t + i : t] + f * kSide;
            if (pair) {
              if (rest >= 2) {
                stage1<2, 2>(steps, count, pixels + t, here, block, to, all_maps);
                t += 2;
              } else {
                stage1<1, 2>(steps, count, pixels + t, here, block, to, all_maps);
                t += 1;
              }
            } else if (rest >= 4) {
              stage1<4, 1>(steps, count, pixels + t, here, block, to, all_maps);
              t += 4;
            } else if (rest >= 2) {
              stage1<2, 1>(steps, count, pixels + t, here, block, to, all_maps);
              t += 2;
            } else {
              stage1<1, 1>(steps, count, pixels + t, here, block, to, all_maps);
              t += 1;
            }
          }
          f += pair ? 2 : 1;
        }
      }
    }
    for (int64_t i = 0; i < tiles * kSide * all_maps; i += kSide) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(maps + i), Vec::to_bf16(Vec::load(z + i)));
    }
    // Maps that only fill up a tile: an infinite input times a filter of zeros is NaN.
    if (const int64_t real = w.Q / w.groups; real < pack.maps) {
      for (int64_t i = 0; i < tiles * kSide * all_maps; i += pack.maps)
        memset(maps + i + real, 0, (pack.maps - real) * sizeof(bf16));
    }
    for (int64_t row = 0; row < rows; row++) {
      for (int64_t t = 0; t < row_tiles; t++) {
        const int64_t count = params.OW - t * kSide < kSide ? params.OW - t * kSide : kSide;
        if (params.maps) {
          keep_maps(maps + (row * row_tiles + t) * kSide * all_maps, n, (oy + row) * params.OW + t * kSide, count);
        }
        for (int64_t group = 0; group < w.mixing_groups; group++) {
          recombine(group, maps + (row * row_tiles + t) * kSide * all_maps, n, (oy + row) * params.OW + t * kSide,
                    count);
        }
      }
    }
  }

  void run(int64_t begin, int64_t end) const {
    const BasisConv2dWeights& w = params.weights;
    const int64_t row_tiles = (params.OW + kSide - 1) / kSide;
    Step* steps = new Step[plan.pack.channel_blocks * w.R * w.S];
    const bf16** pixels = new const bf16*[row_tiles];
    float** sums = new float*[row_tiles];
    int64_t image = -1, filled = 0;
    for (int64_t unit = begin; unit < end;) {
      const int64_t n = unit / params.OH, oy = unit % params.OH;
      int64_t rows = plan.rows;
      if (rows > params.OH - oy) rows = params.OH - oy;
      if (rows > end - unit) rows = end - unit;
      int64_t first = oy * w.stride_h - params.pad_top;
      int64_t last = (oy + rows - 1) * w.stride_h - params.pad_top + (w.R - 1) * w.dilation_h;
      if (first < 0) first = 0;
      if (last > params.H - 1) last = params.H - 1;
      if (n != image) filled = 0;
      if (filled < first) filled = first;
      image = n;
      for (; filled <= last; filled++) fill_row<bf16>(params, plan.pack, ring, filled % plan.ring_rows, n, filled);
      stores_before_tile_loads();
      pass(n, oy, rows, steps, pixels, sums);
      unit += rows;
    }
    delete[] steps;
    delete[] pixels;
    delete[] sums;
  }
};

static void run(const BasisConv2dParams& params, const CpuPlan& plan, float* scratch, int64_t begin, int64_t end) {
  const CpuPack& pack = plan.pack;
  const BasisConv2dWeights& w = params.weights;
  float* z = scratch + plan.ring_size;
  bf16* maps = reinterpret_cast<bf16*>(z + plan.maps_size);
  float* turned = z + plan.maps_size + plan.transformed_size;
  // Zeros for pixels past a row too, and for maps that only fill up a tile.
  const Ring ring = make_ring(params, plan, w.stride_w, reinterpret_cast<bf16*>(scratch));
  memset(z, 0, plan.maps_size * sizeof(float));
  const bf16* filters = static_cast<const bf16*>(params.packed);
  const bf16* coefficients = filters + 2 * pack.filters_size;
  const bf16* planar = coefficients + 2 * pack.coefficients_size;
  const TileRegisters registers;
  Amx{params,
      plan,
      filters,
      coefficients,
      planar,
      ring,
      z,
      maps,
      reinterpret_cast<bf16*>(turned),
      turned + plan.turned_size,
      w.groups * pack.maps}
      .run(begin, end);
}

static void pack(const BasisConv2dWeights& w, const CpuPack& pack, const float* filters, const float* coefficients,
                 float* packed) {
  const int64_t group_channels = w.C / w.groups, group_filters = w.Q / w.groups, taps = w.R * w.S;
  const int64_t outputs = w.K / w.mixing_groups, mixed = w.Q / w.mixing_groups;
  bf16* to = reinterpret_cast<bf16*>(packed);
  for (int64_t group = 0; group < w.groups; group++) {
    for (int64_t f = 0; f < pack.filter_blocks; f++) {
      for (int64_t b = 0; b < pack.channel_blocks; b++) {
        for (int64_t tap = 0; tap < taps; tap++) {
          for (int64_t i = 0; i < kTile; i++) {  // [pair][filter][channel of the pair]
            const int64_t q = f * kSide + i / 2 % kSide, c = b * kDepth + i / kDepth * 2 + i % 2;
            const bool real = q < group_filters && c < group_channels;
            from_float(real ? filters[((group * group_filters + q) * group_channels + c) * taps + tap] : 0.0f, to++);
          }
        }
      }
    }
  }
  for (int planar = 0; planar < 2; planar++) {
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
