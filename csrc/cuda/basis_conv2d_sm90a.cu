// basis_conv2d for sm_90a: halo tiles by tensor map, wgmma with A from registers. bfloat16 and float16, channels_last
// with C a multiple of 8, one group, at most 256 basis filters; cuda_variant gives everything else to sm_80's kernel.
//
// A persistent block makes tiles with all Q and K. One warp issues copies, two warpgroups compute: each its half of
// 16x8 pixels, or, where that leaves multiprocessors idle, both the same 8x8 pixels with half of the filters each. Of
// such a tile the blocks of a cluster may have some slabs and some outputs each.
//   halo     a tensor map brings each input pixel of a slab of 64 channels once; zeros outside the image are its
//            padding. A swizzled operand of wgmma cannot be addressed one pixel further, ldmatrix can: A comes from
//            registers.
//   basis    stays in shared memory where it fits, else each tap's tile comes through a ring of four.
//   stage 1  for each tap four ldmatrix.x4 fill one set of A registers while wgmma still reads the other.
//   between  the accumulators, rounded and packed in pairs, are the A registers of the second wgmma: Z never leaves
//            them. Only where filters are shared out the warps with the same pixels show each other their parts, and
//            those of a cluster add up their sums before they round.
//   stage 2  64 outputs at a time, or 32 a warpgroup, then the epilogue of basis_conv2d_epilogue.h.
// Rings are pairs of mbarriers, "full" and "empty". A thread that computes never waits for a whole block.
//
// Tests: tests/cuda_on_cpu/test_basis_conv2d.py (no GPU), tests/ops/test_basis_conv2d.py.
#include "basis_conv2d_sm90a.h"
#include "hopper.h"

namespace basisconv::cuda {
namespace {

// A place in a ring and the parity of the phase in which it is full. What is resident is one place, full for good.
struct Place {
  int stages, stage = 0, phase = 0;

  BASISCONV_DEVICE explicit Place(int stages) : stages(stages) {}
  BASISCONV_DEVICE void next() {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
};

struct Bars {
  uint64_t *full, *empty;

  BASISCONV_DEVICE Bars(uint64_t* first, int ring)
      : full(first + 2 * ring * HopperPlan::most_stages), empty(full + HopperPlan::most_stages) {}
};

// Where the tile of a number begins, in the output.
struct Tile {
  int n, y, x;

  BASISCONV_DEVICE Tile(const Problem& p, int tile_y, int number) {
    const int across = (p.OW + HopperPlan::tile_x - 1) / HopperPlan::tile_x;
    const int down = (p.OH + tile_y - 1) / tile_y;
    n = number / across / down;
    y = number / across % down * tile_y;
    x = number % across * HopperPlan::tile_x;
  }
};

// What of `count` slabs or chunks is for the block of this rank in its cluster.
struct Part {
  int begin, end;

