// basis_conv2d for sm_90a: halo tiles by tensor map, wgmma with A from registers. bfloat16 and float16, channels_last
// with C a multiple of 8, one group, at most 128 basis filters; cuda_variant gives everything else to sm_80's kernel.
//
// A persistent block makes tiles of 16x8 pixels, with all Q and K. One warp issues copies, two warpgroups compute:
//   halo     a tensor map brings each input pixel of a slab of 64 channels once; zeros outside the image are its
//   padding.
//            A swizzled operand of wgmma cannot be addressed one pixel further, ldmatrix can: A comes from registers.
//   basis    stays in shared memory where it fits, else each tap's tile comes through a ring of four.
//   stage 1  for each tap four ldmatrix.x4 fill one set of A registers while wgmma still reads the other.
//   between  the accumulators, rounded and packed in pairs, are the A registers of the second wgmma: Z never leaves
//   them. stage 2  64 outputs at a time, then the epilogue of basis_conv2d_problem.h.
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

  BASISCONV_DEVICE Tile(const Problem& p, int number) {
    const int across = (p.OW + HopperPlan::tile_x - 1) / HopperPlan::tile_x;
    const int down = (p.OH + HopperPlan::tile_y - 1) / HopperPlan::tile_y;
    n = number / across / down;
    y = number / across % down * HopperPlan::tile_y;
    x = number % across * HopperPlan::tile_x;
  }
};

// One thread: all copies of this block, in the order in which they are needed.
BASISCONV_DEVICE void issue_copies(const Problem& p, const HopperPlan& plan, const TensorMap& image, int tiles,
                                   uint64_t* bars) {
  const Bars halo(bars, 0), basis(bars, 1), mixing(bars, 2);
  char* memory = shared_memory();
  char* basis_memory = memory + plan.basis_offset();
  char* mixing_memory = memory + plan.mixing_offset();
  Place halo_at(plan.halo_stages), basis_at(plan.basis_stages), mixing_at(plan.mixing_stages);
  if (plan.basis_resident) {
    const int bytes = plan.basis_stages * plan.basis_tile();
    bar_arrive_expect(basis.full, bytes);
    bulk_load(basis_memory, p.basis, bytes, basis.full);
  }
  if (plan.mixing_resident) {
    const int bytes = plan.mixing_stages * plan.mixing_tile();
    bar_arrive_expect(mixing.full, bytes);
    bulk_load(mixing_memory, p.mixing, bytes, mixing.full);
  }
  for (int number = blockIdx.x; number < tiles; number += gridDim.x) {
    const Tile tile(p, number);
    for (int slab = 0; slab < p.slabs; ++slab) {
      bar_wait(halo.empty + halo_at.stage, halo_at.phase ^ 1);
      bar_arrive_expect(halo.full + halo_at.stage, plan.halo_box_bytes);
      tensor_load(memory + halo_at.stage * plan.halo_bytes, image, slab * kSlab, tile.x * p.stride_w - p.pad_left,
                  tile.y * p.stride_h - p.pad_top, tile.n, halo.full + halo_at.stage);
      halo_at.next();
      for (int tap = 0; !plan.basis_resident && tap < p.taps; ++tap) {
        bar_wait(basis.empty + basis_at.stage, basis_at.phase ^ 1);
        bar_arrive_expect(basis.full + basis_at.stage, plan.basis_tile());
        bulk_load(basis_memory + basis_at.stage * plan.basis_tile(),
                  p.basis + (static_cast<int64_t>(slab) * p.taps + tap) * plan.basis_tile(), plan.basis_tile(),
                  basis.full + basis_at.stage);
        basis_at.next();
      }
    }
    for (int chunk = 0; !plan.mixing_resident && chunk < p.chunks; ++chunk) {
      bar_wait(mixing.empty + mixing_at.stage, mixing_at.phase ^ 1);
      bar_arrive_expect(mixing.full + mixing_at.stage, plan.mixing_tile());
      bulk_load(mixing_memory + mixing_at.stage * plan.mixing_tile(),
                p.mixing + static_cast<int64_t>(chunk) * plan.mixing_tile(), plan.mixing_tile(),
                mixing.full + mixing_at.stage);
      mixing_at.next();
    }
  }
}

// A warp is done with a place: the last of the eight lets the next copy in.
BASISCONV_DEVICE void release(uint64_t* bar) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) bar_arrive(bar);
}

