// ternary_conv2d for sm_90a: halo tiles by tensor map, wgmma with A from registers, filters of -2, 0 and +2.
//
// A persistent block makes tiles of pixels with one part of the filters. One warp issues copies, two warpgroups
// compute: each its half of 16x8 pixels, or both the same 8x8 pixels with half of the filters each.
//   halo     a tensor map brings each input pixel of a slab of 64 channels once; zeros outside the image are its
//            padding. ldmatrix makes the A registers of each tap of it.
//   filters  stay in shared memory where they fit, else each tap's tile comes through a ring of up to eight.
//   sums     for each tap four ldmatrix.x4 fill one set of A registers while wgmma still reads another.
//   outputs  scale and bias wait in shared memory; the store is that of basis_conv2d_epilogue.h.
// It is the first stage of basis_conv2d's kernel for this architecture, whose header says more.
//
// Tests: tests/cuda_on_cpu/test_ternary_conv2d.py (no GPU), tests/gpu/test_ternary_kernels.py.
#include "rings.h"
#include "ternary_conv2d_problem.h"

namespace basisconv::cuda {
namespace {

// The tile of a tap and slab, all filters of the part: 64 of them lie together, those of the next 64 far off.
BASISCONV_DEVICE void load_filters(const Problem& p, const TernaryPlan& plan, int part, int64_t tile, char* to,
                                   uint64_t* full) {
  const int pieces = plan.filters() / kTernaryRows, first = part * pieces;
  const int there = min(pieces, (p.K + kTernaryRows - 1) / kTernaryRows - first);
  for (int i = 0; i < there; ++i) {
    const int64_t of_block = (static_cast<int64_t>(first) + i) * p.slabs * p.taps + tile;
    bulk_load(to + i * kTernaryTileBytes, p.basis + of_block * kTernaryTileBytes, kTernaryTileBytes, full);
  }
}
BASISCONV_DEVICE int filter_bytes(const Problem& p, const TernaryPlan& plan, int part) {
  const int pieces = plan.filters() / kTernaryRows;
  return min(pieces, (p.K + kTernaryRows - 1) / kTernaryRows - part * pieces) * kTernaryTileBytes;
}

// One thread: all copies of this block, in the order in which they are needed.
BASISCONV_DEVICE void issue_copies(const Problem& p, const TernaryPlan& plan, const TensorMap& image, int tiles,
                                   uint64_t* bars) {
  const Bars halo(bars, 0), filters(bars, 1);
  char* memory = shared_memory();
  const int part = blockIdx.x % plan.parts, bytes = filter_bytes(p, plan, part);
  Place halo_at(plan.halo_stages), filters_at(plan.filter_stages);
  auto load_halo = [&](const Tile& tile, int slab) {
    bar_wait(halo.empty + halo_at.stage, halo_at.phase ^ 1);
    bar_arrive_expect(halo.full + halo_at.stage, plan.halo_box_bytes);
    tensor_load(memory + halo_at.stage * plan.halo_bytes, image, slab * kSlab, tile.x * p.stride_w - p.pad_left,
                tile.y * p.stride_h - p.pad_top, tile.n, halo.full + halo_at.stage);
    halo_at.next();
  };
  if (plan.resident) {
    bar_arrive_expect(filters.full, p.slabs * p.taps * bytes);
    for (int tile = 0; tile < p.slabs * p.taps; ++tile) {
      load_filters(p, plan, part, tile, memory + plan.filter_offset() + tile * plan.filter_tile(), filters.full);
    }
  }
  for (int number = blockIdx.x / plan.parts; number < tiles; number += gridDim.x / plan.parts) {
    const Tile tile(p, plan.tile_y(), number);
    for (int slab = 0; slab < p.slabs; ++slab) {
      load_halo(tile, slab);
      for (int tap = 0; !plan.resident && tap < p.taps; ++tap) {
        uint64_t* full = filters.full + filters_at.stage;
        bar_wait(filters.empty + filters_at.stage, filters_at.phase ^ 1);
        bar_arrive_expect(full, bytes);
        load_filters(p, plan, part, static_cast<int64_t>(slab) * p.taps + tap,
                     memory + plan.filter_offset() + filters_at.stage * plan.filter_tile(), full);
        filters_at.next();
      }
    }
  }
}

// `columns` filters has a warpgroup. `taps` is 9, or 0 for whatever number; with 9 the loop over them lies open and
// addresses are found once.
template <class T, int columns, bool split_filters, int taps>
__global__ void __launch_bounds__(TernaryPlan::threads, 1)
    ternary_conv2d_sm90a(const __grid_constant__ TernaryProblem s, const __grid_constant__ TensorMap image,
                         const TernaryPlan plan, const int tiles) {
  const Problem& p = s.problem;
  char* memory = shared_memory();
  uint64_t* bars = reinterpret_cast<uint64_t*>(memory + plan.bars_offset());
  float2* factors = reinterpret_cast<float2*>(memory + plan.factors_offset());  // scale and bias of each filter
  const Bars halo(bars, 0), filters(bars, 1);
  if (threadIdx.x == 0) {
    for (int i = 0; i < TernaryPlan::most_stages; ++i) {
      for (const Bars& ring : {halo, filters}) {
        bar_init(ring.full + i, 1);
        bar_init(ring.empty + i, TernaryPlan::consumers / 32);
      }
    }
    bar_init_fence();
  }
  previous_kernel_done();
  const int first = static_cast<int>(blockIdx.x) % plan.parts * plan.filters();
  for (int i = threadIdx.x; i < plan.filters(); i += TernaryPlan::threads) {
    const bool some = first + i < p.K;
    factors[i] = float2{some ? 0.5f * s.scale.template at<T>(first + i, 1.0f) : 0.0f,  // of the double sum
                        some ? s.bias.template at<T>(first + i, 0.0f) : 0.0f};
  }
  __syncthreads();
  if (threadIdx.x >= TernaryPlan::consumers) {
    keep_registers<40>();
    if (threadIdx.x == TernaryPlan::consumers) issue_copies(p, plan, image, tiles, bars);
    return;
  }
  take_registers<232>();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int share = split_filters ? warp / 4 * columns : 0, row = (split_filters ? warp % 4 : warp) * 2;
  const char* tiles_at = memory + plan.filter_offset() + share * kSlab * 2;
  char* staging = memory + plan.staging_offset() + warp * kStagingBytes;
  const float start = poison(p);
  // ldmatrix.x4: lanes 0-15 address 16 pixels' channels 0-7 of a k16 step, lanes 16-31 channels 8-15.
  const int own_pixel = (row + lane % 16 / kTileX) * p.stride_h * plan.columns + lane % kTileX * p.stride_w;
  auto from_tap = [&](int r, int s) {
    const uint32_t pixel = own_pixel + r * p.dilation_h * plan.columns + s * p.dilation_w;
    return swizzled(pixel * kSlab * 2 + lane / 16 * 16, kSlab * 2);
  };
  [[maybe_unused]] uint32_t from_of[taps == 9 ? 9 : 1];
  if constexpr (taps == 9) {
#pragma unroll
    for (int tap = 0; tap < taps; ++tap) from_of[tap] = from_tap(tap / 3, tap % 3);
  }
  Place halo_at(plan.halo_stages), filters_at(plan.filter_stages);
  if (plan.resident) bar_wait(filters.full, 0);

  for (int number = blockIdx.x / plan.parts; number < tiles; number += gridDim.x / plan.parts) {
    const Tile tile(p, plan.tile_y(), number);
    float sums[columns / 2];
#pragma unroll
    for (int i = 0; i < columns / 2; ++i) sums[i] = start;
    uint32_t fragments[3][4][4];  // of the tap that wgmma reads, the one before, the one after
    int previous = -1;            // the place in the ring of the wgmma that is still under way
    auto load = [&](uint32_t(&a)[4][4], uint32_t from) {
#pragma unroll
      for (int k = 0; k < 4; ++k) ldmatrix_x4(a[k], memory + (from ^ static_cast<uint32_t>(k * 32)));
    };
    auto multiply = [&](const uint32_t(&a)[4][4]) {
      if (!plan.resident) bar_wait(filters.full + filters_at.stage, filters_at.phase);
      const char* tile_at = tiles_at + filters_at.stage * plan.filter_tile();
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) wgmma_rs<T, columns, kSlab * 2>(sums, a[k], tile_at, k);
      wgmma_commit();
      wgmma_wait<1>();  // the tap before is done: its registers and its place are free
      if (!plan.resident && previous >= 0) release(filters.empty + previous);
      previous = filters_at.stage;
      filters_at.next();
    };
    if constexpr (taps == 9) {
#pragma unroll 1
      for (int slab = 0; slab < p.slabs; ++slab) {
        bar_wait(halo.full + halo_at.stage, halo_at.phase);
        const uint32_t tile_at = halo_at.stage * plan.halo_bytes;  // a multiple of 1024: no swizzle knows it
        load(fragments[0], tile_at + from_of[0]);
#pragma unroll
        for (int tap = 0; tap < taps; ++tap) {
          if (tap + 1 < taps) load(fragments[(tap + 1) % 3], tile_at + from_of[tap + 1]);
          multiply(fragments[tap % 3]);
        }
        release(halo.empty + halo_at.stage);
        halo_at.next();
      }
    } else {
      int r = 0, s = 0;
      auto tap = [&](uint32_t(&a)[4][4]) {
        if (r == 0 && s == 0) bar_wait(halo.full + halo_at.stage, halo_at.phase);
        load(a, halo_at.stage * plan.halo_bytes + from_tap(r, s));
        multiply(a);
        if (++s == p.S) s = 0, ++r;
        if (r == p.R) {
          r = 0;
          release(halo.empty + halo_at.stage);
          halo_at.next();
        }
      };
      const int steps = p.taps * p.slabs;
#pragma unroll 1
      for (int step = 1; step < steps; step += 2) {
        tap(fragments[0]);
        tap(fragments[1]);
      }
      if (steps % 2 != 0) tap(fragments[0]);
    }
    wgmma_wait<0>();
    if (!plan.resident && previous >= 0) release(filters.empty + previous);

    const Pixels pixels{tile.n, tile.y + row, tile.x};
#pragma unroll
    for (int piece = 0; piece < columns / 64; ++piece) {
      const int column = share + piece * 64;
      if (first + column >= p.K) break;
      float y[32];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float4 pair = *reinterpret_cast<const float4*>(factors + column + j * 8 + lane % 4 * 2);
        const float* from = sums + piece * 32 + j * 4;
        y[j * 4] = from[0] * pair.x + pair.y, y[j * 4 + 1] = from[1] * pair.z + pair.w;
        y[j * 4 + 2] = from[2] * pair.x + pair.y, y[j * 4 + 3] = from[3] * pair.z + pair.w;
      }
      store_outputs<T, 64>(p, y, BiasPairs<64>{}, staging, pixels, first + column);
    }
  }
}