  BASISCONV_DEVICE Part(int count, int blocks) {
    const int each = (count + blocks - 1) / blocks, rank = static_cast<int>(blockIdx.x) % blocks;
    begin = min(rank * each, count);
    end = min(begin + each, count);
  }
  BASISCONV_DEVICE int count() const { return end - begin; }
};

// One thread: all copies of this block, in the order in which they are needed.
BASISCONV_DEVICE void issue_copies(const Problem& p, const HopperPlan& plan, const TensorMap& image, int tiles,
                                   uint64_t* bars) {
  const Part slabs(p.slabs, plan.blocks), chunks(p.chunks, plan.blocks);
  const Bars halo(bars, 0), basis(bars, 1), mixing(bars, 2);
  char* memory = shared_memory();
  char* basis_memory = memory + plan.basis_offset();
  char* mixing_memory = memory + plan.mixing_offset();
  Place halo_at(plan.halo_stages), basis_at(plan.basis_stages), mixing_at(plan.mixing_stages);
  const char* own_basis = p.basis + static_cast<int64_t>(slabs.begin) * p.taps * plan.basis_tile();
  const char* own_mixing = p.mixing + static_cast<int64_t>(chunks.begin) * plan.mixing_tile();
  if (plan.basis_resident && slabs.count() > 0) {
    const int bytes = slabs.count() * p.taps * plan.basis_tile();
    bar_arrive_expect(basis.full, bytes);
    bulk_load(basis_memory, own_basis, bytes, basis.full);
  }
  if (plan.mixing_resident && chunks.count() > 0) {
    const int bytes = chunks.count() * plan.mixing_tile();
    bar_arrive_expect(mixing.full, bytes);
    bulk_load(mixing_memory, own_mixing, bytes, mixing.full);
  }
  for (int number = blockIdx.x / plan.blocks; number < tiles; number += gridDim.x / plan.blocks) {
    const Tile tile(p, plan.tile_y(), number);
    for (int slab = 0; slab < slabs.count(); ++slab) {
      bar_wait(halo.empty + halo_at.stage, halo_at.phase ^ 1);
      bar_arrive_expect(halo.full + halo_at.stage, plan.halo_box_bytes);
      tensor_load(memory + halo_at.stage * plan.halo_bytes, image, (slabs.begin + slab) * kSlab,
                  tile.x * p.stride_w - p.pad_left, tile.y * p.stride_h - p.pad_top, tile.n, halo.full + halo_at.stage);
      halo_at.next();
      for (int tap = 0; !plan.basis_resident && tap < p.taps; ++tap) {
        bar_wait(basis.empty + basis_at.stage, basis_at.phase ^ 1);
        bar_arrive_expect(basis.full + basis_at.stage, plan.basis_tile());
        bulk_load(basis_memory + basis_at.stage * plan.basis_tile(),
                  own_basis + (static_cast<int64_t>(slab) * p.taps + tap) * plan.basis_tile(), plan.basis_tile(),
                  basis.full + basis_at.stage);
        basis_at.next();
      }
    }
    for (int chunk = 0; !plan.mixing_resident && chunk < chunks.count(); ++chunk) {
      bar_wait(mixing.empty + mixing_at.stage, mixing_at.phase ^ 1);
      bar_arrive_expect(mixing.full + mixing_at.stage, plan.mixing_tile());
      bulk_load(mixing_memory + mixing_at.stage * plan.mixing_tile(),
                own_mixing + static_cast<int64_t>(chunk) * plan.mixing_tile(), plan.mixing_tile(),
                mixing.full + mixing_at.stage);
      mixing_at.next();
    }
  }
}

// A warp is done with a place, or with what it wrote: the last one that is lets the others go on.
BASISCONV_DEVICE void release(uint64_t* bar) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) bar_arrive(bar);
}

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
  char *sums, *fragments;
  int phase = 0;

  BASISCONV_DEVICE Exchange(const HopperPlan& plan, uint64_t* bars, char* memory, int warp) {
    const int pair = warp % HopperPlan::pairs;
    summed = bars + 2 * HopperPlan::rings * HopperPlan::most_stages + pair;
    shown = summed + HopperPlan::pairs;
    sums = memory + plan.sums_offset() + warp * steps * 2 * step_bytes;
    fragments = memory + plan.fragments_offset() + pair * 2 * steps * step_bytes;
  }

