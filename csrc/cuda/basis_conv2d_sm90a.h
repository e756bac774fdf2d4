// The plan of the sm_90a kernel: what stays in shared memory, how far copies run ahead, how many blocks there are. Pure
// functions of the sizes, the same on host and device, tested without either.
#pragma once
#include "basis_conv2d_problem.h"

namespace basisconv::cuda {

struct HopperPlan {
  static constexpr int tile_y = 16, tile_x = kTileX;               // pixels; each of two warpgroups has eight rows
  static constexpr int consumers = 256, threads = consumers + 32;  // and one warp that issues copies
  static constexpr int most_stages = 4;

  int Q16;
  int rows, columns, halo_box_bytes, halo_bytes;  // the box is what an mbarrier counts, the rest is alignment
  int halo_stages, basis_stages, mixing_stages;   // tiles of a ring
  bool basis_resident, mixing_resident;           // all of it is loaded once a block; then the "ring" is one copy
  int bytes;                                      // of shared memory, 0 where the kernel cannot run

  BASISCONV_EITHER int basis_tile() const { return Q16 * kSlab * 2; }
  BASISCONV_EITHER int mixing_tile() const { return kChunk * Q16 * 2; }
  BASISCONV_EITHER int basis_offset() const { return halo_stages * halo_bytes; }
  BASISCONV_EITHER int mixing_offset() const { return basis_offset() + basis_stages * basis_tile(); }
  BASISCONV_EITHER int staging_offset() const { return mixing_offset() + mixing_stages * mixing_tile(); }
  BASISCONV_EITHER int bars_offset() const { return staging_offset() + consumers / 32 * kStagingBytes; }
  BASISCONV_EITHER static constexpr int bars() { return 6 * most_stages; }  // full and empty of three rings
};

// The best plan that fits. Two halo tiles before all else: one is filled while the other is read, and 32 KB under way a
// multiprocessor keep its memory busy. Then a second block, then the basis resident, then the coefficients, then a
// third halo tile.
inline HopperPlan hopper_plan(const Problem& p, int shared_limit) {
  HopperPlan plan{};
  plan.Q16 = padded_filters(p.Q);
  plan.rows = (HopperPlan::tile_y - 1) * p.stride_h + (p.R - 1) * p.dilation_h + 1;
  plan.columns = (HopperPlan::tile_x - 1) * p.stride_w + (p.S - 1) * p.dilation_w + 1;
  constexpr int longest_side = 256;  // of a box
  const int64_t box = int64_t{plan.rows} * plan.columns * kSlab * 2;
  if (plan.Q16 > 128 || plan.rows > longest_side || plan.columns > longest_side || box > shared_limit) return plan;
  plan.halo_box_bytes = static_cast<int>(box);
  plan.halo_bytes = (plan.halo_box_bytes + 1023) / 1024 * 1024;
  const int64_t basis_tiles = int64_t{p.taps} * p.slabs, most_tiles = shared_limit / 1024;  // none is below 1 KB
  struct Choice {
    int halos;
    bool basis, mixing;
  };
  for (const Choice& choice : {Choice{3, true, true}, Choice{2, true, true}, Choice{2, true, false},
                               Choice{3, false, true}, Choice{2, false, true}, Choice{2, false, false},
                               Choice{1, true, true}, Choice{1, false, true}, Choice{1, false, false}}) {
    if ((choice.basis && basis_tiles > most_tiles) || (choice.mixing && p.chunks > most_tiles)) continue;
    plan.halo_stages = choice.halos;
    plan.basis_resident = choice.basis;
    plan.mixing_resident = choice.mixing;
    plan.basis_stages = choice.basis ? static_cast<int>(basis_tiles) : HopperPlan::most_stages;
    plan.mixing_stages = choice.mixing ? p.chunks : 2;
    const int bytes = plan.bars_offset() + HopperPlan::bars() * 8;
    if (bytes > shared_limit) continue;
    plan.bytes = bytes;
    break;
  }
  return plan;
}

// Blocks of the persistent grid: one a multiprocessor, never more than there are tiles. A second one would have to make
// do with 96 registers a thread, and ptxas then spills or serialises wgmma.
inline int64_t hopper_blocks(int64_t tiles, const CudaDevice& device) {
  return tiles < device.multiprocessors ? tiles : device.multiprocessors;
}

}  // namespace basisconv::cuda
