// Direct stage 1: every tap of every channel block runs through the register tile; any kernel, stride and dilation.
#pragma once
#include "basis_conv2d_recombine.h"
#include "basis_conv2d_rows.h"
#include "basis_conv2d_taps.h"

namespace basisconv {
namespace BASISCONV_ISA {

template <typename T>
static void run_direct(const BasisConv2dParams& params, const CpuPlan& plan, float* scratch, int64_t begin,
                       int64_t end) {
  const BasisConv2dWeights& w = params.weights;
  const CpuPack& pack = plan.pack;
  using Value = Slots::Value;
  const Value* filters = static_cast<const Value*>(params.packed);
  const Value* coefficients = filters + Slots::kValues * pack.filters_size;
  const Ring ring = make_ring(params, plan, w.stride_w, reinterpret_cast<Value*>(scratch));
  Value* z = reinterpret_cast<Value*>(scratch + plan.ring_size);
  Value* turned = z + Slots::kValues * plan.maps_size;
  float* partial = scratch + plan.ring_size + plan.maps_size + plan.turned_size;
  const Recombination<T> recombination{params, pack, coefficients,
                                       coefficients + Slots::kValues * pack.coefficients_size, turned};
  const int64_t all_maps = w.groups * pack.maps;
  const int64_t z_row = params.OW * all_maps;
  const int64_t registers = pack.vectors * kWidth;
  const Stage1Function* stage1 = stage1_functions(pack.lanes, pack.vectors, pack.block, plan.in_place);
  const int64_t pixel_stride = plan.in_place ? w.stride_w * params.input_stride_w : pack.block;
  const int64_t plane = plan.in_place ? pack.block : ring.plane;
  const int64_t tile = even_tile(params.OW, stage1_pixels(pack.vectors));
  const int64_t block_weights = pack.positions * (pack.block / pack.lanes) * registers;
  const bool in_chunks = plan.chunk < pack.channel_blocks;
  TileTaps tile_taps(params, plan, tile);

  int64_t image = -1, filled = 0;  // rows of `image` before `filled` have been copied
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
    for (; filled <= last && !plan.in_place; filled++)
      fill_row<T>(params, pack, ring, filled % plan.ring_rows, n, filled);

    const Value* source =
        plan.in_place ? static_cast<const Value*>(params.input) + n * params.input_stride_n : ring.rows;
    for (int64_t row = 0; row < rows; row++) tile_taps.fill(ring, row, oy + row);
    for (int64_t group = 0; group < w.groups; group++) {
      const Value* group_filters = filters + group * pack.group_size;
      for (int64_t b = 0; b < pack.channel_blocks; b += plan.chunk) {
        const int64_t b_end = b + plan.chunk < pack.channel_blocks ? b + plan.chunk : pack.channel_blocks;
        for (int64_t f = 0; f < pack.filter_blocks; f++) {
          const Value* block_filters = group_filters + f * pack.channel_blocks * block_weights;
          for (int64_t row = 0; row < rows; row++) {
            Stage1 s{};
            s.weights = block_filters + b * block_weights;
            s.blocks = b_end - b;
            s.plane = plane;
            s.pixel_stride = pixel_stride;
            s.block_weights = block_weights;
            s.z_stride = all_maps;
            s.times = 1;
            const Value* pixels_here = source + tile_taps.origin(row) + (group * pack.channel_blocks + b) * plane;
            Value* z_here = z + row * z_row + group * pack.maps + f * pack.filters;
            float* waiting = in_chunks ? partial + (row * pack.filter_blocks + f) * params.OW * registers : partial;
            for (int64_t x = 0; x < params.OW; x += tile) {
              const int64_t pixels = params.OW - x < tile ? params.OW - x : tile;
              if (b == 0 && f == 0 && group == 0 && params.channels_last) {
                const int64_t pixel_bytes = w.K * static_cast<int64_t>(sizeof(T));
                const int64_t from = ((unit + row) * params.OW + x) * pixel_bytes;
                const char* lines = static_cast<const char*>(params.output) + from;
                for (int64_t at = 0; at < pixels * pixel_bytes; at += 64) __builtin_prefetch(lines + at, 1, 2);
                if (params.residual) {
                  lines = static_cast<const char*>(params.residual) + from;
                  for (int64_t at = 0; at < pixels * pixel_bytes; at += 64) __builtin_prefetch(lines + at, 0, 2);
                }
              }
              float* sums = in_chunks ? waiting + x * registers : waiting;
              const int64_t t = x / tile, groups = tile_taps.groups(t);
              for (int64_t i = 0; i < groups; i++) {
                const TapGroup& those = tile_taps.group(t, i);
                const TileTaps::List list = tile_taps.taps(row, t, those);
                s.first = b == 0 && i == 0;
                s.last = b_end == pack.channel_blocks && i + 1 == groups;
                if (s.first && those.end - those.begin < pixels) {
                  memset(sums, 0, those.begin * registers * sizeof(float));
                  memset(sums + those.end * registers, 0, (pixels - those.end) * registers * sizeof(float));
                }
                s.offset = list.offset;
                s.tap_weights = list.weight;
                s.taps = list.taps;
                s.pixels = pixels_here + (x + those.begin) * pixel_stride;
                s.z = z_here + (x + those.begin) * all_maps;
                s.partial = sums + those.begin * registers;
                stage1[those.end - those.begin](s);
              }
            }
          }
        }
      }
    }
    if constexpr (Slots::kValues == 1) {
      if (!w.precise) round_maps<T>(z, rows * z_row);
    }
    clear_filling(w, pack, z, rows * z_row);
    recombination.run(z, all_maps, n, oy * params.OW, rows * params.OW);
    unit += rows;
  }
}

}  // namespace BASISCONV_ISA
}  // namespace basisconv
