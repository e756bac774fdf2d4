// Between the stages of the sm_90a kernel: Z is rounded once and becomes the A fragments of stage 2, where need be
// after warps of one block, or of a cluster, have added up their parts.
#pragma once
#include "basis_conv2d_sm90a.h"
#include "hopper.h"

namespace basisconv::cuda {

// 16 pixels x 16 filters of z, rounded once, as a k16 step of A: an accumulator's 8 columns are (g, 2t), (g, 2t+1),
// (g+8, 2t), (g+8, 2t+1). Also keeps them where the backward wants them; q is the first filter.
template <class T>
BASISCONV_DEVICE void finish_maps(const Problem& p, const float* z, const Pixels& pixels, int q, uint32_t (&a)[4]) {
  if (p.maps != nullptr) {
    store_maps<T>(p, z, pixels, q);
    store_maps<T>(p, z + 4, pixels, q + 8);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = round2<T>(z[2 * i], z[2 * i + 1]);
}

// Makes Z whole for the warps with the same 16 pixels: two a block, each with its half of the filters, of one block or
// of all of a cluster, each with its slabs. What has 16 filters is summed by one block and shown to all.
template <int filters>
struct Exchange {
  static constexpr int steps = filters / 16, step_bytes = 32 * 16;  // of A; sums take twice the bytes
  uint64_t *summed, *shown;  // barriers: all have their sums there and are done with the tile before; all have rounded
  uint64_t* drained;         // all warps of the block are done with the basis, whose memory is lent
  char *sums, *fragments;
  int phase = 0;

  BASISCONV_DEVICE Exchange(const HopperPlan& plan, uint64_t* bars, char* memory, int warp) {
    const int pair = warp % HopperPlan::pairs;
    summed = bars + 2 * HopperPlan::rings * HopperPlan::most_stages + pair;
    shown = summed + HopperPlan::pairs;
    drained = shown + HopperPlan::pairs - pair;
    sums = memory + plan.sums_offset() + warp * steps * 2 * step_bytes;
    fragments = memory + plan.fragments_offset() + pair * 2 * steps * step_bytes;
  }

  // `first` is the first filter of this warp.
  template <class T>
  BASISCONV_DEVICE void turn(const Problem& p, const HopperPlan& plan, const Pixels& pixels, int first,
                             float (&z)[filters / 2], uint32_t (&a)[2 * steps][4]) {
    const int lane = threadIdx.x % 32, rank = static_cast<int>(blockIdx.x) % plan.blocks;
    char* mine = fragments + first / 16 * step_bytes + lane * 16;
    if (plan.lent) {
      __syncwarp();
      if (lane == 0) bar_arrive(drained);
      bar_wait(drained, phase);
    }
    if (plan.blocks > 1) {
#pragma unroll
      for (int i = 0; i < filters / 8; ++i) {
        *reinterpret_cast<float4*>(sums + i * step_bytes + lane * 16) =
            float4{z[i * 4], z[i * 4 + 1], z[i * 4 + 2], z[i * 4 + 3]};
      }
    }
    meet(summed, plan.blocks);
    if (plan.blocks > 1) {
#pragma unroll 1
      for (int step = rank; step < steps; step += plan.blocks) {
        float4 part[HopperPlan::most_blocks][2];  // all loads are under way before the first is used
#pragma unroll
        for (int from = 0; from < HopperPlan::most_blocks; ++from) {
          if (from >= plan.blocks) continue;
          const float4* there = beside(reinterpret_cast<const float4*>(sums + step * 2 * step_bytes + lane * 16), from);
          part[from][0] = there[0], part[from][1] = there[step_bytes / 16];
        }
        float sum[8] = {};
#pragma unroll
        for (int from = 0; from < HopperPlan::most_blocks; ++from) {
          if (from >= plan.blocks) continue;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            sum[i * 4] += part[from][i].x, sum[i * 4 + 1] += part[from][i].y;
            sum[i * 4 + 2] += part[from][i].z, sum[i * 4 + 3] += part[from][i].w;
          }
        }
        uint32_t rounded[4];
        finish_maps<T>(p, sum, pixels, first + step * 16, rounded);
        for (int to = 0; to < plan.blocks; ++to) {
          *beside(reinterpret_cast<uint4*>(mine + step * step_bytes), to) =
              uint4{rounded[0], rounded[1], rounded[2], rounded[3]};
        }
      }
    } else {
#pragma unroll
      for (int step = 0; step < steps; ++step) {
        uint32_t rounded[4];
        finish_maps<T>(p, z + step * 8, pixels, first + step * 16, rounded);
        *reinterpret_cast<uint4*>(mine + step * step_bytes) = uint4{rounded[0], rounded[1], rounded[2], rounded[3]};
      }
    }
    meet(shown, plan.blocks);
    phase ^= 1;
#pragma unroll
    for (int q = 0; q < 2 * steps; ++q) {
      const uint4 words = *reinterpret_cast<const uint4*>(fragments + q * step_bytes + lane * 16);
      a[q][0] = words.x, a[q][1] = words.y, a[q][2] = words.z, a[q][3] = words.w;
    }
  }

 private:
  // Until all warps with these pixels are here, in all blocks.
  BASISCONV_DEVICE void meet(uint64_t* bar, int blocks) const {
    const int lane = threadIdx.x % 32;
    __syncwarp();
    if (lane < blocks) bar_arrive_beside(bar, lane);
    bar_wait_cluster(bar, phase);
  }
};

}  // namespace basisconv::cuda
