// Between the stages of the sm_90a kernel: Z is rounded once and becomes the A fragments of stage 2, where need be
// after warps of one block, or of a cluster, have added up their parts.
#pragma once
#include "basis_conv2d_sm90a.h"
#include "hopper.h"

namespace basisconv::cuda {

// 16 pixels x 16 filters of z, rounded once, as a k16 step of A: an accumulator's 8 columns are (g, 2t), (g, 2t+1),
// (g+8, 2t), (g+8, 2t+1). Also keeps them where the backward wants them; q is the first filter.
template <class T>
BASISCONV_DEVICE void finish_maps(const Problem& p, float* z, const Pixels& pixels, int q, uint32_t (&a)[4]) {
  if (p.maps != nullptr) {
    store_maps<T>(p, z, pixels, q);
    store_maps<T>(p, z + 4, pixels, q + 8);
  }
  clear_filling(p, z, q);
  clear_filling(p, z + 4, q + 8);
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = round2<T>(z[2 * i], z[2 * i + 1]);
}

// Makes Z whole for the warps with the same 16 pixels: two a block where filters are shared out, each with its half of
// them, else one; of one block or of all of a cluster, each with its slabs. What has 16 filters is summed by one block
// and shown to all.
template <int filters, bool shared_out>
struct Exchange {
  static constexpr int n = filters < 128 ? filters : 128;                   // of a wgmma
  static constexpr int steps = filters / 16, step_bytes = 32 * 16;          // of A; sums take twice the bytes
  static constexpr int warps = shared_out ? 2 : 1;                          // of a block, with the same pixels
  static constexpr int at_once = shared_out ? HopperPlan::most_blocks : 4;  // sums, as registers allow
  static constexpr int pitch = shared_out ? step_bytes : 2 * step_bytes;    // from fragments to fragments
  int phase = 0;

  // By one thread, before any other uses them.
  BASISCONV_DEVICE static void init(const HopperPlan& plan, uint64_t* bars) {
    for (int i = 0; i < 2 * HopperPlan::warps; ++i) bar_init(first_bar(bars) + i, warps * plan.blocks);
    bar_init(first_bar(bars) + 2 * HopperPlan::warps, HopperPlan::warps);
  }

  // `first` is the first filter of this warp.
  template <class T>
  BASISCONV_DEVICE void turn(const Problem& p, const HopperPlan& plan, const Pixels& pixels, int first,
                             float (&z)[filters / n][n / 2], uint32_t (&a)[warps * steps][4]) {
    const int lane = threadIdx.x % 32, rank = static_cast<int>(blockIdx.x) % plan.blocks;
    const int warp = threadIdx.x / 32, group = warp % (HopperPlan::warps / warps);
    char* memory = shared_memory();
    // Barriers: all have their sums there and are done with the tile before; all have rounded; all warps of the block
    // are done with the basis, whose memory is lent.
    uint64_t* summed = first_bar(reinterpret_cast<uint64_t*>(memory + plan.bars_offset())) + group;
    uint64_t *shown = summed + HopperPlan::warps, *drained = shown + HopperPlan::warps - group;
    // A warp alone with its pixels has its fragments where the sums were that they come from.
    char* sums = memory + plan.sums_offset() + warp * steps * 2 * step_bytes;
    char* fragments = shared_out ? memory + plan.fragments_offset() + group * 2 * steps * step_bytes : sums;
    const bool of_cluster = !shared_out || plan.blocks > 1;  // known where this is compiled for clusters alone
    char* mine = fragments + first / 16 * pitch + lane * 16;
    if (plan.lent) {
      __syncwarp();
      if (lane == 0) bar_arrive(drained);
      bar_wait(drained, phase);
    }
    if (of_cluster) {
#pragma unroll
      for (int i = 0; i < filters / 8; ++i) {
        const float* from = z[i / (n / 8)] + i % (n / 8) * 4;
        *reinterpret_cast<float4*>(sums + i * step_bytes + lane * 16) = float4{from[0], from[1], from[2], from[3]};
      }
    }
    meet(summed, plan.blocks);
    if (of_cluster) {
#pragma unroll 1
      for (int step = rank; step < steps; step += plan.blocks) {
        const float4* own = reinterpret_cast<const float4*>(sums + step * 2 * step_bytes + lane * 16);
        float sum[8] = {};
#pragma unroll 1
        for (int first_of = 0; first_of < plan.blocks; first_of += at_once) {
          float4 part[at_once][2];  // all loads are under way before the first is used
#pragma unroll
          for (int i = 0; i < at_once; ++i) {
            if (first_of + i >= plan.blocks) continue;
            const float4* there = beside(own, first_of + i);
            part[i][0] = there[0], part[i][1] = there[step_bytes / 16];
          }
#pragma unroll
          for (int i = 0; i < at_once; ++i) {
            if (first_of + i >= plan.blocks) continue;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              sum[j * 4] += part[i][j].x, sum[j * 4 + 1] += part[i][j].y;
              sum[j * 4 + 2] += part[i][j].z, sum[j * 4 + 3] += part[i][j].w;
            }
          }
        }
        uint32_t rounded[4];
        finish_maps<T>(p, sum, pixels, first + step * 16, rounded);
        for (int to = 0; to < plan.blocks; ++to) {
          *beside(reinterpret_cast<uint4*>(mine + step * pitch), to) =
              uint4{rounded[0], rounded[1], rounded[2], rounded[3]};
        }
      }
    } else {
#pragma unroll
      for (int step = 0; step < steps; ++step) {
        uint32_t rounded[4];
        finish_maps<T>(p, z[step / (n / 16)] + step % (n / 16) * 8, pixels, first + step * 16, rounded);
        *reinterpret_cast<uint4*>(mine + step * pitch) = uint4{rounded[0], rounded[1], rounded[2], rounded[3]};
      }
    }
    meet(shown, plan.blocks);
    phase ^= 1;
#pragma unroll
    for (int q = 0; q < warps * steps; ++q) {
      const uint4 words = *reinterpret_cast<const uint4*>(fragments + q * pitch + lane * 16);
      a[q][0] = words.x, a[q][1] = words.y, a[q][2] = words.z, a[q][3] = words.w;
    }
  }

 private:
  BASISCONV_DEVICE static uint64_t* first_bar(uint64_t* bars) {
    return bars + 2 * HopperPlan::rings * HopperPlan::most_stages;
  }
  // Until all warps with these pixels are here, in all blocks.
  BASISCONV_DEVICE void meet(uint64_t* bar, int blocks) const {
    const int lane = threadIdx.x % 32;
    __syncwarp();
    if (lane < blocks) bar_arrive_beside(bar, lane);
    bar_wait_cluster(bar, phase);
  }
};

}  // namespace basisconv::cuda
