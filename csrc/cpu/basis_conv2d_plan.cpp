#include "basis_conv2d_plan.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>

namespace basisconv {
namespace {

constexpr int64_t kScratchFloats = 240 * 1024;   // a thread's scratch stays under 1 MiB where one tile allows
constexpr int64_t kTilePixels = 14;              // pixels of a full AVX-512 tile of two registers
constexpr int64_t kMostTilePixels = 16;          // of one register
constexpr int64_t kProductsFloats = 120 * 1024;  // winograd: products of a pass, where six tiles allow

// Half of the second-level cache: 1 MiB or more beside AVX-512, half of that in processors without.
int64_t cache_floats(int64_t width) { return (width == 16 ? 128 : 64) * 1024; }

// Winograd passes: tiles in one, and channel blocks transformed and multiplied at a time. AVX-512: the transformed
// tiles of a row of positions stay in the first-level cache, and a pass fills one register tile. Narrower registers:
// one position does, in 32 KiB; filters that do not fit the second level beside everything else are read once for more
// tiles.
struct PassSizes {
  int64_t tiles, chunk;
};
PassSizes pass_sizes(int64_t width, int64_t filters_floats) {
  if (width == 16) return {kTilePixels, 4};
  return {filters_floats > cache_floats(width) ? 48 : 24, 8};
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t aligned(int64_t floats) { return ceil_div(floats, 16) * 16; }

// Register tiles that the kernels are compiled for: (lanes, vectors).
struct Tile {
  int32_t lanes, vectors;
};
constexpr Tile kTiles512[] = {{1, 1}, {1, 2}, {1, 3}, {2, 1}, {2, 2}, {2, 3}, {4, 1}, {4, 2}, {4, 3}, {8, 2}};
constexpr Tile kTiles256[] = {{1, 2}, {1, 3}, {2, 2}, {2, 3}, {4, 2}};
constexpr Tile kTilesBase[] = {{1, 2}, {2, 2}, {4, 2}};

// The tile that takes least time for Q filters over sums of `depth` values. Cycles a pixel, measured on AVX-512: a step
// of one register costs half a cycle and its share of loads, less the more registers share them; at the end a register
// costs its store and the sum over its lanes.
template <int N>
Tile best_tile(const Tile (&tiles)[N], int64_t width, int64_t Q, int64_t depth, int64_t block) {
  constexpr double kStep[] = {0.0, 0.68, 0.59, 0.545};
  Tile best = tiles[0];
  double best_cost = 0;
  for (const Tile& t : tiles) {
    if (t.lanes > block) continue;
    const double sums = t.lanes == 1 ? 0.25 : t.lanes == 2 ? 1.0 : 3.5;
    const int64_t registers = ceil_div(Q, t.vectors * width / t.lanes) * t.vectors;
    const double steps = static_cast<double>(depth) / t.lanes * (t.lanes == 1 ? 1.0 : 1.05);
    const double cost = static_cast<double>(registers) * (kStep[t.vectors] * steps + sums);
    if (best_cost == 0 || cost < best_cost) {
      best = t;
      best_cost = cost;
    }
  }
  return best;
}

// Half of the accumulator registers: two registers of pixels for each of so many outputs.
int32_t planar_rows_of(Isa isa) { return isa >= Isa::avx512 ? 14 : isa == Isa::avx2 ? 6 : 5; }
int32_t width_of(Isa isa) { return isa >= Isa::avx512 ? 16 : isa == Isa::avx2 ? 8 : 4; }

bool fits_winograd(const BasisConv2dWeights& w) {
  return !w.precise && w.R == 3 && w.S == 3 && w.stride_h == w.stride_w && w.stride_h <= 2 && w.dilation_h == 1 &&
         w.dilation_w == 1 && w.C / w.groups >= 8;
}

// Winograd tiles in a pass over `mine` of them: equal passes of at most `most` and, where they fit, whole rows of
// tiles, which leave z of several rows in one piece.
int64_t tiles_in_pass(int64_t mine, int64_t tile_columns, int64_t most) {
  const int64_t tiles = ceil_div(mine, ceil_div(mine, most));
  if (tile_columns > most) return tiles;
  return std::min(most, tiles + tile_columns - 1) / tile_columns * tile_columns;
}

int64_t register_tiles(int64_t mine, int64_t in_pass) {
  return mine / in_pass * ceil_div(in_pass, kTilePixels) + ceil_div(mine % in_pass, kTilePixels);
}

// Tiles of 2x4 outputs take three quarters of the products of tiles of 2x2, for weights half as large again. Sums over
// few channels would lose exactness by them, and 16-bit dtypes their exactness on whole numbers.
constexpr int64_t kWideTileChannels = 64;
int32_t tile_width_of(const BasisConv2dWeights& w) {
  return w.stride_h == 1 && w.dtype == DType::f32 && w.C / w.groups >= kWideTileChannels ? 4 : 2;
}

constexpr int64_t kAmxMapsFloats = 8 * 1024;  // z of the tiles that go through a stage together
// Where columns of taps are summed apart; measured on some 40 layers of 32 to 512 channels.
constexpr int64_t kAmxPartPixels = 128;      // of a part, or one row
constexpr int64_t kAmxManyProducts = 9;      // of a tile and a column of taps
constexpr int64_t kAmxNearPart = 28 * 1024;  // bfloat16 values: a little more than the first-level cache
constexpr int64_t kBandFloats = 64 * 1024;   // input rows of a pass

CpuPack amx_pack(const BasisConv2dWeights& w) {
  CpuPack p{};
  p.variant = CpuVariant::amx;
  p.width = 16;
  p.lanes = 1;
  p.vectors = 1;
  p.output_vectors = 1;
  p.block = kAmxDepth;
  p.channel_blocks = ceil_div(w.C / w.groups, kAmxDepth);
  p.positions = w.R * w.S;
  p.filters = kAmxSide;
  p.filter_blocks = ceil_div(w.Q / w.groups, kAmxSide);
  p.maps = ceil_div(w.Q / w.groups, kAmxDepth) * kAmxDepth;
  p.slots = w.groups / w.mixing_groups * p.maps;
  p.panels = p.planar_panels = ceil_div(w.K / w.mixing_groups, kAmxSide);
  p.planar_rows = kAmxSide;
  p.values = 2;
  p.group_size = p.filter_blocks * p.channel_blocks * p.positions * kAmxSide * kAmxDepth;
  p.filters_size = w.groups * p.group_size / p.values;
  p.coefficients_size = p.planar_size = w.mixing_groups * p.panels * p.slots * kAmxSide / 2;
  return p;
}

// Output rows of a part: one, or of up to kAmxPartPixels those that leave least of the last tile empty.
int64_t amx_rows(const BasisConv2dParams& params) {
  int64_t best = 1, best_tiles = ceil_div(params.W, kAmxSide);
  for (int64_t rows = 2; rows * std::max(params.W, params.OW) <= kAmxPartPixels; rows++) {
    const int64_t tiles = ceil_div(rows * params.W, kAmxSide);
    if (tiles * best <= best_tiles * rows) {
      best = rows;
      best_tiles = tiles;
    }
  }
  return best;
}

// Whether columns of taps are summed apart, which needs whole tiles of the input where it lies. Several blocks of
// filters read a part again: worth it where the part stays near and products outweigh the three sums that each tile
// stores.
bool amx_in_place(const BasisConv2dParams& params, const CpuPack& pack) {
  const BasisConv2dWeights& w = params.weights;
  const int64_t most = kAmxMostTiles * kAmxSide, channels = w.C / w.groups;
  const bool fits = w.S == kAmxColumns && w.stride_h == 1 && w.stride_w == 1 && channels % kAmxDepth == 0 &&
                    params.input_stride_c == 1 && params.input_stride_h == params.W * params.input_stride_w &&
                    kAmxSide <= params.W && params.W <= most && params.OW <= most;
  if (!fits || pack.filter_blocks == 1) return fits;
  const int64_t part = (amx_rows(params) + w.R - 1) * params.W * channels;
  return pack.channel_blocks * w.R >= kAmxManyProducts && part <= kAmxNearPart;
}

CpuPlan amx_plan(const BasisConv2dParams& params, const CpuPack& pack) {
  const BasisConv2dWeights& w = params.weights;
  CpuPlan p{};
  p.pack = pack;
  p.units = params.N * params.OH;
  p.chunk = pack.channel_blocks;
  p.band = {params.OH,    params.OW,      params.W,       w.R, w.S, w.stride_h, w.stride_w, w.dilation_h,
            w.dilation_w, params.pad_top, params.pad_left};
  const int64_t maps_of_tile = kAmxSide * w.groups * pack.maps / 2;
  p.turned_size = params.channels_last ? 0 : kAmxTogether * kAmxSide * pack.slots / 2;
  p.products_size = 2 * kAmxTogether * kAmxSide * 2 * kAmxSide;
  p.in_place = amx_in_place(params, pack);
  if (p.in_place) {
    p.rows = amx_rows(params);
    p.maps_size = ceil_div(p.rows * params.OW, kAmxSide) * maps_of_tile;
    p.partial_size = kAmxColumns * ceil_div(p.rows * params.W, kAmxSide) * kAmxSide * kAmxSide;
    return p;
  }
  const int64_t blocks = w.groups * pack.channel_blocks;
  p.band.fit(kBandFloats / (blocks * kAmxDepth / 2));
  p.ring_size = blocks * p.band.plane() * kAmxDepth / 2;
  p.tiles = kAmxTogether *
            std::clamp<int64_t>(kAmxMapsFloats / (kAmxTogether * maps_of_tile), 1, kAmxMostTiles / kAmxTogether);
  p.maps_size = p.tiles * maps_of_tile;
  return p;
}

CpuPack pack_for(const BasisConv2dWeights& w, Isa isa) {
  if (isa == Isa::amx) return amx_pack(w);
  CpuPack p{};
  const int64_t group_channels = w.C / w.groups, group_filters = w.Q / w.groups;
  p.width = width_of(isa);
  const bool pairs = isa == Isa::avx512_bf16;
  p.values = pairs ? 2 : 1;
  p.variant = fits_winograd(w) && !pairs ? CpuVariant::winograd : CpuVariant::direct;
  // A last block of bfloat16 channels that is half empty or more makes all blocks half as long.
  const int64_t rest = group_channels % 32;
  p.block = pairs ? (0 < rest && rest <= 16 ? 16 : 32) : group_channels <= 4 ? 4 : 16;
  const int64_t channel_slots = ceil_div(group_channels, p.values);
  const int64_t depth = p.variant == CpuVariant::winograd ? channel_slots : channel_slots * w.R * w.S;
  const Tile tile = isa >= Isa::avx512 ? best_tile(kTiles512, p.width, group_filters, depth, p.block)
                    : isa == Isa::avx2 ? best_tile(kTiles256, p.width, group_filters, depth, p.block)
                                       : best_tile(kTilesBase, p.width, group_filters, depth, p.block);
  p.lanes = tile.lanes;
  p.vectors = tile.vectors;
  p.channel_blocks = ceil_div(group_channels, p.block);
  p.tile_width = tile_width_of(w);
  p.position_rows = w.stride_h == 1 ? 4 : 5;
  p.position_columns = w.stride_h == 1 ? p.tile_width + 2 : 5;
  p.positions = p.variant == CpuVariant::winograd ? p.position_rows * p.position_columns : w.R * w.S;
  p.filters = static_cast<int64_t>(p.vectors) * p.width / p.lanes;
  p.filter_blocks = ceil_div(group_filters, p.filters);
  p.maps = p.filter_blocks * p.filters;
  // One group: the padded slots lie at the end and are skipped. Several: they lie between, with zero coefficients.
  p.slots = w.groups == 1 ? ceil_div(w.Q, p.values) : w.groups / w.mixing_groups * p.maps / p.values;
  const int64_t outputs = w.K / w.mixing_groups;
  p.output_vectors = outputs > p.width ? 2 : 1;
  p.panels = ceil_div(outputs, p.output_vectors * p.width);
  p.planar_panels = ceil_div(outputs, planar_rows_of(isa));
  p.planar_rows = ceil_div(outputs, p.planar_panels);
  const int64_t tap_size = p.filter_blocks * p.channel_blocks * (p.block / p.lanes) * p.vectors * p.width;
  p.group_size = tap_size * p.positions;
  const int64_t chunk = pass_sizes(p.width, p.group_size / p.values).chunk;
  p.chunk = p.channel_blocks <= 2 * chunk ? p.channel_blocks : chunk;
  // What does not stay in the second level is packed as taps too, which some passes read instead: see cpu_plan.
  const bool far = p.group_size > 2 * cache_floats(p.width);
  p.taps_group_size = p.variant == CpuVariant::winograd && p.width == 16 && far ? tap_size * 9 : 0;
  p.filters_size = w.groups * p.group_size / p.values;
  p.coefficients_size = w.mixing_groups * p.panels * p.slots * p.output_vectors * p.width;
  p.planar_size = w.mixing_groups * p.planar_panels * p.slots * p.planar_rows;
  p.taps_size = w.groups * p.taps_group_size;
  return p;
}

}  // namespace

Isa isa_for(const BasisConv2dWeights& w, Isa isa) {
  const bool pairs = w.dtype == DType::bf16 && !w.precise && w.C / w.groups >= 8;
  return pairs && isa >= Isa::avx512_bf16 ? isa : std::min(isa, Isa::avx512);
}

CpuPack cpu_pack(const BasisConv2dWeights& w, Isa isa) { return pack_for(w, isa_for(w, isa)); }

static CpuPlan plan_for(const BasisConv2dParams& params, const CpuPack& pack, int64_t threads, Packing packing) {
  const BasisConv2dWeights& w = params.weights;
  if (pack.variant == CpuVariant::amx) return amx_plan(params, pack);
  CpuPlan p{};
  p.pack = pack;
  const int64_t all_maps = w.groups * pack.maps;
  const int64_t pixel = w.groups * pack.channel_blocks * pack.block / pack.values;  // floats of one ring pixel
  // z of the last pixel block is read in whole registers.
  const int64_t maps_margin = pack.width * all_maps + pack.width;
  p.turned_size = params.channels_last ? 0 : aligned(2 * pack.width * (pack.slots + pack.width));
  // Channel blocks that lie in the input as in a copied row.
  const bool same_values = pack.values == 2 || w.dtype == DType::f32;
  const bool whole_blocks =
      same_values && params.input_stride_c == 1 && pack.block == 16 * pack.values && w.C / w.groups % pack.block == 0;
  if (pack.variant == CpuVariant::winograd) {
    p.tile_columns = ceil_div(params.OW, pack.tile_width);
    p.units = params.N * ceil_div(params.OH, 2);
    const int64_t mine = std::max<int64_t>(ceil_div(p.units, threads), 1) * p.tile_columns;
    p.sums_later = pack.width == 16 && pack.lanes > 1 && pack.vectors == 1 && pack.filter_blocks == 1 &&
                   w.groups * pack.width * pack.positions * kTilePixels <= kProductsFloats;
    const int64_t of_tile = p.sums_later ? w.groups * pack.width : all_maps;  // products at a position
    const int64_t fitting = std::max<int64_t>(kProductsFloats / (pack.positions * of_tile), 6);
    // Sums over the channels so far do not have the size of products.
    const bool apart = pack.lanes > 1 && !p.sums_later;
    // Few tiles are one pass that reads the filters once: then taps take less time to read than their transform costs.
    // Filters that would first have to be transformed and written are worth a few passes, of whole rows of tiles.
    const int64_t passes = ceil_div(mine * (apart ? 1 + pack.lanes : 1), fitting);
    const int64_t worth = packing == Packing::ahead ? 1 : pack.group_size > 4 * cache_floats(pack.width) ? 4 : 2;
    const int64_t rows = mine / p.tile_columns;
    p.from_taps = pack.taps_size > 0 && passes <= worth;
    p.chunk = p.from_taps ? 1 : pack.chunk;
    const int64_t most = p.from_taps  ? std::max(ceil_div(rows, passes) * p.tile_columns, std::min<int64_t>(mine, 16))
                         : mine <= 16 ? 16
                                      : std::min(pass_sizes(pack.width, pack.group_size).tiles, fitting);
    p.tiles = tiles_in_pass(mine, p.tile_columns, most);
    // Twice as many where rows of tiles fill register tiles better so: four rows of seven, not three of four.
    const int64_t twice = tiles_in_pass(mine, p.tile_columns, 2 * most);
    if (pack.width == 16 && !p.from_taps && 2 * most <= fitting &&
        register_tiles(mine, twice) < register_tiles(mine, p.tiles))
      p.tiles = twice;
    // What comes from the second level is fetched in time by itself, at least where registers are narrow.
    const bool near = pack.group_size <= cache_floats(pack.width);
    p.fetches_output = pack.width == 16 && near && params.channels_last;
    const bool same_place = params.input_stride_c == 1 && params.input_stride_w == w.C &&
                            params.input_stride_h == params.W * w.C && params.OH == params.H && params.OW == params.W;
    p.fetches_input = p.fetches_output && same_place && w.stride_h == 1;
    p.fetches_filters = !p.fetches_output && (pack.width == 16 || !near);
    p.in_place = whole_blocks;
    p.ring_rows = p.in_place ? 0 : pack.position_rows * (p.tiles / p.tile_columns + 2);
    // What tiles read, and what is copied into a row.
    const int64_t next = w.stride_w * pack.tile_width;
    p.ring_columns = std::max(p.tile_columns * next + pack.position_columns - next, params.W + params.pad_left);
    p.ring_size = aligned(p.ring_rows * p.ring_columns * pixel);
    p.zeros_size = aligned(pixel);
    // From taps all positions of a chunk are transformed together, else a row of them.
    const int64_t together = p.from_taps ? pack.positions : pack.position_columns;
    p.transformed_size = aligned(together * p.chunk * p.tiles * pack.block);
    const int64_t registers = pack.vectors * pack.width;
    if (p.from_taps)
      p.row_filters_size = pack.position_columns * (pack.block / pack.lanes * registers + kRowFiltersApart);
    if (p.chunk < pack.channel_blocks && apart)
      p.partial_size = aligned(together * pack.filter_blocks * p.tiles * registers);
    p.products_stride = p.sums_later ? pack.width : apart ? pack.maps : pack.filters;
    p.products_block = apart ? pack.filters : p.tiles * pack.filters;
    p.products_position = p.tiles * of_tile / w.groups;
    p.products_size = aligned(pack.positions * p.tiles * of_tile);
    p.maps_size = aligned(2 * pack.tile_width * p.tiles * all_maps + maps_margin);
    return p;
  }
  p.units = params.N * params.OH;
  // What is copied into a row, and what the last tap of the last output reads.
  p.ring_columns =
      std::max(ceil_div(params.W + params.pad_left, w.stride_w), params.OW + (w.S - 1) * w.dilation_w / w.stride_w);
  const int64_t reach = (w.R - 1) * w.dilation_h + 1;
  const int64_t a_ring_row = w.stride_w * p.ring_columns * pixel;
  const int64_t a_map_row = params.OW * all_maps / pack.values;
  const int64_t panel = pack.group_size / pack.values / pack.filter_blocks;
  const int64_t cache = cache_floats(pack.width);
  p.chunk = panel <= cache ? pack.channel_blocks : std::max<int64_t>(1, pack.channel_blocks * (cache / 2) / panel);
  // Weights beyond the cache are read once a pass: then several rows share a pass.
  const int64_t wanted = pack.group_size / pack.values > cache ? ceil_div(4 * kTilePixels, params.OW) : 1;
  p.rows = 1;
  while (p.rows < wanted && p.rows < params.OH &&
         (reach + p.rows * w.stride_h) * a_ring_row + (p.rows + 1) * 2 * a_map_row <= kScratchFloats) {
    p.rows++;
  }
  // Without columns beside the image nothing needs to be copied: 1x1 above all. Where copying takes as long as several
  // taps, those that lie outside run apart from the others instead.
  const bool inside = params.pad_left == 0 && (params.OW - 1) * w.stride_w + (w.S - 1) * w.dilation_w < params.W;
  p.in_place = whole_blocks && (inside || (pack.values == 2 && pack.channel_blocks > 1));
  p.ring_rows = p.in_place ? 0 : (p.rows - 1) * w.stride_h + reach;
  p.ring_size = aligned(p.ring_rows * a_ring_row);
  p.maps_size = aligned(p.rows * a_map_row + maps_margin);
  // Sums wait between chunks, of a tile also between its groups of taps.
  if (p.chunk < pack.channel_blocks) {
    p.partial_size = aligned(p.rows * pack.filter_blocks * params.OW * pack.vectors * pack.width);
  } else if (!inside && p.in_place) {
    p.partial_size = kMostTilePixels * pack.vectors * pack.width;
  }
  return p;
}

CpuPlan cpu_plan(const BasisConv2dParams& params, const CpuPack& pack, int64_t threads, Packing packing) {
  CpuPlan p = plan_for(params, pack, threads, packing);
  if (packing == Packing::in_call) {
    if (p.from_taps) {
      p.pack.filters_size = 0;
    } else {
      p.pack.taps_size = 0;
    }
    if (params.channels_last) {
      p.pack.planar_size = 0;
    } else {
      p.pack.coefficients_size = 0;
    }
  }
  return p;
}

CpuPackHeader cpu_pack_header(const BasisConv2dWeights& w, Isa isa) {
  CpuPackHeader h{};
  std::memcpy(h.magic, "basisc2d", 8);
  h.version = kCpuPackVersion;
  h.isa = static_cast<int64_t>(isa_for(w, isa));
  const int64_t sizes[] = {w.C,
                           w.Q,
                           w.K,
                           w.R,
                           w.S,
                           w.stride_h,
                           w.stride_w,
                           w.dilation_h,
                           w.dilation_w,
                           w.groups,
                           w.mixing_groups,
                           static_cast<int64_t>(w.dtype),
                           w.precise ? 1 : 0};
  std::memcpy(h.sizes, sizes, sizeof(sizes));
  return h;
}

int64_t cpu_packed_bytes(const CpuPack& p) { return kCpuPackHeaderBytes + 4 * cpu_packed_floats(p); }

int64_t cpu_packed_bytes(const BasisConv2dWeights& w) {
  int64_t most = 0;
  for (Isa isa : {Isa::base, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx}) {
    most = std::max(most, cpu_packed_bytes(pack_for(w, isa)));
  }
  return most;
}

}  // namespace basisconv
