// binary_conv2d for sm_90a where a pixel has two units or more: what binary_conv2d_sm90a.cu does, with half the bytes
// of filters, which come as they lie in the packing, by bulk copies, while the products are under way.
//
// For a pixel's signs a, zero where padding counts for nothing, both products are with the same filters:
//
//   v = 2 (popc(a & w) - popc(~a & w)) - S      S: the pixel's sum of signs, 2 popc(a) - C * (taps inside the image)
//
//   filters   in shared memory for as long as the block lives: slabs of two units, each with a barrier of its own, so
//             that the first is in use while the others come. A step is a tap of a slab.
//   band      as there, without complements: they are made in the registers that wgmma reads. The band of the next tile
//             comes while the outputs of this one are stored.
//
// Tests: tests/cuda_on_cpu/test_binary_conv2d_sm90a.py (no GPU), tests/ops/test_binary_conv2d.py.
#include "binary_conv2d_sm90a_store.h"
#include "hopper.h"

namespace basisconv::cuda::binary {
namespace {

// The filters of this block, asked for by all threads; who waits for the barrier of a slab sees it.
template <int N, int taps>
BASISCONV_DEVICE void load_slabs(const Problem& p, const HopperPlan& plan, char* to, uint64_t* landed, int first) {
  constexpr int rows = 65, in_slab = taps * 2;  // rows of a unit in the packing: the last are the ones of its channels
  const char* from = p.filters + first / 64 * p.tile_bytes + first % 64 * kUnitBytes;
  const int warps = blockDim.x / 32;
  // Units that follow each other are different warps'.
  for (int unit = threadIdx.x % 32 * warps + threadIdx.x / 32; unit < plan.slabs * in_slab; unit += blockDim.x) {
    bulk_load(to + unit * N * kUnitBytes, from + unit * rows * kUnitBytes, N * kUnitBytes, landed + unit / in_slab);
  }
}

// The band of a tile, asked for by all threads, a row by a warp; padding with ones is stored.
BASISCONV_DEVICE void load_band(const Problem& p, const HopperPlan& plan, char* to, const Start& start) {
  const bool ones = p.padding_value == 1;
  for (int row = threadIdx.x / 32; row < plan.rows; row += blockDim.x / 32) {
    const Line line(p, plan, start, row);
    const bool image = line.inside(p);
    const uint32_t* from = image ? line.pixels(p) : p.input;
    char* place = to + row * plan.width.by * kUnitBytes;
    for (int i = threadIdx.x % 32; i < plan.width.by * plan.units; i += 32) {
      const int column = plan.by_units.of_quotient(i), unit = i - column * plan.units;
      const int x = column * plan.step_w - p.pad_left;
      const bool inside = image && static_cast<unsigned>(x) < static_cast<unsigned>(p.W);
      char* unit_to = place + unit * plan.plane_bytes() + column * kUnitBytes;
      if (ones && !inside) {
        *reinterpret_cast<uint4*>(unit_to) = uint4{~0u, ~0u, ~0u, ~0u};
      } else {
        const int64_t at = inside ? int64_t{x} * p.words + unit * kUnitWords : 0;
        cp_async16(unit_to, from + at, inside ? kUnitBytes : 0);
      }
    }
  }
  cp_async_commit();
}

// The bits of a pixel's word that are channels.
BASISCONV_DEVICE uint32_t channels_of(const Problem& p, int word) {
  const int left = p.C - word * 32;
  return left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1u;
}

// Of a window that begins at (y, x): a bit for each tap, whether it counts.
template <int rows>
BASISCONV_DEVICE uint32_t taps_that_count(const Problem& p, int y, int x) {
  uint32_t right = 0, all = 0;
#pragma unroll
  for (int i = 0; i < rows; ++i) {
    const int column = x + i * p.dilation_w;
    right |= column >= 0 && column < p.W ? 1u << i : 0u;
  }
#pragma unroll
  for (int i = 0; i < rows; ++i) {
    const int row = y + i * p.dilation_h;
    all |= row >= 0 && row < p.H ? right << i * rows : 0u;
  }
  return p.padding_value == 0 ? all : (1u << rows * rows) - 1u;
}

// All ones where bit i is set, else zero.
BASISCONV_DEVICE uint32_t spread(uint32_t bits, int i) {
  return static_cast<uint32_t>(static_cast<int>(bits << (31 - i)) >> 31);
}

template <int N, int taps>
__global__ void __launch_bounds__(128 * HopperPlan::most_with_slabs(N), 1)
    binary_conv2d_sm90a_slabs(const __grid_constant__ Problem p, const __grid_constant__ HopperPlan plan) {
  char* memory = shared_memory();
  char* lines = memory + plan.filter_bytes();
  uint32_t* first_of = reinterpret_cast<uint32_t*>(memory + plan.constants_offset());
  uint32_t* second_of = first_of + N;
  uint64_t* landed = reinterpret_cast<uint64_t*>(second_of + N);  // a slab each
  const int lane = threadIdx.x % 32, first = blockIdx.y * N, all = plan.image.by * p.N;
  if (threadIdx.x == 0) {
    for (int slab = 0; slab < plan.slabs; ++slab) bar_init(landed + slab, 1);
    bar_init_fence();
    for (int slab = 0; slab < plan.slabs; ++slab) bar_arrive_expect(landed + slab, plan.filter_bytes() / plan.slabs);
  }
  __syncthreads();  // the barriers are there
  previous_kernel_done();
  load_slabs<N, taps>(p, plan, memory, landed, first);

  int tile = blockIdx.x;
  load_band(p, plan, lines, Start(plan, tile));
  load_constants<N>(p, first_of, second_of, first);
  while (true) {
    const Start start(plan, tile);
    cp_async_wait<0>();
    __syncthreads();  // the band is there

    // ldmatrix.x4: lanes 0-15 address 16 pixels in a slab's first unit, lanes 16-31 in its second.
    const int own = threadIdx.x / 32 * 16 + lane % 16;
    int in_image = start.before + min(own, all - 1 - start.number);
    const int images = plan.image.of_quotient(in_image);
    in_image -= images * plan.image.by;
    const int y = plan.line.of_quotient(in_image), x = in_image - y * plan.line.by;
    const int row = images * plan.image_rows.by + (y - start.line) * plan.jump_h;
    const char* a_lane = lines + lane / 16 * plan.plane_bytes() + (row * plan.width.by + x * plan.jump_w) * kUnitBytes;
    const int down = plan.down * plan.width.by * kUnitBytes, right = plan.right * kUnitBytes;
    constexpr int rows = taps == 9 ? 3 : 1;  // of a filter
    const uint32_t own_taps = taps_that_count<rows>(p, y * p.stride_h - p.pad_top, x * p.stride_w - p.pad_left);
    uint32_t inside[2];  // of the pixels that this lane has in A and in the sums
#pragma unroll
    for (int pixel = 0; pixel < 2; ++pixel) inside[pixel] = __shfl_sync(~0u, own_taps, lane / 4 + pixel * 8);

    int with_signs[N / 2] = {}, with_complements[N / 2] = {}, ones[2] = {};
    constexpr int turns = rows == 1 ? 1 : 2;
    uint32_t a[turns][rows][4], not_a[turns][rows][4];
#pragma unroll 1
    for (int slab = 0; slab < plan.slabs; ++slab) {
      if (slab > 0) wgmma_wait<0>();  // all of the slab before
      const uint32_t real[2] = {channels_of(p, slab * 8 + lane % 4), channels_of(p, slab * 8 + 4 + lane % 4)};
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        if (r > 1) wgmma_wait<1>();  // the row before the last is done: its registers are free
        uint32_t(&now)[rows][4] = a[r % 2], (&other)[rows][4] = not_a[r % 2];
#pragma unroll
        for (int s = 0; s < rows; ++s) ldmatrix_x4(now[s], a_lane + r * down + s * right);
#pragma unroll
        for (int s = 0; s < rows; ++s) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            other[s][i] = ~now[s][i] & spread(inside[i % 2], r * rows + s);
            ones[i % 2] += __popc(now[s][i] & real[i / 2]);
          }
        }
        if (r == 0) bar_wait(landed + slab, 0);
        wgmma_operands(now);
        wgmma_operands(other);
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < rows; ++s) {
          const int step = slab * taps + r * rows + s;
          wgmma_rs_bits<N, true>(with_signs, now[s], memory, step);
          wgmma_rs_bits<N, true>(with_complements, other[s], memory, step);
        }
        wgmma_commit();
      }
      a_lane += 2 * plan.plane_bytes();
    }
    Pixels pixels;
