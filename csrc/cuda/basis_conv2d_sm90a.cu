// basis_conv2d for sm_90a: halo tiles by tensor map, wgmma with A from registers. bfloat16 and float16, channels_last
// with C a multiple of 8, one group, at most 256 basis filters; cuda_variant gives everything else to sm_80's kernel.
//
// A persistent block makes tiles with all Q and K. One warp issues copies, two warpgroups compute: each its half of
// 16x8 pixels; on small maps each 8x8 pixels of its own image; or, where that leaves multiprocessors idle, both the
// same 8x8 pixels with half of the filters each. Of a tile the blocks of a cluster may have some slabs and some outputs
// each.
//   halo     a tensor map brings each input pixel of a slab of 64 channels once; zeros outside the image are its
//            padding. A swizzled operand of wgmma cannot be addressed one pixel further, ldmatrix can: A comes from
//            registers.
//   basis    stays in shared memory where it fits, else each tap's tile comes through a ring of up to eight.
//   stage 1  for each tap ldmatrix fills one set of A registers while wgmma still reads another. What bounds it is the
//            bandwidth of shared memory. Hence 3x3 filters go down their columns: of the two rows of pixels that a tap
//            wants a warp has one in registers already, from the tap above.
//   between  the accumulators, rounded and packed in pairs, are the A registers of the second wgmma: Z never leaves
//            them. Only where filters are shared out the warps with the same pixels show each other their parts, and
//            those of a cluster add up their sums before they round (basis_conv2d_exchange.h).
//   stage 2  64 outputs at a time, or 32 a warpgroup, then the epilogue of basis_conv2d_epilogue.h.
// Rings are pairs of mbarriers, "full" and "empty". A thread that computes never waits for a whole block.
//
// Tests: tests/cuda_on_cpu/test_basis_conv2d.py (no GPU), tests/ops/test_basis_conv2d.py.
#include "basis_conv2d_exchange.h"
#include "rings.h"

