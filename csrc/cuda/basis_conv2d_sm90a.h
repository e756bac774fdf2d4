// The plan of the sm_90a kernel: which pixels a tile has and how many blocks it, what stays in shared memory, how far
// copies run ahead. Pure functions of the sizes, the same on host and device, tested without either.
#pragma once
#include "basis_conv2d_epilogue.h"

namespace basisconv::cuda {

struct HopperPlan {
  static constexpr int tile_x = kTileX;                             // pixels
  static constexpr int consumers = 256, threads = consumers + 128;  // two warpgroups compute, one issues copies
  static constexpr int registers_to_compute = 232, registers_to_copy = 40;
  static constexpr int most_stages = 4, most_blocks = 8;
  static constexpr int rings = 3, pairs = 4;  // of warps with the same pixels, where filters are shared out

  int Q16;
  bool shared_out;  // both warpgroups have the same 8x8 pixels, each half of the filters
  int blocks;       // that share the slabs and the outputs of a tile: a cluster; 1 unless filters are shared out
  int rows, columns, halo_box_bytes, halo_bytes;  // the box is what an mbarrier counts, the rest is alignment
  int halo_stages, basis_stages, mixing_stages;   // tiles of a ring
  bool basis_resident, mixing_resident;           // all of it is loaded once a block; then the "ring" is one copy
  int bytes;                                      // of shared memory, 0 where the kernel cannot run