  // `first` is the first filter of this warp.
  template <class T>
  BASISCONV_DEVICE void turn(const Problem& p, const HopperPlan& plan, const Pixels& pixels, int first,
                             float (&z)[filters / 2], uint32_t (&a)[2 * steps][4]) {
    const int lane = threadIdx.x % 32, rank = static_cast<int>(blockIdx.x) % plan.blocks;
    char* mine = fragments + first / 16 * step_bytes + lane * 16;
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

template <class T, int Q16, bool shared_out>
__global__ void __launch_bounds__(HopperPlan::threads, 1)
    basis_conv2d_sm90a(const __grid_constant__ Problem p, const __grid_constant__ TensorMap image,
                       const HopperPlan plan, const int tiles) {
  constexpr int width = mixing_width(Q16);
  constexpr int filters = shared_out ? Q16 / 2 : Q16;                                // of a warpgroup
  constexpr int n = filters < 128 ? filters : 128;                                   // of a wgmma
  constexpr int outputs = shared_out ? kChunk / 2 : kChunk;                          // of a warpgroup, at a time
  [[maybe_unused]] constexpr int chunks_together = shared_out && Q16 == 64 ? 2 : 1;  // else ptxas serialises wgmma
  char* memory = shared_memory();
  uint64_t* bars = reinterpret_cast<uint64_t*>(memory + plan.bars_offset());
  const Bars halo(bars, 0), basis(bars, 1), mixing(bars, 2);
  if (threadIdx.x == 0) {
    for (int i = 0; i < HopperPlan::most_stages; ++i) {
      for (const Bars& ring : {halo, basis, mixing}) {
        bar_init(ring.full + i, 1);
        bar_init(ring.empty + i, HopperPlan::consumers / 32);
      }
    }
    uint64_t* of_pairs = bars + 2 * HopperPlan::rings * HopperPlan::most_stages;
    for (int i = 0; i < 2 * HopperPlan::pairs; ++i) bar_init(of_pairs + i, 2 * plan.blocks);
    bar_init_fence();
  }
  if (plan.blocks > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  if (threadIdx.x >= HopperPlan::consumers) {
    keep_registers<HopperPlan::registers_to_copy>();
    if (threadIdx.x == HopperPlan::consumers) issue_copies(p, plan, image, tiles, bars);
    return;
  }
  take_registers<HopperPlan::registers_to_compute>();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int share = shared_out ? warp / 4 : 0, row = (shared_out ? warp % 4 : warp) * 2;
  const char* bases = memory + plan.basis_offset() + share * filters * kSlab * 2;
  const char* mixings = memory + plan.mixing_offset() + share * outputs * width * 2;
  char* staging = memory + plan.staging_offset() + warp * kStagingBytes;
  Exchange<filters> exchange(plan, bars, memory, warp);
  const Part slabs(p.slabs, plan.blocks), chunks(p.chunks, plan.blocks);
  const float start = poison(p);
  // ldmatrix.x4: lanes 0-15 address 16 pixels' channels 0-7 of a k16 step, lanes 16-31 channels 8-15.
  const int own_pixel = (row + lane % 16 / kTileX) * p.stride_h * plan.columns + lane % kTileX * p.stride_w;
  Place halo_at(plan.halo_stages), basis_at(plan.basis_stages), mixing_at(plan.mixing_stages);
  if (plan.basis_resident && slabs.count() > 0) bar_wait(basis.full, 0);

  for (int number = blockIdx.x / plan.blocks; number < tiles; number += gridDim.x / plan.blocks) {
    const Tile tile(p, plan.tile_y(), number);
    const Pixels pixels{tile.n, tile.y + row, tile.x};

    // Stage 1.
    float z[filters / n][n / 2];
#pragma unroll
    for (int i = 0; i < filters / 2; ++i) z[i / (n / 2)][i % (n / 2)] = start;
    uint32_t a_even[4][4], a_odd[4][4];
    int r = 0, s = 0, previous = -1;  // the place in the basis ring of the wgmma that is still under way
    auto tap = [&](uint32_t(&a)[4][4]) {
      if (r == 0 && s == 0) bar_wait(halo.full + halo_at.stage, halo_at.phase);
      const uint32_t pixel = own_pixel + r * p.dilation_h * plan.columns + s * p.dilation_w;
      const uint32_t from = swizzled(pixel * kSlab * 2 + lane / 16 * 16, kSlab * 2);
      const char* tile_at = memory + halo_at.stage * plan.halo_bytes;
#pragma unroll
      for (int k = 0; k < 4; ++k) ldmatrix_x4(a[k], tile_at + (from ^ static_cast<uint32_t>(k * 32)));
      if (!plan.basis_resident) bar_wait(basis.full + basis_at.stage, basis_at.phase);
      wgmma_operands(a);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int i = 0; i < filters / n; ++i) {
          wgmma_rs<T, n, kSlab * 2>(z[i], a[k], bases + basis_at.stage * Q16 * kSlab * 2 + i * n * kSlab * 2, k);
        }
      }
      wgmma_commit();
      wgmma_wait<1>();  // the tap before is done: its registers and its place are free
      if (!plan.basis_resident && previous >= 0) release(basis.empty + previous);
      previous = basis_at.stage;
      basis_at.next();
      if (++s == p.S) s = 0, ++r;
      if (r == p.R) {
        r = 0;
        release(halo.empty + halo_at.stage);
        halo_at.next();
      }
    };
    const int steps = p.taps * slabs.count();
#pragma unroll 1
    for (int step = 0; step < steps; step += 2) {
      tap(a_even);
      if (step + 1 < steps) tap(a_odd);
    }
    wgmma_wait<0>();
    if (!plan.basis_resident && previous >= 0) release(basis.empty + previous);

    // Between the stages.
    uint32_t a[Q16 / 16][4];
    if constexpr (shared_out) {
      exchange.template turn<T>(p, plan, pixels, share * filters, z[0], a);
    } else {
#pragma unroll
      for (int q = 0; q < Q16 / 16; ++q) finish_maps<T>(p, z[q / (n / 16)] + q % (n / 16) * 8, pixels, q * 16, a[q]);
    }

    // Stage 2.
#pragma unroll chunks_together
    for (int chunk = chunks.begin; chunk < chunks.end; ++chunk) {
      const int first = chunk * kChunk + share * outputs;
      BiasPairs<outputs> bias;
      bias.template load<T>(p, first);
      if (plan.mixing_resident) {
        bar_wait(mixing.full, 0);
      } else {
        bar_wait(mixing.full + mixing_at.stage, mixing_at.phase);
      }
      const char* coefficients = mixings + mixing_at.stage * plan.mixing_tile();
      float y[outputs / 2] = {};
      wgmma_operands(a);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < Q16 / 16; ++i) {
        constexpr int steps_a_tile = width / 16;
        const char* side = coefficients + i / steps_a_tile * kChunk * width * 2;
        wgmma_rs<T, outputs, width * 2>(y, a[i], side, i % steps_a_tile);
      }
      wgmma_commit();
      wgmma_wait<0>();
      if (!plan.mixing_resident) release(mixing.empty + mixing_at.stage);
      mixing_at.next();
      if (first < p.K) store_outputs<T, outputs>(p, y, bias, staging, pixels, first);
    }
  }
}

