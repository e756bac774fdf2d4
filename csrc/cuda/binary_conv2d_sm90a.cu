// binary_conv2d for sm_90a by wgmma over single bits: signs, 3x3 and 1x1 filters of one group. `hopper_takes` says
// which calls; everything else is binary_conv2d_sm80.cu's.
//
// The tensor cores only count a & w. With the complements beside the signs, both zero where padding counts for nothing,
//
//   m = popc(a & w) + popc(~a & ~w) = how many signs agree,   v = 2 m - C * (taps inside the image)
//
// in one sum: nothing about borders depends on the filter, and padding with 1 or -1 is a pixel like any other. Twice
// the products cost less than counts of ones, tables of borders and their addition to each output.
//
//   band      the rows of the image that a block's pixels need, in shared memory; the pixels follow each other through
//             the batch, so no tile is cut at an edge of a map. A comes from it by ldmatrix, a window's shift is an
//             address.
//   filters   in shared memory for as long as the block lives, in the order of the packing, which leaves a lane with
//             eight neighbouring filters of a pixel in its own accumulators.
//   outputs   go from registers to memory in pieces of 16 bytes; bits once around four lanes, then as words.
//
// Tests: tests/cuda_on_cpu/test_binary_conv2d_sm90a.py (no GPU), tests/ops/test_binary_conv2d.py.
#include "binary_conv2d_sm90a_store.h"
#include "hopper.h"

