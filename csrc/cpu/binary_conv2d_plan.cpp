#include "binary_conv2d_plan.h"

#include <algorithm>
#include <cstring>

namespace basisconv {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t aligned(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

// Rows of the ring that a pass works on; above this a longer pass costs the first-level cache more than it saves.
constexpr int64_t kRingBytes = 16 << 10;

// Bytes of a pass on the matrix unit: they come from the second-level cache as fast as they are multiplied.
constexpr int64_t kBandBytes = 128 << 10;
constexpr int64_t kFilterTileBytes = 16 * kTileChannels;
constexpr int64_t kSumsTileBytes = 16 * 16 * 4;
constexpr int64_t kProductsWorthAVisit = 9;
constexpr int64_t kNearBytes = 44 << 10;  // of the first-level cache, 48 KiB beside every matrix unit
constexpr int64_t kProductBytes = 24;     // where its operands come from
// Tiles of pixels that are multiplied together with one tile of filters.
constexpr int64_t kTilesTogether = 4;
// Expanded filters that a pass does not read again take turns in so many places, which the first-level cache holds.
constexpr int64_t kTurns = 8;

// A row of words, and where there are groups one of a group.
int64_t line_words(const BinaryConv2dParams& p) {
  const BinaryConv2dWeights& w = p.weights;
  return p.W * words_for(w.C) + (w.groups > 1 ? p.W * words_for(w.C / w.groups) : 0);
}

// Pixels of a pass are numbered through its rows, those between the outputs of two rows too.
int64_t pixel_tiles(const BinaryConv2dParams& p, const BinaryPlan& plan) {
  return ceil_div((plan.rows - 1) * plan.columns + p.OW, 16);
}

// Nanoseconds of one thread, fitted to 486 layers that were run both ways on an Intel Xeon with AMX: 1 to 56 pixels a
// side, 3 to 512 channels, 8 to 512 filters, groups, strides and codes. Wherever the two differed by more than a
// seventh, these tell the quicker one. Layers whose sums wait (BinaryPlan::block) take a fifth less than
// products_time says.
double counts_time(const BinaryConv2dParams& p, const BinaryPack& pack) {
  const BinaryConv2dWeights& w = p.weights;
  const double pixels = static_cast<double>(p.N * p.OH * p.OW * p.planes);
  const double registers = static_cast<double>(w.groups * ceil_div(w.K / w.groups, pack.lanes));
  const double words = static_cast<double>(w.R * w.S * pack.units);
  return 70 + pixels * registers * (pack.vectors == 1 ? 4.4 + 0.43 * words : 2.7 + 0.40 * words);
}

double products_time(const BinaryConv2dParams& p, const BinaryPlan& plan) {
  const BinaryConv2dWeights& w = p.weights;
  const int64_t tiles = pixel_tiles(p, plan), groups = ceil_div(tiles, kTilesTogether);
  const double products = static_cast<double>(plan.products);
  const double blocks = static_cast<double>(w.groups * ceil_div(w.K / w.groups, 16));
  const int64_t phases = std::min(p.stride_h, w.R) * std::min(p.stride_w, w.S);
  const int64_t rows = plan.rows + (w.R - 1) * p.dilation_h / p.stride_h;
  const double fill = static_cast<double>(w.groups * plan.chunks * phases * rows * plan.columns * p.planes);
  const double a_block = 9.3 * products + static_cast<double>(groups) * (1.5 * products + 7) +
                         static_cast<double>(tiles) * (5.3 * products + 21);
  return static_cast<double>(plan.units) * (180 + 1.75 * fill + blocks * a_block);
}

}  // namespace

Isa binary_isa_for(Isa isa) { return std::min(isa, Isa::avx512_vpopcntdq); }

BinaryPack binary_pack(const BinaryConv2dWeights& w, Isa wanted) {
  const Isa isa = binary_isa_for(wanted);
  const int64_t channels = w.C / w.groups, filters = w.K / w.groups;
  BinaryPack p{};
  switch (isa) {
    case Isa::avx2:
      p.variant = BinaryVariant::nibbles;
      p.lanes = 32;
      p.vectors = filters > 32 ? 2 : 1;
      p.pixels = filters > 32 ? 4 : 7;
      break;
    case Isa::avx512:
      p.variant = BinaryVariant::nibbles;
      p.lanes = 64;
      p.vectors = 1;
      p.pixels = 7;
      break;
    case Isa::avx512_vpopcntdq:
      p.lanes = 16;
      p.vectors = filters > 16 ? 2 : 1;
      p.pixels = 7;
      break;
    default:
      p.lanes = 4;
      p.vectors = 2;
      p.pixels = 2;
      break;
  }
  p.block = static_cast<int64_t>(p.lanes) * p.vectors;
  p.blocks = ceil_div(filters, p.block);
  p.padded = p.blocks * p.block;
  p.units = p.variant == BinaryVariant::nibbles ? ceil_div(channels, 8) : words_for(channels);
  p.unit_bytes = p.variant == BinaryVariant::nibbles ? 1 : 4;
  p.counts_bytes = aligned(w.groups * w.R * w.S * p.padded * 4);
  p.bits_bytes = aligned(w.groups * w.R * w.S * p.padded * p.units * p.unit_bytes);
  return p;
}

BinaryPackHeader binary_pack_header(const BinaryConv2dWeights& w, Isa isa) {
  BinaryPackHeader h{};
  std::memcpy(h.magic, "bcBINARY", 8);
  h.version = kBinaryPackVersion;
  h.isa = static_cast<int64_t>(binary_isa_for(isa));
  h.C = w.C;
  h.K = w.K;
  h.R = w.R;
  h.S = w.S;
  h.groups = w.groups;
  return h;
}

int64_t binary_packed_bytes(const BinaryConv2dWeights& w, Isa isa) {
  const BinaryPack p = binary_pack(w, isa);
  return static_cast<int64_t>(sizeof(BinaryPackHeader)) + p.counts_bytes + p.bits_bytes;
}

int64_t binary_packed_bytes(const BinaryConv2dWeights& w) {
  int64_t most = 0;
  for (Isa isa : {Isa::base, Isa::avx2, Isa::avx512, Isa::avx512_vpopcntdq}) {
    most = std::max(most, binary_packed_bytes(w, isa));
  }
  return most;
}

BinaryPlan binary_counts_plan(const BinaryConv2dParams& p, const BinaryPack& pack, int64_t threads) {
  const BinaryConv2dWeights& w = p.weights;
  BinaryPlan plan{};
  plan.pack = pack;
  plan.columns = (p.OW - 1) * p.stride_w + (w.S - 1) * p.dilation_w + 1;
  plan.pixel_bytes = pack.units * (pack.variant == BinaryVariant::nibbles ? 2 : 4);
  plan.plane_bytes = aligned(w.groups * plan.columns * plan.pixel_bytes);
  plan.row_bytes = p.planes * plan.plane_bytes;
  // Long passes read the weights less often; but a ring within the cache, and work for every thread.
  const int64_t reach = (w.R - 1) * p.dilation_h + 1;
  const int64_t fit = (kRingBytes / plan.row_bytes - reach) / p.stride_h + 1;
  const int64_t share = ceil_div(p.N * p.OH, threads);
  plan.rows = std::clamp<int64_t>(std::min(fit, share), 1, std::min(kMostPassRows, p.OH));
  plan.passes = ceil_div(p.OH, plan.rows);
  plan.rows = ceil_div(p.OH, plan.passes);
  plan.units = p.N * plan.passes;
  plan.ring_rows = std::min(p.H, (plan.rows - 1) * p.stride_h + reach);
  plan.line_words = line_words(p);
  plan.pointers = plan.rows * w.R;
  plan.scratch_bytes = aligned(plan.ring_rows * plan.row_bytes) + aligned(plan.line_words * 4) +
                       aligned(plan.pointers * static_cast<int64_t>(sizeof(void*)));
  return plan;
}

BinaryPlan binary_products_plan(const BinaryConv2dParams& p, const BinaryPack& pack, int64_t threads) {
  const BinaryConv2dWeights& w = p.weights;
  BinaryPlan plan{};
  plan.pack = pack;
  plan.raw = BinaryRaw::products;
  plan.chunks = ceil_div(w.C / w.groups, kTileChannels);
  plan.products = w.R * w.S * plan.chunks;
  plan.columns = p.OW + (w.S - 1) * p.dilation_w / p.stride_w;
  // The rows of a pass beside the first of each phase that its last output row reads.
  const int64_t reach = (w.R - 1) * p.dilation_h / p.stride_h;
  const int64_t row_bytes = w.groups * plan.chunks * p.stride_h * p.stride_w * plan.columns * kTileChannels;
  const int64_t fit = kBandBytes / row_bytes - reach, share = ceil_div(p.N * p.OH, threads);
  plan.rows = std::clamp<int64_t>(std::min(fit, share), 1, p.OH);
  plan.passes = ceil_div(p.OH, plan.rows);
  plan.rows = ceil_div(p.OH, plan.passes);
  plan.units = p.N * plan.passes;
  plan.phase_bytes = (plan.rows + reach) * plan.columns * kTileChannels;
  plan.chunk_bytes = p.stride_h * p.stride_w * plan.phase_bytes;
  plan.band_bytes = w.groups * plan.chunks * plan.chunk_bytes;
  // Where some chunks of the pass, their filters and all its sums fit the first-level cache, the sums wait there for
  // the next chunks; they are loaded and stored for so many products at least.
  const int64_t taps = w.R * w.S, tiles = pixel_tiles(p, plan), chunks = ceil_div(kProductsWorthAVisit, taps);
  const int64_t visited = chunks * (plan.chunk_bytes + taps * kFilterTileBytes) + tiles * kSumsTileBytes;
  plan.block = tiles > kTilesTogether && visited <= kNearBytes ? std::min(chunks * taps, plan.products) : plan.products;
  plan.sums_bytes = plan.block < plan.products ? tiles * kSumsTileBytes : 0;
  plan.kept = tiles > kTilesTogether ? plan.block : std::min(plan.products, kTurns);
  plan.line_words = line_words(p);
  plan.scratch_bytes = aligned(plan.band_bytes + plan.kept * kFilterTileBytes + plan.sums_bytes +
                               plan.products * kProductBytes + plan.line_words * 4);
  return plan;
}

BinaryPlan binary_plan(const BinaryConv2dParams& p, const BinaryPack& pack, Isa isa, int64_t threads) {
  if (isa >= Isa::amx) {
    const BinaryPlan plan = binary_products_plan(p, pack, threads);
    if (products_time(p, plan) < counts_time(p, pack)) return plan;
  }
  return binary_counts_plan(p, pack, threads);
}

}  // namespace basisconv
