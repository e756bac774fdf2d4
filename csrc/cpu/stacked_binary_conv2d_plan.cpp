#include "stacked_binary_conv2d_plan.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>

namespace basisconv {
namespace {

constexpr int64_t kMapsFloats = 8 * 1024;  // maps between two merges stay in the first-level cache
constexpr int64_t kMatrixMapsFloats = 16 * 1024;
constexpr int64_t kExpandedTiles = 16;  // so many tiles of filters, 1 KiB each, stay expanded
// Pixels of a map, fewer of which leave a tile mostly empty and taps mostly outside: 3x3 took as long either way.
constexpr int64_t kLeastMatrixPixels = 9;
constexpr int64_t kBandFloats = 128 * 1024;  // terms of a pass, in the second

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t aligned(int64_t floats) { return ceil_div(floats, 16) * 16; }

// AVX-512: 16 sums of 4 channels fill a register. AVX2: in-lane permutes pick one of 4, so 4 sums of 3 channels, whose
// negatives are the other 4; crossing lanes would give 8 entries at half the rate (measured on Zen 3: 92 against 66
// billion multiply-accumulates a second, multiply-adds 49). Elsewhere a channel itself, added or subtracted.
constexpr StackedTables kTables512 = {16, 4, 16, 8};
constexpr StackedTables kTables256 = {8, 3, 4, 10};
constexpr StackedTables kTablesBase = {4, 1, 1, 32};

const StackedTables& tables_of(Isa isa) {
  return isa >= Isa::avx512 ? kTables512 : isa == Isa::avx2 ? kTables256 : kTablesBase;
}

StackedPack form(const StackedBinaryWeights& w, Isa isa, bool expanded) {
  StackedPack p{};
  p.tables = tables_of(isa);
  p.expanded = expanded;
  p.slices = expanded ? w.groups : w.groups * w.splits;
  p.low = w.C / p.slices;
  p.sets = expanded ? w.groups : 1;
  p.filters = expanded ? w.K / w.groups : w.n;
  p.splits = expanded ? 1 : w.splits;
  p.count = ceil_div(p.low, p.tables.step);
  p.words = ceil_div(p.count, p.tables.per_word);
  p.per_word = ceil_div(p.count, p.words);
  const int64_t registers = ceil_div(p.filters, p.tables.width);
  // Two registers share the loads of a table; an odd one out would be padding.
  p.vectors = isa >= Isa::avx512 && registers % 2 == 0 ? 2 : 1;
  p.blocks = ceil_div(registers, p.vectors);
  p.slots = p.blocks * p.vectors * p.tables.width;
  p.set_size = p.blocks * w.R * w.S * p.words * p.vectors * p.tables.width;
  p.words_size = p.sets * p.set_size;
  p.rows_size = w.K * p.splits;
  return p;
}

// The same for the matrix unit.
StackedPack matrix_form(const StackedBinaryWeights& w, bool expanded, int64_t tile_words) {
  StackedPack p = form(w, Isa::avx512, expanded);
  p.matrix = true;
  p.count = ceil_div(p.low, kMatrixDepth);
  p.tile_words = tile_words;
  p.vectors = 1;
  p.blocks = ceil_div(p.filters, kTilePlaces);
  p.slots = p.blocks * kTilePlaces;
  p.set_size = p.blocks * p.count * w.R * w.S * tile_words;
  p.words_size = p.sets * p.set_size;
  return p;
}

// Sixteen channels are read at a time.
int64_t staged_floats(const StackedBinaryConv2dParams& params, bool in_place) {
  return in_place ? 0 : aligned(params.W * params.weights.C + 16);
}

// How maps become outputs. Up to four registers of maps a slice are picked from sooner than turned.
void plan_stacking(const StackedBinaryConv2dParams& params, StackedPlan& p) {
  const StackedPack& pack = p.pack;
  const StackedBinaryWeights& w = params.weights;
  const int64_t width = pack.tables.width;
  if (pack.expanded && params.channels_last) return;
  const bool whole = w.groups == 1 || w.K / w.groups % width == 0;  // no register of outputs of two groups
  p.picks = width == 16 && params.channels_last && whole && pack.slots <= 4 * width;
  p.stacking_size = p.picks ? ceil_div(w.K, width) * pack.splits * width : pack.slices * pack.slots * width;
}

// Instructions a pixel, in registers: picks with their additions, then turning, adding and turning back. A tile of
// products takes, for 16 pixels and three terms, as long as so many instructions a pixel.
constexpr double kPick = 3.0, kTileProduct = 11.0;
double cost(const StackedBinaryWeights& w, const StackedPack& p) {
  const double width = p.tables.width, products = static_cast<double>(p.slices * p.count * w.R * w.S * p.slots);
  const double picks = (p.matrix ? kTileProduct : kPick) * products / width;
  const double turned = 4.0 * static_cast<double>(p.slices * p.slots + w.K) / width;
  return picks + (p.expanded ? 0.0 : turned + static_cast<double>(w.K * p.splits) / width);
}

}  // namespace

int64_t filter_of_channel(const StackedBinaryWeights& w, const StackedPack& pack, const int64_t* index, int64_t set,
                          int64_t f, int64_t c) {
  return pack.expanded ? index[(set * pack.filters + f) * w.splits + c / (w.C / w.groups / w.splits)] : f;
}

void pack_rows(const StackedBinaryWeights& w, const StackedPack& pack, const int64_t* index, uint32_t* packed) {
  int32_t* rows = reinterpret_cast<int32_t*>(packed + pack.words_size);
  const int64_t outputs = w.K / w.groups;
  for (int64_t k = 0; k < w.K; k++) {
    for (int64_t i = 0; i < pack.splits; i++) {
      const int64_t slice = k / outputs * pack.splits + i;
      const int64_t filter = pack.expanded ? k % outputs : index[k * w.splits + i];
      rows[k * pack.splits + i] = static_cast<int32_t>(slice * pack.slots + filter);
    }
  }
}

bool rows_fit(const StackedBinaryWeights& w, const StackedPack& pack, const void* packed) {
  const int32_t* rows = static_cast<const int32_t*>(packed) + pack.words_size;
  bool right = true;
  for (int64_t i = 0; i < w.K * pack.splits; i++) right &= rows[i] >= 0 && rows[i] < pack.slices * pack.slots;
  return right;
}

StackedPack expanded_matrix_pack(const StackedBinaryWeights& w, int64_t tile_words) {
  return matrix_form(w, true, tile_words);
}

StackedPack stacked_pack(const StackedBinaryWeights& w, Isa isa) {
  const StackedPack stacked = form(w, isa, false), expanded = form(w, isa, true);
  return cost(w, expanded) <= cost(w, stacked) ? expanded : stacked;
}

StackedPack stacked_matrix_pack(const StackedBinaryWeights& w, Isa isa) {
  if (isa < Isa::amx) return {};
  const StackedPack stacked = matrix_form(w, false, kTilePlaces), expanded = matrix_form(w, true, kTilePlaces);
  const StackedPack best = cost(w, expanded) <= cost(w, stacked) ? expanded : stacked;
  return cost(w, best) < cost(w, stacked_pack(w, isa)) ? best : StackedPack{};
}

bool stacked_multiplies(const StackedBinaryConv2dParams& params, const StackedPack& matrix) {
  return matrix.matrix && params.OH * params.OW >= kLeastMatrixPixels;
}

namespace {

StackedPlan matrix_plan(const StackedBinaryConv2dParams& params, const StackedPack& pack) {
  const StackedBinaryWeights& w = params.weights;
  StackedPlan p{};
  p.pack = pack;
  const bool real = params.mode == StackedMode::real;
  p.terms = !real || params.dtype == DType::bf16 ? 1 : params.dtype == DType::f16 ? 2 : 3;
  p.in_place = real && params.input_stride_c == 1;
  p.band = {
      params.OH,         params.OW,      params.W,       w.R, w.S, params.stride_h, params.stride_w, params.dilation_h,
      params.dilation_w, params.pad_top, params.pad_left};
  const int64_t blocks = p.terms * pack.slices * pack.count, place = kMatrixDepth / 2;
  p.band.fit(kBandFloats / (blocks * place));
  p.ring_size = blocks * p.band.plane() * place;
  p.staged_size = staged_floats(params, p.in_place);
  const int64_t a_pixel = pack.slices * pack.slots;
  p.tiles = std::clamp<int64_t>(kMatrixMapsFloats / (kTilePlaces * a_pixel), 4, kMatrixMostTiles);
  p.maps_size = p.tiles * kTilePlaces * a_pixel;
  plan_stacking(params, p);
  const int64_t tiles = pack.words_size / pack.tile_words;
  p.filters_size = pack.sets == 1 && tiles <= kExpandedTiles ? tiles * kTilePlaces * place : 0;
  return p;
}

}  // namespace

StackedPlan stacked_plan(const StackedBinaryConv2dParams& params, const StackedPack& pack) {
  const StackedBinaryWeights& w = params.weights;
  if (pack.matrix) return matrix_plan(params, pack);
  StackedPlan p{};
  p.pack = pack;
  const int64_t accumulators = pack.tables.width == 16 ? 28 : pack.tables.width == 8 ? 10 : 8;
  const int64_t most = std::min<int64_t>(accumulators / pack.vectors, 14);
  // Equal tiles: 56 pixels are 7 of 8, not 5 of 10 and one of 6.
  p.pixels = ceil_div(params.OW, ceil_div(params.OW, most));
  const int64_t a_pixel = pack.slices * pack.slots;
  const int64_t tiles = std::max<int64_t>(1, std::max<int64_t>(kMapsFloats / a_pixel, pack.tables.width) / p.pixels);
  p.chunk = std::min(params.OW, tiles * p.pixels);
  // What is filled, and what the last tap of the last output reads.
  p.columns =
      std::max(params.W + params.pad_left, (params.OW - 1) * params.stride_w + (w.S - 1) * params.dilation_w + 1);
  p.ring_rows = (w.R - 1) * params.dilation_h + 1;
  p.ring_row = p.columns * pack.slices * pack.count * pack.tables.entry;
  p.in_place = params.mode == StackedMode::real && params.dtype == DType::f32 && params.input_stride_c == 1;
  p.ring_size = aligned(p.ring_rows * p.ring_row);
  p.staged_size = staged_floats(params, p.in_place);
  p.maps_size = aligned(ceil_div(p.chunk, pack.tables.width) * pack.tables.width * a_pixel);
  plan_stacking(params, p);
  return p;
}

StackedPackHeader stacked_pack_header(const StackedBinaryWeights& w, const StackedPack& matrix, Isa isa) {
  StackedPackHeader h{};
  std::memcpy(h.magic, "stackedb", 8);
  h.version = kStackedPackVersion;
  h.isa = static_cast<int64_t>(matrix.matrix ? Isa::amx : std::min(isa, Isa::avx512));
  const int64_t sizes[] = {w.C, w.K, w.n, w.splits, w.groups, w.R, w.S};
  std::memcpy(h.sizes, sizes, sizeof(sizes));
  return h;
}

int64_t stacked_packed_bytes(const StackedBinaryWeights& w) {
  int64_t most = 0;
  for (Isa isa : {Isa::base, Isa::avx2, Isa::avx512, Isa::amx}) {
    most = std::max(most, stacked_pack(w, isa).size() + stacked_matrix_pack(w, isa).size());
  }
  return kStackedHeaderBytes + 4 * most;
}

}  // namespace basisconv