namespace basisconv::cuda::binary {
namespace {

constexpr int kBatch = 4;  // loads of a thread under way at once

BASISCONV_DEVICE uint4 complement(const uint4& a, const uint4& of) {
  return {~a.x & of.x, ~a.y & of.y, ~a.z & of.z, ~a.w & of.w};
}

// The filters of this block, each step's as rows of two units. A warp has 32 rows of a unit at a time, and several such
// loads under way.
template <int N, int taps, bool pairs>
BASISCONV_DEVICE void load_filters(const Problem& p, const HopperPlan& plan, char* to, int first) {
  constexpr int together = N / 32, row_bytes = 2 * kUnitBytes;
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32, jobs = together * plan.steps * (pairs ? 2 : 1);
  const int two = plan.units > 1 ? 1 : 0;  // a slab of the packing has two units
  for (int start = threadIdx.x / 32; start < jobs; start += kBatch * warps) {
    uint4 signs[kBatch], ones[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int job = start + b * warps, j = job / together, k = first + job % together * 32 + lane;
      const int unit = pairs ? 0 : j / taps, tap = j - unit * taps;
      const int position = pairs ? tap / 3 * 2 + tap % 3 / 2 : tap, slot = pairs ? tap % 3 % 2 : 0;
      signs[b] = uint4{0, 0, 0, 0}, ones[b] = uint4{~0u, ~0u, ~0u, ~0u};
      if (job >= jobs || k >= p.padded || tap >= taps) {
        ones[b] = signs[b];
        continue;
      }
      constexpr int rows = 65;  // of a unit in the packing: the last are the ones of its channels
      const char* from =
          p.filters + k / 64 * p.tile_bytes + slot * 8 +
          static_cast<int64_t>((unit >> two) * p.steps * 2 + (position << two) + (unit & two)) * (rows * kUnitBytes);
      const char* mask = from + (rows - 1) * kUnitBytes;
      const bool whole = (unit + 1) * (pairs ? 64 : 128) <= p.C;
      from += k % 64 * kUnitBytes;
      if constexpr (pairs) {
        const uint2 half = *reinterpret_cast<const uint2*>(from);
        signs[b].x = half.x, signs[b].y = half.y;
        if (!whole) {
          const uint2 channels = *reinterpret_cast<const uint2*>(mask);
          ones[b].x = channels.x, ones[b].y = channels.y;
        }
      } else {
        signs[b] = *reinterpret_cast<const uint4*>(from);
        if (!whole) ones[b] = *reinterpret_cast<const uint4*>(mask);
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int job = start + b * warps, j = job / together, step = pairs ? j / 2 : j, half = pairs ? j % 2 : 0;
      if (job >= jobs) continue;
      char* tile = to + (step * N + job % together * 32) * row_bytes;
      const uint32_t offset = lane * row_bytes + half * kUnitBytes;
      const uint4 other = complement(signs[b], ones[b]);
      if constexpr (pairs) {
        *reinterpret_cast<uint4*>(tile + swizzled(offset, row_bytes)) = uint4{signs[b].x, signs[b].y, other.x, other.y};
      } else {
        *reinterpret_cast<uint4*>(tile + swizzled(offset, row_bytes)) = signs[b];
        *reinterpret_cast<uint4*>(tile + swizzled(offset + kUnitBytes, row_bytes)) = other;
      }
    }
  }
}

// The band of a tile. A warp has 32 neighbouring units of a line at a time, and several such loads under way.
template <bool pairs>
struct Band {
  const Problem& p;
  const HopperPlan& plan;
  char* to;
  uint4 signs[kBatch];
  int at[kBatch];  // -1: nothing
  uint32_t inside;

  BASISCONV_DEVICE Band(const Problem& p, const HopperPlan& plan, char* to) : p(p), plan(plan), to(to) {}

  BASISCONV_DEVICE void fetch(const Start& start, int first) {
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32, jobs = plan.rows * plan.parts.by;
    const uint32_t outside = p.padding_value == 1 ? ~0u : 0u;
    inside = 0;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int job = first + b * warps, row = plan.parts.of_quotient(job);
      const int in_row = (job - row * plan.parts.by) * 32 + lane;
      const int column = plan.by_units.of_quotient(in_row), unit = in_row - column * plan.units;
      signs[b] = uint4{outside, outside, outside, outside};
      at[b] = -1;
      if (job >= jobs || column >= plan.width.by) continue;
      at[b] = unit * plan.plane_bytes() + (row * plan.width.by + column) * kUnitBytes;
      const Line line(p, plan, start, row);
      const int x = column * plan.step_w - p.pad_left;
      if (!line.inside(p) || static_cast<unsigned>(x) >= static_cast<unsigned>(p.W)) continue;
      inside |= 1u << b;
      const uint32_t* from = line.pixels(p) + static_cast<int64_t>(x) * p.words + unit * kUnitWords;
      if constexpr (pairs) {
        const uint2 half = *reinterpret_cast<const uint2*>(from);
        signs[b].x = half.x, signs[b].y = half.y;
      } else {
        signs[b] = *reinterpret_cast<const uint4*>(from);
      }
    }
  }

  BASISCONV_DEVICE void put() const {
    const uint32_t outside = p.padding_value == -1 ? ~0u : 0u;
    const uint4 ones{~0u, ~0u, ~0u, ~0u}, filled{outside, outside, outside, outside};
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (at[b] < 0) continue;
      const uint4 other = inside >> b & 1 ? complement(signs[b], ones) : filled;
      if constexpr (pairs) {
        *reinterpret_cast<uint4*>(to + at[b]) = uint4{signs[b].x, signs[b].y, other.x, other.y};
      } else {
        *reinterpret_cast<uint4*>(to + at[b]) = signs[b];
        *reinterpret_cast<uint4*>(to + at[b] + plan.units * plan.plane_bytes()) = other;
      }
    }
  }
};

// --- kernel ----------------------------------------------------------------------------------------------------------

// Taps of an axis whose pixels lie inside the image; `from` is the first tap's.
template <int taps>
BASISCONV_DEVICE int taps_inside(int from, int dilation, int size) {
  int count = 0;
#pragma unroll
  for (int i = 0; i < taps; ++i) count += from + i * dilation >= 0 && from + i * dilation < size;
  return count;
}

template <int N, int taps, bool pairs>
__global__ void __launch_bounds__(128 * HopperPlan::most_of_a_block(N),
                                  HopperPlan::most_at_once(N) / HopperPlan::most_of_a_block(N))
    binary_conv2d_sm90a(const __grid_constant__ Problem p, const __grid_constant__ HopperPlan plan) {
  char* memory = shared_memory();
  const char* lines = memory + plan.filter_bytes();
  Band<pairs> band(p, plan, memory + plan.filter_bytes());
  uint32_t* first_of = reinterpret_cast<uint32_t*>(memory + plan.constants_offset());
  uint32_t* second_of = first_of + N;
  const int lane = threadIdx.x % 32, first = blockIdx.y * N, all = plan.image.by * p.N;
  constexpr bool ahead = N < 64 || (pairs && N < 128);  // else registers are too few for the next pixels
  previous_kernel_done();

  int tile = blockIdx.x;
  const int warp = threadIdx.x / 32, at_once = kBatch * (blockDim.x / 32);
  band.fetch(Start(plan, tile), warp);
  load_filters<N, taps, pairs>(p, plan, memory, first);  // while the first pixels are under way
  load_constants<N>(p, first_of, second_of, first);
  fence_proxy_async();
  while (true) {
    const Start start(plan, tile);
    band.put();
    for (int job = warp + at_once; job < plan.rows * plan.parts.by; job += at_once) {
      band.fetch(start, job);
      band.put();
    }
    __syncthreads();  // the band and, at first, the filters are there

    // ldmatrix.x4: lanes 0-15 address 16 pixels in a step's first unit, lanes 16-31 in its second.
    const int half = lane / 16, own = threadIdx.x / 32 * 16 + lane % 16;
    int in_image = start.before + min(own, all - 1 - start.number);
    const int images = plan.image.of_quotient(in_image);
    in_image -= images * plan.image.by;
    const int y = plan.line.of_quotient(in_image), x = in_image - y * plan.line.by;
    const int row = images * plan.image_rows.by + (y - start.line) * plan.jump_h;
    const char* a_lane = lines + (row * plan.width.by + x * plan.jump_w) * kUnitBytes;
    const int down = plan.down * plan.width.by * kUnitBytes, right = plan.right * kUnitBytes;
    int d[N / 2] = {};
    constexpr int rows = taps == 9 ? 3 : 1;                  // of a filter
    constexpr int together = pairs ? (taps + 1) / 2 : rows;  // steps that are issued at once
    uint32_t a[pairs || rows == 1 ? 1 : 2][together][4];
    if constexpr (pairs) {
#pragma unroll
      for (int step = 0; step < together; ++step) {
        const int low = 2 * step, high = low + 1 < taps ? low + 1 : low;  // the filters of a tap too many are zeros
        const int tap_down = half ? high / 3 : low / 3, tap_right = half ? high % 3 : low % 3;
        ldmatrix_x4(a[0][step], a_lane + tap_down * down + tap_right * right);
      }
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < together; ++step) wgmma_rs_bits<N>(d, a[0][step], memory, step);
      wgmma_commit();
    } else {
      a_lane += half * plan.units * plan.plane_bytes();
#pragma unroll 1
      for (int unit = 0; unit < plan.units; ++unit) {
#pragma unroll
        for (int r = 0; r < rows; ++r) {
          uint32_t(&now)[rows][4] = a[r % 2];
#pragma unroll
          for (int s = 0; s < rows; ++s) ldmatrix_x4(now[s], a_lane + r * down + s * right);
          wgmma_fence();
#pragma unroll
          for (int s = 0; s < rows; ++s) wgmma_rs_bits<N>(d, now[s], memory, unit * taps + r * rows + s);
          wgmma_commit();
          if (r + 1 < rows) wgmma_wait<1>();  // the row before is done: its registers are free
        }
        wgmma_wait<0>();  // all of this unit
        a_lane += plan.plane_bytes();
      }
    }
    // A zero on both sides takes part in nothing; where padding counts every tap does.
    const int down_inside = taps_inside<rows>(y * p.stride_h - p.pad_top, p.dilation_h, p.H);
    const int right_inside = taps_inside<rows>(x * p.stride_w - p.pad_left, p.dilation_w, p.W);
    const int half_of_none = (p.padding_value == 0 ? down_inside * right_inside : taps) * (p.C / 2);
    Pixels pixels;
#pragma unroll
    for (int pixel = 0; pixel < 2; ++pixel) {
      pixels.number[pixel] = start.number + threadIdx.x / 32 * 16 + lane / 4 + pixel * 8;
      pixels.half[pixel] = __shfl_sync(~0u, half_of_none, lane / 4 + pixel * 8);
    }
    tile += gridDim.x;
    if (ahead && tile < plan.tiles) band.fetch(Start(plan, tile), warp);
    wgmma_wait<0>();  // the sums are there
    store<N>(p, d, pixels, all, first, first_of, second_of);
    if (tile >= plan.tiles) break;
    if (!ahead) band.fetch(Start(plan, tile), warp);
    __syncthreads();  // nobody reads the band of the tile before
  }
}

template <int N>
const char* launch_columns(const Problem& p, const HopperPlan& plan, Stream stream) {
  const dim3 grid{static_cast<unsigned>(plan.grid()), static_cast<unsigned>(plan.blocks), 1};
  const dim3 block{static_cast<unsigned>(128 * plan.warpgroups), 1, 1};
  const auto nine = plan.pairs ? binary_conv2d_sm90a<N, 9, true> : binary_conv2d_sm90a<N, 9, false>;
  const auto one = plan.pairs ? binary_conv2d_sm90a<N, 1, true> : binary_conv2d_sm90a<N, 1, false>;
  return launch_clusters(plan.taps == 9 ? nine : one, grid, 1, block, plan.bytes, stream, p, plan);
}

}  // namespace

const char* run_sm90a(const Problem& p, const HopperPlan& plan, Stream stream) {
  switch (plan.columns) {
    case 128:
      return launch_columns<128>(p, plan, stream);
    case 64:
      return launch_columns<64>(p, plan, stream);
    default:
      return launch_columns<32>(p, plan, stream);
  }
}

}  // namespace basisconv::cuda::binary
