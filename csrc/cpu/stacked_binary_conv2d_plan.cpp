#include "stacked_binary_conv2d_plan.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>

namespace basisconv {
namespace {

constexpr int64_t kMapsFloats = 8 * 1024;  // maps between two merges stay in the first-level cache

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

// Instructions a pixel, in registers: picks with their additions, then turning, adding and turning back.
double cost(const StackedBinaryWeights& w, const StackedPack& p) {
  const double width = p.tables.width;
  const double picks = 3.0 * static_cast<double>(p.slices * p.count * w.R * w.S * p.slots) / width;
  const double turned = 4.0 * static_cast<double>(p.slices * p.slots + w.K) / width;
  return picks + (p.expanded ? 0.0 : turned + static_cast<double>(w.K * p.splits) / width);
}

}  // namespace

StackedPack stacked_pack(const StackedBinaryWeights& w, Isa isa) {
  const StackedPack stacked = form(w, isa, false), expanded = form(w, isa, true);
  return cost(w, expanded) <= cost(w, stacked) ? expanded : stacked;
}

StackedPlan stacked_plan(const StackedBinaryConv2dParams& params, const StackedPack& pack) {
  const StackedBinaryWeights& w = params.weights;
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
  // Sixteen channels are read at a time.
  p.staged_size = p.in_place ? 0 : aligned(params.W * w.C + 16);
  p.maps_size = aligned(ceil_div(p.chunk, pack.tables.width) * pack.tables.width * a_pixel);
  p.turned_size = pack.expanded && params.channels_last ? 0 : aligned(a_pixel * pack.tables.width);
  return p;
}

StackedPackHeader stacked_pack_header(const StackedBinaryWeights& w, Isa isa) {
  StackedPackHeader h{};
  std::memcpy(h.magic, "stackedb", 8);
  h.version = kStackedPackVersion;
  h.isa = static_cast<int64_t>(std::min(isa, Isa::avx512));
  const int64_t sizes[] = {w.C, w.K, w.n, w.splits, w.groups, w.R, w.S};
  std::memcpy(h.sizes, sizes, sizeof(sizes));
  return h;
}

int64_t stacked_packed_bytes(const StackedBinaryWeights& w) {
  int64_t most = 0;
  for (Isa isa : {Isa::base, Isa::avx2, Isa::avx512}) {
    const StackedPack p = stacked_pack(w, isa);
    most = std::max(most, p.words_size + p.rows_size);
  }
  return kStackedHeaderBytes + 4 * most;
}

}  // namespace basisconv