  BASISCONV_EITHER int tile_y() const { return shared_out ? 8 : 16; }
  BASISCONV_EITHER int basis_tile() const { return Q16 * kSlab * 2; }
  BASISCONV_EITHER int mixing_tile() const { return kChunk * Q16 * 2; }
  BASISCONV_EITHER int basis_offset() const { return halo_stages * halo_bytes; }
  BASISCONV_EITHER int mixing_offset() const { return basis_offset() + basis_stages * basis_tile(); }
  // Where filters are shared out: Z of 64 pixels as A fragments, and in a cluster this block's sums.
  BASISCONV_EITHER int fragments_offset() const { return mixing_offset() + mixing_stages * mixing_tile(); }
  BASISCONV_EITHER int sums_offset() const { return fragments_offset() + (shared_out ? 64 * Q16 * 2 : 0); }
  BASISCONV_EITHER int staging_offset() const { return sums_offset() + (blocks > 1 ? 64 * Q16 * 4 : 0); }
  BASISCONV_EITHER int bars_offset() const { return staging_offset() + consumers / 32 * kStagingBytes; }
  // Full and empty of three rings, and two for each pair.
  BASISCONV_EITHER static constexpr int bars() { return 2 * (rings * most_stages + pairs); }
};

// The best plan of a kind that fits. Two halo tiles before all else: one is filled while the other is read, and 32 KB
// under way a multiprocessor keep its memory busy. Then the basis resident, then the coefficients, then a third halo
// tile.
inline HopperPlan hopper_plan_of(const Problem& p, int shared_limit, bool shared_out, int blocks) {
  HopperPlan plan{};
  plan.Q16 = padded_filters(p.Q);
  plan.shared_out = shared_out;
  plan.blocks = blocks;
  plan.rows = (plan.tile_y() - 1) * p.stride_h + (p.R - 1) * p.dilation_h + 1;
  plan.columns = (HopperPlan::tile_x - 1) * p.stride_w + (p.S - 1) * p.dilation_w + 1;
  constexpr int longest_side = 256;  // of a box
  const int64_t box = int64_t{plan.rows} * plan.columns * kSlab * 2;
  if (plan.Q16 > kLargestQ || (shared_out && plan.Q16 < 32)) return plan;
  if (plan.rows > longest_side || plan.columns > longest_side || box > shared_limit) return plan;
  plan.halo_box_bytes = static_cast<int>(box);
  plan.halo_bytes = (plan.halo_box_bytes + 1023) / 1024 * 1024;
  const int64_t basis_tiles = p.taps * tiles_of(p.slabs, blocks), chunks = tiles_of(p.chunks, blocks);
  const int64_t most_tiles = shared_limit / 1024;  // none is below 1 KB
  constexpr int all = 0;                           // stages of what is resident
  struct Choice {
    int halos, basis, mixing;
  };
  for (const Choice& choice :
       {Choice{3, all, all}, Choice{2, all, all}, Choice{2, all, 2}, Choice{3, 4, all}, Choice{2, 4, all},
        Choice{2, 4, 2}, Choice{2, 3, 1}, Choice{1, all, all}, Choice{1, 4, all}, Choice{1, 4, 2}, Choice{1, 2, 1}}) {
    if ((choice.basis == all && basis_tiles > most_tiles) || (choice.mixing == all && chunks > most_tiles)) continue;
    plan.halo_stages = choice.halos;
    plan.basis_resident = choice.basis == all;
    plan.mixing_resident = choice.mixing == all;
    plan.basis_stages = plan.basis_resident ? static_cast<int>(basis_tiles) : choice.basis;
    plan.mixing_stages = plan.mixing_resident ? static_cast<int>(chunks) : choice.mixing;
    const int bytes = plan.bars_offset() + HopperPlan::bars() * 8;
    if (bytes > shared_limit) continue;
    plan.bytes = bytes;
    break;
  }
  return plan;
}

inline int64_t hopper_tiles(const Problem& p, const HopperPlan& plan) {
  return int64_t{p.N} * tiles_of(p.OH, plan.tile_y()) * tiles_of(p.OW, HopperPlan::tile_x);
}

// Blocks of the persistent grid: one a multiprocessor, which takes all registers, never more than tiles ask for. The
// multiprocessors of a cluster lie close to each other, so clusters of four and eight leave some over (measured).
inline int64_t hopper_grid(const Problem& p, const HopperPlan& plan, const CudaDevice& device) {
  const int usable = plan.blocks < 4 ? device.multiprocessors : device.multiprocessors * 10 / 11;
  const int64_t clusters = usable / plan.blocks > 0 ? usable / plan.blocks : 1, tiles = hopper_tiles(p, plan);
  return (tiles < clusters ? tiles : clusters) * plan.blocks;
}

// What a call takes, in clocks: wgmma with A by ldmatrix for each tap and slab at the N of a warpgroup, or the basis
// coming from the second-level cache where it does not stay; the outputs; what a tile and an exchange cost. Rates are
// those measured on an H200 (docs/gpu.md), rounded.
inline int64_t hopper_clocks(const Problem& p, const HopperPlan& plan, const CudaDevice& device) {
  const int64_t grid = hopper_grid(p, plan, device), rounds = tiles_of(hopper_tiles(p, plan), grid / plan.blocks);
  const int filters = plan.shared_out ? plan.Q16 / 2 : plan.Q16;
  const int mma = filters <= 16 ? 252 : filters == 32 ? 290 : filters == 64 ? 363 : filters == 128 ? 511 : 1022;
  const int64_t bytes_a_clock = 35 * int64_t{device.multiprocessors} / grid;
  const int64_t refill = plan.basis_resident ? 0 : plan.basis_tile() / (bytes_a_clock < 60 ? bytes_a_clock : 60);
  const int64_t stage1 = p.taps * tiles_of(p.slabs, plan.blocks) * (mma > refill ? mma : refill);
  const int64_t stage2 = tiles_of(p.chunks, plan.blocks) * (plan.shared_out ? 500 : 800);
  const int exchange = plan.blocks > 1 ? 2500 : plan.shared_out ? 300 : 0;
  return rounds * (600 + stage1 + exchange + stage2);
}

// The quickest plan of a call by that count; `bytes` is 0 where none fits.
inline HopperPlan hopper_plan(const Problem& p, const CudaDevice& device) {
  HopperPlan best = hopper_plan_of(p, device.shared_bytes, false, 1);
  for (int blocks = 1; blocks <= HopperPlan::most_blocks; blocks *= 2) {
    if (blocks > 1 && (blocks > p.slabs || blocks > device.multiprocessors)) break;
    const HopperPlan plan = hopper_plan_of(p, device.shared_bytes, true, blocks);
    if (plan.bytes == 0) continue;
    if (best.bytes == 0 || hopper_clocks(p, plan, device) < hopper_clocks(p, best, device)) best = plan;
  }
  return best;
}

}  // namespace basisconv::cuda