namespace basisconv::cuda {
namespace {

// How a kernel goes through the taps: in their order; through nine, down the columns, with the loop open and addresses
// found once; so too where the next row of taps is the next row of pixels, of which one is loaded and one is there.
enum class Taps { any, nine, sliding };

// The tap that comes as the n-th.
BASISCONV_EITHER constexpr int nth_tap(bool nine, int n) { return nine ? n % 3 * 3 + n / 3 : n; }

// One thread of a block, a part each: packed weights that come through a ring are on their way from memory before
// anything else, also before the kernel ahead is done. Nobody reads them here, so they may still be written.
BASISCONV_DEVICE void prefetch_weights(const Problem& p, const HopperPlan& plan) {
  const int64_t from = int64_t{blockIdx.x} * plan.ahead, left = p.basis_bytes + p.mixing_bytes - from;
  if (plan.ahead > 0 && left > 0) prefetch(p.basis + from, static_cast<int>(left < plan.ahead ? left : plan.ahead));
}

// One thread: all copies of this block, in the order in which they are needed.
template <bool nine>
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
    const Tile tile(p, plan.tile_y(), number, plan.images);
    for (int slab = 0; slab < slabs.count(); ++slab) {
      bar_wait(halo.empty + halo_at.stage, halo_at.phase ^ 1);
      bar_arrive_expect(halo.full + halo_at.stage, plan.halo_box_bytes);
      tensor_load(memory + halo_at.stage * plan.halo_bytes, image, (slabs.begin + slab) * kSlab,
                  tile.x * p.stride_w - p.pad_left, tile.y * p.stride_h - p.pad_top, tile.n, halo.full + halo_at.stage);
      halo_at.next();
      for (int n = 0; !plan.basis_resident && n < p.taps; ++n) {
        bar_wait(basis.empty + basis_at.stage, basis_at.phase ^ 1);
        bar_arrive_expect(basis.full + basis_at.stage, plan.basis_tile());
        bulk_load(basis_memory + basis_at.stage * plan.basis_tile(),
                  own_basis + (static_cast<int64_t>(slab) * p.taps + nth_tap(nine, n)) * plan.basis_tile(),
                  plan.basis_tile(), basis.full + basis_at.stage);
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

// Who makes Z of 16 pixels: one warp; two of a block, and of each in a cluster; one of each block in a cluster.
enum class Makers { warp, halves, cluster };

// `per_sm` blocks have a multiprocessor together.
template <class T, int Q16, Makers makers, Taps taps, int per_sm>
__global__ void __launch_bounds__(HopperPlan::threads, per_sm)
    basis_conv2d_sm90a(const __grid_constant__ Problem p, const __grid_constant__ TensorMap image,
                       const HopperPlan plan, const int tiles) {
  constexpr bool shared_out = makers == Makers::halves, exchanged = makers != Makers::warp;
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
    Exchange<filters, shared_out>::init(plan, bars);
    bar_init_fence();
  }
  if (threadIdx.x == HopperPlan::consumers) prefetch_weights(p, plan);
  if (plan.blocks > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  previous_kernel_done();
  if (threadIdx.x >= HopperPlan::consumers) {
    keep_registers<HopperPlan::registers_to_copy(per_sm)>();
    if (threadIdx.x == HopperPlan::consumers) issue_copies<taps != Taps::any>(p, plan, image, tiles, bars);
    return;
  }
  take_registers<HopperPlan::registers_to_compute(per_sm)>();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool two_images = !shared_out && plan.images > 1;
  const int share = shared_out ? warp / 4 : 0, image_of = two_images ? warp / 4 : 0;
  const int row = (shared_out || two_images ? warp % 4 : warp) * 2;
  const char* bases = memory + plan.basis_offset() + share * filters * kSlab * 2;
  const char* mixings = memory + plan.mixing_offset() + share * outputs * width * 2;
  char* staging = memory + plan.staging_offset() + warp * kStagingBytes;
  Exchange<filters, shared_out> exchange;
  const Part slabs(p.slabs, plan.blocks), chunks(p.chunks, plan.blocks);
  const float start = poison(p);
  // ldmatrix.x4: lanes 0-15 address 16 pixels' channels 0-7 of a k16 step, lanes 16-31 channels 8-15. Of one row alone,
  // the lower one, eight lanes each address its pixels' channels 0-7, 8-15, 16-23, 24-31: two k16 steps.
  const int own_pixel =
      (image_of * plan.rows + (row + lane % 16 / kTileX) * p.stride_h) * plan.columns + lane % kTileX * p.stride_w;
  auto from_tap = [&](int r, int s) {
    const uint32_t pixel = own_pixel + r * p.dilation_h * plan.columns + s * p.dilation_w;
    return swizzled(pixel * kSlab * 2 + lane / 16 * 16, kSlab * 2);
  };
  [[maybe_unused]] auto from_lower = [&](int r, int s) {
    const uint32_t pixel = own_pixel + (lane / 8 % 2 == 0 ? p.stride_h * plan.columns : 0) +
                           r * p.dilation_h * plan.columns + s * p.dilation_w;
    return swizzled(pixel * kSlab * 2 + lane / 8 * 16, kSlab * 2);
  };
  [[maybe_unused]] uint32_t from_of[taps == Taps::any ? 1 : 9];
  if constexpr (taps != Taps::any) {
#pragma unroll
    for (int n = 0; n < 9; ++n) {
      from_of[n] = taps == Taps::sliding && n % 3 > 0 ? from_lower(n % 3, n / 3) : from_tap(n % 3, n / 3);
    }
  }
  // What is resident are the block's own tiles, of which the last block of a cluster may have fewer.
  Place halo_at(plan.halo_stages), basis_at(plan.basis_resident ? p.taps * slabs.count() : plan.basis_stages),
      mixing_at(plan.mixing_resident ? chunks.count() : plan.mixing_stages);
  if (plan.basis_resident && slabs.count() > 0) bar_wait(basis.full, 0);

  for (int number = blockIdx.x / plan.blocks; number < tiles; number += gridDim.x / plan.blocks) {
    const Tile tile(p, plan.tile_y(), number, plan.images);
    Pixels pixels{tile.n + image_of, tile.y + row, tile.x};
    if (two_images && pixels.n >= p.N) pixels.y = p.OH;  // an image too many: all is outside

    // Stage 1.
    float z[filters / n][n / 2];
#pragma unroll
    for (int i = 0; i < filters / 2; ++i) z[i / (n / 2)][i % (n / 2)] = start;
    // Of the tap that wgmma reads, the one before, the one after. Beside many filters registers are too few for three,
    // and their wgmma takes long enough to fill two while it runs.
    constexpr int sets = Q16 > HopperPlan::most_filters_to_slide ? 2 : 3;
    uint32_t fragments[sets][4][4];
    int previous = -1;  // the place in the basis ring of the wgmma that is still under way
    // How many places are given back as soon as they were read: the last ones may be lent.
    [[maybe_unused]] int at_once = p.taps * slabs.count() - (plan.lent ? plan.basis_stages : 0);
    auto previous_is_done = [&] {
      if (plan.basis_resident || previous < 0) return;
      if constexpr (exchanged) {
        if (at_once-- <= 0) return;
      }
      release(basis.empty + previous);
    };
    auto load = [&](uint32_t(&a)[4][4], uint32_t from) {
#pragma unroll
      for (int k = 0; k < 4; ++k) ldmatrix_x4(a[k], memory + (from ^ static_cast<uint32_t>(k * 32)));
    };
    // The row below those of `above` is the other half of its A.
    [[maybe_unused]] auto load_below = [&](uint32_t(&a)[4][4], const uint32_t(&above)[4][4], uint32_t from) {
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        uint32_t lower[4];
        ldmatrix_x4(lower, memory + (from ^ static_cast<uint32_t>(k * 32)));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          a[k + i][0] = above[k + i][1], a[k + i][1] = lower[2 * i];
          a[k + i][2] = above[k + i][3], a[k + i][3] = lower[2 * i + 1];
        }
      }
    };
    // `beyond`: how much further on the tap's tile lies than it comes, where all of them stay as they are packed.
    auto multiply = [&](const uint32_t(&a)[4][4], int beyond) {
      if (!plan.basis_resident) bar_wait(basis.full + basis_at.stage, basis_at.phase);
      const char* tile_at = bases + (basis_at.stage + (plan.basis_resident ? beyond : 0)) * Q16 * kSlab * 2;
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int i = 0; i < filters / n; ++i) wgmma_rs<T, n, kSlab * 2>(z[i], a[k], tile_at + i * n * kSlab * 2, k);
      }
      wgmma_commit();
      wgmma_wait<1>();  // the tap before is done: its registers and its place are free
      previous_is_done();
      previous = basis_at.stage;
      basis_at.next();
    };
    if constexpr (taps != Taps::any) {
#pragma unroll 1
      for (int slab = slabs.begin; slab < slabs.end; ++slab) {
        bar_wait(halo.full + halo_at.stage, halo_at.phase);
        const uint32_t tile_at = halo_at.stage * plan.halo_bytes;  // a multiple of 1024: no swizzle knows it
        if (sets == 2) wgmma_wait<0>();  // the ninth tap of the slab before was in the same registers
        load(fragments[0], tile_at + from_of[0]);
#pragma unroll
        for (int n = 0; n < 9; ++n) {
          auto load_next = [&] {
            if (taps == Taps::sliding && (n + 1) % 3 > 0) {
              load_below(fragments[(n + 1) % sets], fragments[n % sets], tile_at + from_of[n + 1]);
            } else if (n < 8) {
              load(fragments[(n + 1) % sets], tile_at + from_of[n + 1]);
            }
          };
          if (sets > 2) load_next();
          multiply(fragments[n % sets], nth_tap(true, n) - n);
          if (sets == 2) load_next();
        }
        release(halo.empty + halo_at.stage);
        halo_at.next();
      }
    } else {
      int r = 0, s = 0;
      auto tap = [&](uint32_t(&a)[4][4]) {
        if (r == 0 && s == 0) bar_wait(halo.full + halo_at.stage, halo_at.phase);
        load(a, halo_at.stage * plan.halo_bytes + from_tap(r, s));
        multiply(a, 0);
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
        tap(fragments[0]);
        if (step + 1 < steps) tap(fragments[1]);
      }
    }
    wgmma_wait<0>();
    previous_is_done();