template <class T, int Q16, bool shared_out>
const char* launch_sm90a(const Problem& p, const HopperPlan& plan, const TensorMap& image, const CudaDevice& device,
                         Stream stream) {
  const int64_t tiles = hopper_tiles(p, plan);
  if (tiles > 0x3FFFFFFF) return "more than 2^30 tiles; split the batch";
  const dim3 grid{static_cast<unsigned>(hopper_grid(p, plan, device)), 1, 1}, block{HopperPlan::threads, 1, 1};
  return launch_clusters(basis_conv2d_sm90a<T, Q16, shared_out>, grid, plan.blocks, block, plan.bytes, stream, p, image,
                         plan, static_cast<int>(tiles));
}

template <class T>
const char* launch_filters(const Problem& p, const HopperPlan& plan, const TensorMap& image, const CudaDevice& device,
                           Stream stream) {
  const auto launch_of = [&](auto kernel, auto kernel_shared_out) {
    return (plan.shared_out ? kernel_shared_out : kernel)(p, plan, image, device, stream);
  };
  switch (plan.Q16) {
    case 16:
      return launch_sm90a<T, 16, false>(p, plan, image, device, stream);
    case 32:
      return launch_of(launch_sm90a<T, 32, false>, launch_sm90a<T, 32, true>);
    case 64:
      return launch_of(launch_sm90a<T, 64, false>, launch_sm90a<T, 64, true>);
    case 128:
      return launch_of(launch_sm90a<T, 128, false>, launch_sm90a<T, 128, true>);
    default:
      return launch_of(launch_sm90a<T, 256, false>, launch_sm90a<T, 256, true>);
  }
}

}  // namespace
}  // namespace basisconv::cuda

namespace basisconv {

const char* cuda_basis_conv2d_sm90a(const CudaBasisConv2d& call, const CudaDevice& device, void* stream) {
  using namespace cuda;
  const Problem p = problem_of(call);
  const HopperPlan plan = hopper_plan(p, device);
  if (plan.bytes == 0) return "the halo tile does not fit into shared memory";
  const bool is_bf16 = call.params.weights.dtype == DType::bf16;
  TensorMap image;
  const TensorMapRequest request =
      image_map(p.input, is_bf16, p.N, p.H, p.W, p.C, p.in.n, p.in.h, p.in.w, plan.rows, plan.columns);
  if (const char* wrong = encode(request, image)) return wrong;
  const auto on = static_cast<Stream>(stream);
  return is_bf16 ? launch_filters<bf16>(p, plan, image, device, on) : launch_filters<f16>(p, plan, image, device, on);
}

}  // namespace basisconv