template <class T, int Q16>
__global__ void __launch_bounds__(HopperPlan::threads, 1)
    basis_conv2d_sm90a(const __grid_constant__ Problem p, const __grid_constant__ TensorMap image,
                       const HopperPlan plan, const int tiles) {
  constexpr int width = mixing_width(Q16);
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
    bar_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= HopperPlan::consumers) {
    if (threadIdx.x == HopperPlan::consumers) issue_copies(p, plan, image, tiles, bars);
    return;
  }

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  char* bases = memory + plan.basis_offset();
  char* mixings = memory + plan.mixing_offset();
  char* staging = memory + plan.staging_offset() + warp * kStagingBytes;
  const float offset = poison(p);
  // ldmatrix.x4: lanes 0-15 address 16 pixels' channels 0-7 of a k16 step, lanes 16-31 channels 8-15.
  const int own_pixel = (warp * 2 + lane % 16 / kTileX) * p.stride_h * plan.columns + lane % kTileX * p.stride_w;
  Place halo_at(plan.halo_stages), basis_at(plan.basis_stages), mixing_at(plan.mixing_stages);

  for (int number = blockIdx.x; number < tiles; number += gridDim.x) {
    const Tile tile(p, number);
    const Pixels pixels{tile.n, tile.y + warp * 2, tile.x};

    // Stage 1.
    float z[Q16 / 2] = {};
    uint32_t a_even[4][4], a_odd[4][4];
    int r = 0, s = 0, previous = -1;  // the place in the basis ring of the wgmma that is still under way
    auto tap = [&](uint32_t(&a)[4][4]) {
      if (r == 0 && s == 0) bar_wait(halo.full + halo_at.stage, halo_at.phase);
      const uint32_t pixel = own_pixel + r * p.dilation_h * plan.columns + s * p.dilation_w;
      const uint32_t from = swizzled(pixel * kSlab * 2 + lane / 16 * 16, kSlab * 2);
      const char* tile_at = memory + halo_at.stage * plan.halo_bytes;
#pragma unroll
      for (int k = 0; k < 4; ++k) ldmatrix_x4(a[k], tile_at + (from ^ static_cast<uint32_t>(k * 32)));
      if (plan.basis_resident) {
        bar_wait(basis.full, 0);
      } else {
        bar_wait(basis.full + basis_at.stage, basis_at.phase);
      }
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        wgmma_rs<T, Q16, kSlab * 2>(z, a[k], bases + basis_at.stage * Q16 * kSlab * 2, k);
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
    const int steps = p.taps * p.slabs;
#pragma unroll 1
    for (int step = 0; step < steps; step += 2) {
      tap(a_even);
      if (step + 1 < steps) tap(a_odd);
    }
    wgmma_wait<0>();
    if (!plan.basis_resident) release(basis.empty + previous);

    // Between the stages: z is rounded once. An accumulator's 8 columns: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
    if (p.maps != nullptr) {
#pragma unroll
      for (int q = 0; q < Q16 / 8; ++q) store_maps<T>(p, z + q * 4, pixels, q * 8);
    }
    uint32_t rounded[Q16 / 16][4];
#pragma unroll
    for (int q = 0; q < Q16 / 16; ++q) {
#pragma unroll
      for (int i = 0; i < 4; ++i) rounded[q][i] = round2<T>(z[q * 8 + 2 * i], z[q * 8 + 2 * i + 1]);
    }

    // Stage 2.
#pragma unroll 1
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      if (plan.mixing_resident) {
        bar_wait(mixing.full, 0);
      } else {
        bar_wait(mixing.full + mixing_at.stage, mixing_at.phase);
      }
      const char* coefficients = mixings + mixing_at.stage * plan.mixing_tile();
      float y[kChunk / 2] = {};
      wgmma_fence();
#pragma unroll
      for (int q = 0; q < Q16 / 16; ++q) {
        constexpr int steps_a_tile = width / 16;
        const char* side = coefficients + q / steps_a_tile * kChunk * width * 2;
        wgmma_rs<T, kChunk, width * 2>(y, rounded[q], side, q % steps_a_tile);
      }
      wgmma_commit();
      wgmma_wait<0>();
      if (!plan.mixing_resident) release(mixing.empty + mixing_at.stage);
      mixing_at.next();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (chunk * kChunk + half * kStagedColumns >= p.K) break;
        float part[4][4];
#pragma unroll
        for (int i = 0; i < 16; ++i) part[i / 4][i % 4] = y[half * 16 + i];
        store_outputs<T>(p, part, staging, pixels, chunk * kChunk + half * kStagedColumns, offset);
      }
    }
  }
}

template <class T, int Q16>
const char* launch_sm90a(const Problem& p, const HopperPlan& plan, const TensorMap& image, const CudaDevice& device,
                         Stream stream) {
  const int64_t tiles = int64_t{p.N} * tiles_of(p.OH, HopperPlan::tile_y) * tiles_of(p.OW, HopperPlan::tile_x);
  if (tiles > 0x3FFFFFFF) return "more than 2^30 tiles of 16x8 pixels; split the batch";
  const dim3 grid{static_cast<unsigned>(hopper_blocks(tiles, device)), 1, 1}, block{HopperPlan::threads, 1, 1};
  return launch(basis_conv2d_sm90a<T, Q16>, grid, block, plan.bytes, stream, p, image, plan, static_cast<int>(tiles));
}

template <class T>
const char* launch_filters(const Problem& p, const HopperPlan& plan, const TensorMap& image, const CudaDevice& device,
                           Stream stream) {
  switch (plan.Q16) {
    case 16:
      return launch_sm90a<T, 16>(p, plan, image, device, stream);
    case 32:
      return launch_sm90a<T, 32>(p, plan, image, device, stream);
    case 64:
      return launch_sm90a<T, 64>(p, plan, image, device, stream);
    default:
      return launch_sm90a<T, 128>(p, plan, image, device, stream);
  }
}

}  // namespace
}  // namespace basisconv::cuda

namespace basisconv {

const char* cuda_basis_conv2d_sm90a(const CudaBasisConv2d& call, const CudaDevice& device, void* stream) {
  using namespace cuda;
  const Problem p = problem_of(call);
  const HopperPlan plan = hopper_plan(p, device.shared_bytes);
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