    // Between the stages.
    uint32_t a[Q16 / 16][4];
    if constexpr (exchanged) {
      exchange.template turn<T>(p, plan, pixels, share * filters, z, a);
      if (plan.lent && slabs.count() > 0) {
        fence_proxy_async();
        for (int stage = 0; stage < plan.basis_stages; ++stage) release(basis.empty + stage);
      }
    } else {
#pragma unroll
      for (int q = 0; q < Q16 / 16; ++q) finish_maps<T>(p, z[q / (n / 16)] + q % (n / 16) * 8, pixels, q * 16, a[q]);
    }

    // Stage 2.
#pragma unroll chunks_together
    for (int chunk = chunks.begin; chunk < chunks.end; ++chunk) {
      const int k = chunk * kChunk + share * outputs;
      BiasPairs<outputs> bias;
      bias.template load<T>(p, k);
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
      if (k < p.K) store_outputs<T, outputs>(p, y, bias, staging, pixels, k);
    }
  }
}

template <class T, int Q16, Makers makers, Taps taps, int per_sm>
const char* launch_sm90a(const Problem& p, HopperPlan plan, const TensorMap& image, const CudaDevice& device,
                         Stream stream) {
  const int64_t tiles = hopper_tiles(p, plan);
  if (tiles > 0x3FFFFFFF) return "more than 2^30 tiles; split the batch";
  const dim3 grid{static_cast<unsigned>(hopper_grid(p, plan, device)), 1, 1}, block{HopperPlan::threads, 1, 1};
  plan.ahead = hopper_ahead(p, plan, grid.x);
  return launch_clusters(basis_conv2d_sm90a<T, Q16, makers, taps, per_sm>, grid, plan.blocks, block, plan.bytes, stream,
                         p, image, plan, static_cast<int>(tiles));
}

