// The plan of the sm_90a kernel: which pixels a tile has and how many blocks it, what stays in shared memory, how far
// copies run ahead. Pure functions of the sizes, the same on host and device, tested without either.
#pragma once
#include "basis_conv2d_epilogue.h"

namespace basisconv::cuda {

struct HopperPlan {
  static constexpr int tile_x = kTileX;                             // pixels
  static constexpr int consumers = 256, threads = consumers + 128;  // two warpgroups compute, one issues copies
  // Of a thread, where a multiprocessor has one block or two.
  BASISCONV_EITHER static constexpr int registers_to_compute(int per_sm) { return per_sm == 1 ? 232 : 104; }
  BASISCONV_EITHER static constexpr int registers_to_copy(int per_sm) { return per_sm == 1 ? 40 : 24; }
  static constexpr int most_stages = kMostStages, most_blocks = 8,
                       most_filters_of_two = 32,  // of two blocks a multiprocessor
      most_filters_to_slide = 128;                // beside more of them registers are too few
  static constexpr int rings = 3, warps = consumers / 32;

  int Q16;
  bool shared_out;  // both warpgroups have the same 8x8 pixels, each half of the filters
  int images;       // of a tile: 2 where each warpgroup has 8x8 pixels of an image of its own
  int blocks;       // that share the slabs and the outputs of a tile: a cluster
  int per_sm;       // blocks of a multiprocessor: 2 where few filters leave it registers and memory enough
  bool lent;        // sums and fragments lie in the ring of the basis, whose last places are kept until they are read
  int rows, columns, halo_box_bytes, halo_bytes;  // the box is what an mbarrier counts, the rest is alignment
  int halo_stages, basis_stages, mixing_stages;   // tiles of a ring
  bool basis_resident, mixing_resident;           // all of it is loaded once a block; then the "ring" is one copy
  int ahead;  // bytes of packed weights of which a block says that they will be read
  int bytes;  // of shared memory, 0 where the kernel cannot run