#pragma unroll
    for (int pixel = 0; pixel < 2; ++pixel) {
      pixels.number[pixel] = start.number + threadIdx.x / 32 * 16 + lane / 4 + pixel * 8;
      ones[pixel] += __shfl_xor_sync(~0u, ones[pixel], 1);
      ones[pixel] += __shfl_xor_sync(~0u, ones[pixel], 2);
      pixels.half[pixel] = ones[pixel] - __popc(inside[pixel]) * (p.C / 2);
    }
    tile += gridDim.x;
    if (tile < plan.tiles) {
      __syncthreads();  // nobody reads the band
      load_band(p, plan, lines, Start(plan, tile));
    }
    wgmma_wait<0>();  // the sums are there
#pragma unroll
    for (int i = 0; i < N / 2; ++i) with_signs[i] -= with_complements[i];
    store<N>(p, with_signs, pixels, all, first, first_of, second_of);
    if (tile >= plan.tiles) break;
  }
}

template <int N>
const char* launch_slabs(const Problem& p, const HopperPlan& plan, Stream stream) {
  const dim3 grid{static_cast<unsigned>(plan.grid()), static_cast<unsigned>(plan.blocks), 1};
  const dim3 block{static_cast<unsigned>(128 * plan.warpgroups), 1, 1};
  const auto nine = binary_conv2d_sm90a_slabs<N, 9>, one = binary_conv2d_sm90a_slabs<N, 1>;
  return launch_clusters(plan.taps == 9 ? nine : one, grid, 1, block, plan.bytes, stream, p, plan);
}

}  // namespace

const char* run_sm90a_slabs(const Problem& p, const HopperPlan& plan, Stream stream) {
  switch (plan.columns) {
    case 64:
      return launch_slabs<64>(p, plan, stream);
    default:
      return launch_slabs<32>(p, plan, stream);
  }
}

}  // namespace basisconv::cuda::binary
