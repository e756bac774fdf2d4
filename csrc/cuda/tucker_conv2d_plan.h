// The plan of tucker_conv2d in one pass: which pixels a tile has, how many are reduced at a time, how far copies run
// ahead, where things lie in shared memory. Pure functions of the sizes, tested without a device.
#pragma once
#include "basis_conv2d_epilogue.h"
#include "tucker_conv2d.h"

namespace basisconv::cuda {

// The first 1x1.
struct Reduction {
  const void* u_in;
  int64_t stride_c, stride_i;  // elements
  int C, slabs;
  bool in_16_bytes;  // ranks lie side by side, whole pieces of 16 bytes a channel
};

inline Reduction reduction_of(const CudaTuckerConv2d& call) {
  Reduction r{};
  r.u_in = call.u_in;
  r.stride_c = call.u_in_strides[0];
  r.stride_i = call.u_in_strides[1];
  r.C = static_cast<int>(call.channels);
  r.slabs = static_cast<int>(tiles_of(call.channels, kSlab));
  r.in_16_bytes = r.stride_i == 1 && r.stride_c % 8 == 0 && call.rest.params.weights.C % 8 == 0 &&
                  reinterpret_cast<uintptr_t>(call.u_in) % 16 == 0;
  return r;
}

// Eight warps. A tile is 8 pixels wide and 16 (`tall`) or 8 high: a warp has 16 of them with all filters, or with half.
// `ranks` is what rank_in and Q are padded to, both.
template <int ranks_, bool tall_>
struct TuckerTile {
  static constexpr int ranks = ranks_;
  static constexpr bool tall = tall_;
  static constexpr int warps = 8, threads = warps * 32;
  static constexpr int blocks = ranks == 16 ? 3 : ranks == 32 ? 2 : 1;  // of a multiprocessor
  static constexpr int tile_y = tall ? 16 : 8, pixels = tile_y * kTileX;
  static constexpr int shares = warps * 16 / pixels;  // of the filters, and of the outputs of a chunk
  // The first stage: warps that have all ranks, or half of them, and how many times 16 pixels each.
  static constexpr int parts = ranks > 16 ? 2 : 1, down = warps / parts;
  static constexpr int each = tall && parts == 2 ? 3 : 2, group = down * each * 16;
};

struct TuckerPlan {
  static constexpr int warps = 8, most_ranks = 128;
  static constexpr int slab_pitch = kSlab * 2 + 16;  // rows whose pitch is 16 times an odd number: no bank conflicts

  int ranks;
  bool tall;
  int core_rows;                                // Q as it is packed
  int rows, columns, pixels;                    // of the halo
  int step_rows, step_columns;                  // from a pixel of it to the one that comes a round of the threads later
  int group, groups;                            // pixels reduced at a time
  int ahead;                                    // jobs whose copies are under way
  int reduce_jobs, core_jobs, core_tiles;       // core_tiles: taps of a slab in a job
  int mixing_jobs, chunks_together;             // chunks of coefficients in a job
  int slab_stages, core_stages, mixing_stages;  // places of the three rings
  int bytes;                                    // of shared memory, 0 where the kernel cannot run