  BASISCONV_EITHER int tile_y() const { return shared_out || images > 1 ? 8 : 16; }
  BASISCONV_EITHER int basis_tile() const { return Q16 * kSlab * 2; }
  BASISCONV_EITHER int mixing_tile() const { return kChunk * Q16 * 2; }
  BASISCONV_EITHER int basis_offset() const { return halo_stages * halo_bytes; }
  BASISCONV_EITHER int mixing_offset() const { return basis_offset() + basis_stages * basis_tile(); }
  // Where filters are shared out: Z of 64 pixels as A fragments. Where blocks share slabs: this block's sums.
  BASISCONV_EITHER int fragments_bytes() const { return shared_out ? 64 * Q16 * 2 : 0; }
  BASISCONV_EITHER int sums_bytes() const { return blocks > 1 ? (shared_out ? 64 : 128) * Q16 * 4 : 0; }
  BASISCONV_EITHER int behind_mixing() const { return mixing_offset() + mixing_stages * mixing_tile(); }
  BASISCONV_EITHER int fragments_offset() const { return lent ? basis_offset() : behind_mixing(); }
  BASISCONV_EITHER int sums_offset() const { return fragments_offset() + fragments_bytes(); }
  BASISCONV_EITHER int staging_offset() const {
    return behind_mixing() + (lent ? 0 : fragments_bytes() + sums_bytes());
  }
  BASISCONV_EITHER int bars_offset() const { return staging_offset() + consumers / 32 * kStagingBytes; }
  // Full and empty of three rings, two for each group of warps with the same pixels, one for all warps.
  BASISCONV_EITHER static constexpr int bars() { return 2 * (rings * most_stages + warps) + 1; }
};

// Whether the row of taps below reads the row of pixels below: of a warp's two rows one is then there already.
inline bool slides(const Problem& p) { return p.R == 3 && p.S == 3 && p.stride_h == p.dilation_h; }

// What a plan is made for: see there.
struct HopperForm {
  bool shared_out = false;
  int blocks = 1, per_sm = 1, images = 1;
};

// The best plan of a kind that fits: all of the basis resident, then the coefficients, with two halo tiles or three,
// one filled while another is read. A basis that does not fit comes in a ring, and its depth is worth more than
// anything else: a tile of it is a microsecond under way (measured).
inline HopperPlan hopper_plan_of(const Problem& p, int shared_limit, const HopperForm& form) {
  HopperPlan plan{};
  plan.Q16 = padded_filters(p.Q);
  plan.shared_out = form.shared_out;
  plan.blocks = form.blocks;
  plan.per_sm = form.per_sm;
  plan.images = form.images;
  if (form.per_sm > 1) {
    constexpr int reserved = 1024;  // of every block
    if (form.shared_out || plan.Q16 > HopperPlan::most_filters_of_two || p.R != 3 || p.S != 3) return plan;
    shared_limit = (shared_limit + reserved) / form.per_sm - reserved;
  }
  plan.rows = (plan.tile_y() - 1) * p.stride_h + (p.R - 1) * p.dilation_h + 1;
  plan.columns = (HopperPlan::tile_x - 1) * p.stride_w + (p.S - 1) * p.dilation_w + 1;
  constexpr int longest_side = 256;  // of a box
  const int64_t box = int64_t{plan.rows} * plan.columns * plan.images * kSlab * 2;
  const bool whole_of_cluster = form.blocks > 1 && !form.shared_out;
  if (whole_of_cluster && (!slides(p) || plan.Q16 < 32)) return plan;
  if (plan.Q16 > kLargestQ || (form.shared_out && plan.Q16 < 32)) return plan;
  if (plan.rows > longest_side || plan.columns > longest_side || box > shared_limit) return plan;
  plan.halo_box_bytes = static_cast<int>(box);
  plan.halo_bytes = (plan.halo_box_bytes + 1023) / 1024 * 1024;
  const int64_t basis_tiles = p.taps * tiles_of(p.slabs, form.blocks), chunks = tiles_of(p.chunks, form.blocks);
  const int64_t most_tiles = shared_limit / 1024;  // none is below 1 KB
  const auto sized = [&](int halos, int64_t basis_stages, int64_t mixing_stages, bool lent = false) {
    HopperPlan sized = plan;
    sized.lent = lent;
    sized.bytes = 0;
    if (basis_stages > most_tiles || mixing_stages > most_tiles) return sized;
    sized.halo_stages = halos;
    sized.basis_stages = static_cast<int>(basis_stages);
    sized.mixing_stages = static_cast<int>(mixing_stages);
    sized.mixing_resident = mixing_stages == chunks;
    const int to_lend = sized.basis_stages * sized.basis_tile();
    if (lent && (basis_stages > p.taps || to_lend < sized.fragments_bytes() + sized.sums_bytes())) return sized;
    sized.bytes = sized.bars_offset() + HopperPlan::bars() * 8;
    return sized;
  };
  const auto fits = [&](const HopperPlan& sized) { return sized.bytes > 0 && sized.bytes <= shared_limit; };
  struct Choice {
    int halos;
    int64_t mixing;
  };
  const auto streamed = [chunks](int64_t stages) { return stages < chunks ? stages : chunks; };
  for (const Choice& choice : {Choice{3, chunks}, Choice{2, chunks}, Choice{2, streamed(2)}, Choice{1, chunks}}) {
    const HopperPlan resident = sized(choice.halos, basis_tiles, choice.mixing);
    if (!fits(resident)) continue;
    plan = resident;
    plan.basis_resident = true;
    return plan;
  }
  // Only where it is not deep otherwise the ring lends its memory: then it is filled late for the next tile.
  const int deep_enough = plan.basis_tile() < 32 * 1024 ? 6 : 4;
  for (const bool lent : {false, true}) {
    if (lent && !form.shared_out && form.blocks == 1) break;
    for (const Choice& choice : {Choice{3, chunks}, Choice{2, chunks}, Choice{2, streamed(2)}, Choice{2, streamed(1)},
                                 Choice{1, chunks}, Choice{1, streamed(2)}, Choice{1, streamed(1)}}) {
      if (plan.basis_stages >= deep_enough) return plan;
      for (int stages = HopperPlan::most_stages; stages >= 2 && stages > plan.basis_stages; --stages) {
        const HopperPlan ring = sized(choice.halos, stages, choice.mixing, lent);
        if (fits(ring)) plan = ring;
      }
    }
  }
  return plan;
}

inline int64_t hopper_tiles(const Problem& p, const HopperPlan& plan) {
  return tiles_of(p.N, plan.images) * tiles_of(p.OH, plan.tile_y()) * tiles_of(p.OW, HopperPlan::tile_x);
}

// Blocks of the persistent grid, never more than tiles ask for. The multiprocessors of a cluster lie close to each
// other, so clusters of more than two leave some over (measured).
inline int64_t hopper_grid(const Problem& p, const HopperPlan& plan, const CudaDevice& device) {
  const int usable = plan.blocks < 3 ? device.multiprocessors * plan.per_sm : device.multiprocessors * 10 / 11;
  const int64_t clusters = usable / plan.blocks > 0 ? usable / plan.blocks : 1, tiles = hopper_tiles(p, plan);
  return (tiles < clusters ? tiles : clusters) * plan.blocks;
}

// Its part of the packed weights for each of so many blocks; nothing where a block loads all of the basis at once.
inline int hopper_ahead(const Problem& p, const HopperPlan& plan, int64_t grid) {
  constexpr int64_t line = 128, most = 1 << 20;
  const int64_t part = tiles_of(tiles_of(p.basis_bytes + p.mixing_bytes, line), grid) * line;
  return plan.basis_resident ? 0 : static_cast<int>(part < most ? part : most);
}

// What a call takes, in clocks: for each tap and slab wgmma, or what it moves in shared memory, or the basis coming
// from the second-level cache where it does not stay; the outputs; what a tile and an exchange cost. Rates are those
// measured on an H200 (docs/gpu.md), rounded. Shared memory moves 84 bytes a clock: pixels into registers, by sliding
// filters a third less; the basis' tile for each warpgroup that has its pixels; and the same tile coming in. Tiles that
// all blocks want at once come slower than others: 22 bytes a clock and multiprocessor where all are at work, 40 where
// few are.
inline int64_t hopper_clocks(const Problem& p, const HopperPlan& plan, const CudaDevice& device) {
  const int64_t grid = hopper_grid(p, plan, device), rounds = tiles_of(hopper_tiles(p, plan), grid / plan.blocks);
  const int filters = plan.shared_out ? plan.Q16 / 2 : plan.Q16;
  const bool sliding = slides(p) && plan.Q16 <= HopperPlan::most_filters_to_slide;
  const int pixels = 2 * 64 * kSlab * 2, tiles = (plan.shared_out ? 1 : 2) + (plan.basis_resident ? 0 : 1);
  const int moved = (pixels * (sliding ? 2 : 3) / 3 + tiles * plan.basis_tile()) / 84;
  const int tap = moved > 4 * filters ? moved : 4 * filters;
  const int64_t bytes_a_clock = 22 * int64_t{device.multiprocessors} / grid;
  int64_t refill = plan.basis_resident ? 0 : plan.basis_tile() / (bytes_a_clock < 40 ? bytes_a_clock : 40);
  constexpr int under_way = 1000;  // clocks; one tile of the ring is in use and one is being given back
  const int ahead = plan.basis_stages > 3 ? plan.basis_stages - 2 : 1;
  if (!plan.basis_resident && refill < under_way / ahead) refill = under_way / ahead;
  const int64_t stage1 = p.taps * tiles_of(p.slabs, plan.blocks) * (tap > refill ? tap : refill);
  const int64_t stage2 = tiles_of(p.chunks, plan.blocks) * (plan.shared_out ? 500 : 800);
  const int exchange = plan.blocks > 1 ? (plan.shared_out ? 2500 : 40 * plan.Q16) : plan.shared_out ? 1000 : 0;
  return rounds * (600 + stage1 + exchange + stage2) * (plan.per_sm == 2 ? 125 : 100) / 100;
}

// The quickest plan of a call by that count; `bytes` is 0 where none fits.
inline HopperPlan hopper_plan(const Problem& p, const CudaDevice& device) {
  HopperPlan best = hopper_plan_of(p, device.shared_bytes, {});
  const auto consider = [&](const HopperForm& form) {
    if (form.blocks > 1 && (form.blocks > p.slabs || form.blocks > device.multiprocessors)) return;
    const HopperPlan plan = hopper_plan_of(p, device.shared_bytes, form);
    if (plan.bytes == 0) return;
    if (best.bytes == 0 || hopper_clocks(p, plan, device) < hopper_clocks(p, best, device)) best = plan;
  };
  consider({false, 1, 2});
  for (const int blocks : {1, 2, 3, 4, HopperPlan::most_blocks}) {
    consider({true, blocks});
    if (blocks > 1) consider({false, blocks});
    consider({false, blocks, 1, 2});
  }
  return best;
}

}  // namespace basisconv::cuda

namespace basisconv {

// cuda_basis_conv2d_sm90a by this plan, for tests: any that fits gives the same result.
const char* cuda_basis_conv2d_sm90a_by(const CudaBasisConv2d& call, const cuda::HopperPlan& plan,
                                       const CudaDevice& device, void* stream);

}  // namespace basisconv