template <class T>
const char* launch_of(const TernaryProblem& s, const TernaryPlan& plan, const TensorMap& image,
                      const CudaDevice& device, Stream stream) {
  const int64_t tiles = ternary_tiles(s.problem, plan);
  if (tiles > 0x3FFFFFFF) return "more than 2^30 tiles; split the batch";
  const dim3 grid{static_cast<unsigned>(ternary_grid(s.problem, plan, device)), 1, 1},
      block{TernaryPlan::threads, 1, 1};
  const bool nine = s.problem.R == 3 && s.problem.S == 3;
  const auto kernel = [&] {
    if (plan.columns_each == 64) {
      if (plan.split_filters) return nine ? ternary_conv2d_sm90a<T, 64, true, 9> : ternary_conv2d_sm90a<T, 64, true, 0>;
      return nine ? ternary_conv2d_sm90a<T, 64, false, 9> : ternary_conv2d_sm90a<T, 64, false, 0>;
    }
    if (plan.split_filters) return nine ? ternary_conv2d_sm90a<T, 128, true, 9> : ternary_conv2d_sm90a<T, 128, true, 0>;
    return nine ? ternary_conv2d_sm90a<T, 128, false, 9> : ternary_conv2d_sm90a<T, 128, false, 0>;
  }();
  return launch_clusters(kernel, grid, 1, block, plan.bytes, stream, s, image, plan, static_cast<int>(tiles));
}

}  // namespace

const char* ternary_conv2d_on_hopper(const TernaryProblem& s, DType dtype, const TernaryPlan& plan,
                                     const CudaDevice& device, Stream stream) {
  const Problem& p = s.problem;
  const bool is_bf16 = dtype == DType::bf16;
  TensorMap image;
  const TensorMapRequest request =
      image_map(p.input, is_bf16, p.N, p.H, p.W, p.C, p.in.n, p.in.h, p.in.w, plan.rows, plan.columns);
  if (const char* wrong = encode(request, image)) return wrong;
  return is_bf16 ? launch_of<bf16>(s, plan, image, device, stream) : launch_of<f16>(s, plan, image, device, stream);
}

}  // namespace basisconv::cuda