  BASISCONV_EITHER static constexpr int pitch_of(int ranks) { return ranks * 2 + 16; }
  BASISCONV_EITHER int pitch() const { return pitch_of(ranks); }  // of M, Z and u_in
  BASISCONV_EITHER int core_pitch() const { return pitch_of(ranks < kSlab ? ranks : kSlab); }
  BASISCONV_EITHER int core_tile() const { return ranks * core_pitch(); }
  BASISCONV_EITHER int mixing_tile() const { return kChunk * pitch(); }
  BASISCONV_EITHER int tile_y() const { return tall ? 16 : 8; }
  BASISCONV_EITHER int image_bytes() const { return group * slab_pitch; }
  BASISCONV_EITHER int slab_bytes() const { return image_bytes() + kSlab * pitch(); }
  BASISCONV_EITHER int core_offset() const { return mixing_stages * chunks_together * mixing_tile(); }
  BASISCONV_EITHER int reduced_offset() const { return core_offset() + core_stages * core_tiles * core_tile(); }
  BASISCONV_EITHER int slab_offset() const { return reduced_offset() + pixels * pitch(); }
  // Z and the epilogue's staging lie over the slabs, which nobody reads after the first stage.
  BASISCONV_EITHER int maps_offset() const { return slab_offset(); }
  BASISCONV_EITHER int staging_offset() const { return maps_offset() + tile_y() * kTileX * pitch(); }
  BASISCONV_EITHER int end() const {
    const int first = slab_offset() + slab_stages * slab_bytes();
    const int last = staging_offset() + warps * kStagingBytes;
    return first > last ? first : last;
  }
};

// The plan for tiles of one height: copies two jobs ahead if there is room, the core in as few jobs as fit.
inline TuckerPlan tucker_plan_of(const Problem& p, const Reduction& first, int shared_limit, bool tall) {
  TuckerPlan plan{};
  plan.core_rows = padded_filters(p.Q);
  const int rank_in = padded_filters(p.C);
  plan.ranks = plan.core_rows > rank_in ? plan.core_rows : rank_in;
  if (!tall && plan.ranks == 16) plan.ranks = 32;  // two warps share the filters, 16 each
  plan.tall = tall;
  if (plan.ranks > TuckerPlan::most_ranks) return plan;
  const int64_t rows = int64_t{plan.tile_y() - 1} * p.stride_h + int64_t{p.R - 1} * p.dilation_h + 1;
  const int64_t columns = int64_t{kTileX - 1} * p.stride_w + int64_t{p.S - 1} * p.dilation_w + 1;
  if (rows > shared_limit || columns > shared_limit || rows * columns * plan.pitch() > shared_limit) return plan;
  plan.rows = static_cast<int>(rows);
  plan.columns = static_cast<int>(columns);
  plan.pixels = plan.rows * plan.columns;
  constexpr int a_round = TuckerPlan::warps * 32 / 8;  // eight threads a pixel
  plan.step_rows = a_round / plan.columns;
  plan.step_columns = a_round % plan.columns;
  const int most = plan.ranks == 16 ? TuckerTile<16, true>::group
                   : tall           ? TuckerTile<32, true>::group
                                    : TuckerTile<32, false>::group;
  plan.groups = static_cast<int>(tiles_of(plan.pixels, most));
  plan.group = plan.groups > 1 ? most : static_cast<int>(tiles_of(plan.pixels, 16)) * 16;
  plan.reduce_jobs = plan.groups * first.slabs;
  const int all = p.taps * p.slabs;
  if (int64_t{all} * plan.core_rows > shared_limit * int64_t{64}) return plan;  // and so no count below overflows
  for (int ahead = 2; ahead > 0; --ahead) {
    const auto places = [ahead](int jobs) { return jobs < ahead + 1 ? jobs : ahead + 1; };
    for (int jobs = 1, tiles = 0; jobs <= all; ++jobs) {
      const int each = static_cast<int>(tiles_of(all, jobs));
      if (each == tiles) continue;
      tiles = each;
      TuckerPlan sized = plan;
      sized.ahead = ahead;
      sized.core_tiles = tiles;
      sized.core_jobs = static_cast<int>(tiles_of(all, tiles));
      sized.slab_stages = places(sized.reduce_jobs);
      sized.core_stages = places(sized.core_jobs);
      if (int64_t{sized.core_stages} * tiles * sized.core_tile() > shared_limit) continue;
      for (const int together : {4, 2, 1}) {
        sized.chunks_together = p.chunks < together ? p.chunks : together;
        sized.mixing_jobs = static_cast<int>(tiles_of(p.chunks, sized.chunks_together));
        sized.mixing_stages = places(sized.mixing_jobs);
        sized.bytes = sized.end();
        if (sized.bytes <= shared_limit) return sized;
      }
    }
  }
  return plan;
}

inline int64_t tucker_tiles(const Problem& p, const TuckerPlan& plan) {
  return int64_t{p.N} * tiles_of(p.OH, plan.tile_y()) * tiles_of(p.OW, kTileX);
}

// Tall tiles reduce fewer pixels twice; they are taken where they fill the device. `bytes` is 0 where no tile fits.
inline TuckerPlan tucker_plan(const Problem& p, const Reduction& first, const CudaDevice& device) {
  const TuckerPlan tall = tucker_plan_of(p, first, device.shared_bytes, true);
  if (tall.bytes != 0 && tucker_tiles(p, tall) >= device.multiprocessors) return tall;
  const TuckerPlan low = tucker_plan_of(p, first, device.shared_bytes, false);
  return low.bytes != 0 ? low : tall;
}

}  // namespace basisconv::cuda