template <class T, int Q16, Makers makers, int per_sm>
const char* launch_taps(const Problem& p, const HopperPlan& plan, const TensorMap& image, const CudaDevice& device,
                        Stream stream) {
  if (p.R == 3 && p.S == 3) {
    if constexpr (Q16 <= HopperPlan::most_filters_to_slide) {
      if (slides(p)) return launch_sm90a<T, Q16, makers, Taps::sliding, per_sm>(p, plan, image, device, stream);
    }
    return launch_sm90a<T, Q16, makers, Taps::nine, per_sm>(p, plan, image, device, stream);
  }
  if constexpr (per_sm == 1) return launch_sm90a<T, Q16, makers, Taps::any, 1>(p, plan, image, device, stream);
  return "two blocks a multiprocessor are for 3x3 filters";
}

template <class T, int Q16>
const char* launch_shape(const Problem& p, const HopperPlan& plan, const TensorMap& image, const CudaDevice& device,
                         Stream stream) {
  if constexpr (Q16 > 16) {
    if (plan.shared_out) return launch_taps<T, Q16, Makers::halves, 1>(p, plan, image, device, stream);
    constexpr Taps taps = Q16 <= HopperPlan::most_filters_to_slide ? Taps::sliding : Taps::any;
    if (plan.blocks > 1) return launch_sm90a<T, Q16, Makers::cluster, taps, 1>(p, plan, image, device, stream);
  }
  if constexpr (Q16 <= HopperPlan::most_filters_of_two) {
    if (plan.per_sm == 2) return launch_taps<T, Q16, Makers::warp, 2>(p, plan, image, device, stream);
  }
  return launch_taps<T, Q16, Makers::warp, 1>(p, plan, image, device, stream);
}

template <class T>
const char* launch_filters(const Problem& p, const HopperPlan& plan, const TensorMap& image, const CudaDevice& device,
                           Stream stream) {
  switch (plan.Q16) {
    case 16:
      return launch_shape<T, 16>(p, plan, image, device, stream);
    case 32:
      return launch_shape<T, 32>(p, plan, image, device, stream);
    case 64:
      return launch_shape<T, 64>(p, plan, image, device, stream);
    case 128:
      return launch_shape<T, 128>(p, plan, image, device, stream);
    default:
      return launch_shape<T, 256>(p, plan, image, device, stream);
  }
}

}  // namespace
}  // namespace basisconv::cuda

namespace basisconv {

const char* cuda_basis_conv2d_sm90a(const CudaBasisConv2d& call, const CudaDevice& device, void* stream) {
  return cuda_basis_conv2d_sm90a_by(call, cuda::hopper_plan(cuda::problem_of(call), device), device, stream);
}

const char* cuda_basis_conv2d_sm90a_by(const CudaBasisConv2d& call, const cuda::HopperPlan& plan,
                                       const CudaDevice& device, void* stream) {
  using namespace cuda;
  const Problem p = problem_of(call);
  if (plan.bytes == 0) return "the halo tile does not fit into shared memory";
  const bool is_bf16 = call.params.weights.dtype == DType::bf16;
  TensorMap image;
  const TensorMapRequest request =
      image_map(p.input, is_bf16, p.N, p.H, p.W, p.C, p.in.n, p.in.h, p.in.w, plan.rows, plan.columns, plan.images);
  if (const char* wrong = encode(request, image)) return wrong;
  const auto on = static_cast<Stream>(stream);
  return is_bf16 ? launch_filters<bf16>(p, plan, image, device, on) : launch_filters<f16>(p, plan, image, device, on);
}

}  // namespace basisconv
