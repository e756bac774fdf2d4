// Packed filters and the plan of ternary_conv2d: how a block's pixels and filters are shared out, what stays in shared
// memory. Pure functions of the sizes, the same on host and device, tested without either.
#pragma once
#include "basis_conv2d_epilogue.h"
#include "ternary_conv2d.h"

namespace basisconv::cuda {

constexpr int kTernaryRows = 64;                             // filters of a packed tile: 64 rows of 128 bytes
constexpr int kTernaryTileBytes = kTernaryRows * kSlab * 2;  // of one tap and one slab of 64 channels

struct TernaryPacking {
  int64_t blocks, slabs, taps;  // tiles: [blocks][slabs][taps]

  explicit TernaryPacking(const CudaTernaryWeights& w)
      : blocks(tiles_of(w.K, kTernaryRows)), slabs(tiles_of(w.C, kSlab)), taps(w.R * w.S) {}
  int64_t bytes() const { return kTagBytes + blocks * slabs * taps * kTernaryTileBytes; }
};

// Says of packed filters what they were made for.
inline uint64_t tag_of(const CudaTernaryWeights& w) {
  constexpr int64_t version = 1;
  return fnv1a({0x5347, version, w.C, w.K, w.R, w.S});
}

struct TernaryPlan {
  static constexpr int tile_x = kTileX;                             // pixels
  static constexpr int consumers = 256, threads = consumers + 128;  // two warpgroups compute, one issues copies
  static constexpr int most_stages = kMostStages, rings = 2;

  int columns_each;    // filters of a warpgroup: 64 or 128
  bool split_filters;  // both warpgroups have the same 8x8 pixels, each half of the filters; else 16x8 and all of them
  int parts;           // of the filters, one to a block
  int rows, columns, halo_box_bytes, halo_bytes;  // the box is what an mbarrier counts, the rest is alignment
  int halo_stages, filter_stages;                 // tiles of a ring
  bool resident;                                  // all filters of the block are loaded once
  int bytes;                                      // of shared memory, 0 where the kernel cannot run

  BASISCONV_EITHER int tile_y() const { return split_filters ? 8 : 16; }
  BASISCONV_EITHER int filters() const { return split_filters ? 2 * columns_each : columns_each; }
  BASISCONV_EITHER int filter_tile() const { return filters() * kSlab * 2; }
  BASISCONV_EITHER int filter_offset() const { return halo_stages * halo_bytes; }
  BASISCONV_EITHER int factors_offset() const { return filter_offset() + filter_stages * filter_tile(); }
  BASISCONV_EITHER int staging_offset() const { return factors_offset() + filters() * 8; }
  BASISCONV_EITHER int bars_offset() const { return staging_offset() + consumers / 32 * kStagingBytes; }
  BASISCONV_EITHER static constexpr int bars() { return 2 * rings * most_stages; }
};

// A plan of a kind: all filters resident where they fit beside two halo tiles, else the deepest ring that does.
inline TernaryPlan ternary_plan_of(const Problem& p, int shared_limit, bool split_filters, int columns_each) {
  TernaryPlan plan{};
  plan.columns_each = columns_each;
  plan.split_filters = split_filters;
  plan.parts = static_cast<int>(tiles_of(p.K, plan.filters()));
  plan.rows = (plan.tile_y() - 1) * p.stride_h + (p.R - 1) * p.dilation_h + 1;
  plan.columns = (TernaryPlan::tile_x - 1) * p.stride_w + (p.S - 1) * p.dilation_w + 1;
  constexpr int longest_side = 256;  // of a box
  const int64_t box = int64_t{plan.rows} * plan.columns * kSlab * 2;
  if (plan.rows > longest_side || plan.columns > longest_side || box > shared_limit) return plan;
  plan.halo_box_bytes = static_cast<int>(box);
  plan.halo_bytes = (plan.halo_box_bytes + 1023) / 1024 * 1024;
  const auto sized = [&](int halos, int64_t stages, bool resident) {
    TernaryPlan sized = plan;
    if (stages * sized.filter_tile() > shared_limit) return false;
    sized.halo_stages = halos;
    sized.filter_stages = static_cast<int>(stages);
    sized.resident = resident;
    sized.bytes = sized.bars_offset() + TernaryPlan::bars() * 8;
    if (sized.bytes > shared_limit) return false;
    plan = sized;
    return true;
  };
  const int64_t all = int64_t{p.taps} * p.slabs;
  for (const int halos : {3, 2, 1}) {
    if (sized(halos, all, true)) return plan;
  }
  for (const int halos : {3, 2, 1}) {
    for (int stages = TernaryPlan::most_stages; stages >= 4; --stages) {
      if (sized(halos, stages, false)) return plan;
    }
  }
  for (const int stages : {3, 2}) {
    if (sized(1, stages, false)) return plan;
  }
  return plan;
}

inline int64_t ternary_tiles(const Problem& p, const TernaryPlan& plan) {
  return int64_t{p.N} * tiles_of(p.OH, plan.tile_y()) * tiles_of(p.OW, TernaryPlan::tile_x);
}

// Blocks of the persistent grid: a multiple of the parts, so that a block keeps its filters.
inline int64_t ternary_grid(const Problem& p, const TernaryPlan& plan, const CudaDevice& device) {
  const int64_t together = device.multiprocessors / plan.parts > 0 ? device.multiprocessors / plan.parts : 1;
  const int64_t tiles = ternary_tiles(p, plan);
  return (tiles < together ? tiles : together) * plan.parts;
}

// What a call takes, in clocks, by the rates of basis_conv2d's first stage, which is the same work.
inline int64_t ternary_clocks(const Problem& p, const TernaryPlan& plan, const CudaDevice& device) {
  const int64_t grid = ternary_grid(p, plan, device), rounds = tiles_of(ternary_tiles(p, plan), grid / plan.parts);
  const int64_t waves = tiles_of(grid, device.multiprocessors);
  const int mma = plan.columns_each == 64 ? 363 : 511;
  const int64_t bytes_a_clock = 35 * int64_t{device.multiprocessors} / grid;
  int64_t refill = plan.resident ? 0 : plan.filter_tile() / (bytes_a_clock < 60 ? bytes_a_clock + 1 : 60);
  constexpr int under_way = 1000;  // clocks; one tile of the ring is in use and one is being given back
  const int ahead = plan.filter_stages > 3 ? plan.filter_stages - 2 : 1;
  if (!plan.resident && refill < under_way / ahead) refill = under_way / ahead;
  const int64_t sums = int64_t{p.taps} * p.slabs * (mma > refill ? mma : refill);
  return waves * rounds * (600 + sums + plan.columns_each / 64 * 500);
}

// The quickest plan of a call by that count; `bytes` is 0 where none fits.
inline TernaryPlan ternary_plan(const Problem& p, const CudaDevice& device) {
  TernaryPlan best{};
  for (const int columns_each : {64, 128}) {
    for (const bool split_filters : {false, true}) {
      const TernaryPlan plan = ternary_plan_of(p, device.shared_bytes, split_filters, columns_each);
      if (plan.bytes == 0) continue;
      if (best.bytes == 0 || ternary_clocks(p, plan, device) < ternary_clocks(p, best, device)) best = plan;
    }
  }
  return best;
}

}  // namespace basisconv::cuda
