// tucker_conv2d in one pass on tensor cores by mma.sync, for sm_80 and later: 1x1 to rank_in channels, RxS core, 1x1 to
// the outputs. bfloat16 and float16, both ranks at most 128, any geometry and memory layout whose window fits.
//
// A block of eight warps makes 16x8 or 8x8 pixels of one image, with all ranks and outputs.
//   stage 0  the pixels under the core's window, a slab of 64 channels after the other, times u_in as it lies: its
//            rows are channels, so ldmatrix transposes. M is rounded, zero outside the image, and stays in shared
//            memory. Pixels that several tiles read are reduced by each: 1.4 times as many for 3x3 on 16x8.
//   stage 1  for each tap of the core A = 16 pixels of M by ldmatrix, shifted by the tap.
//   stage 2  Z, rounded, through shared memory; 64 outputs at a time, then the epilogue of basis_conv2d_epilogue.h.
// All copies are one sequence of jobs, slabs, then taps of the core, then chunks of coefficients, that runs one or two
// jobs ahead: the core is on its way while the image is reduced.
//
// Core and coefficients are packed as for basis_conv2d. Input that does not lie in 16-byte pieces is read element by
// element. Against two passes it spares the way of M through memory and a launch, and reads all weights once a tile.
//
// Tests: tests/cuda_on_cpu/test_tucker_conv2d_one_pass.py (no GPU), tests/gpu/test_tucker_kernels.py.
#include "hopper.h"
#include "tucker_conv2d_copies.h"

namespace basisconv::cuda {
namespace {

// Whether the code may be launched while the kernel ahead is still running, as launch_tile does on 9.0.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kMayBeginEarly = true;
#else
constexpr bool kMayBeginEarly = false;
#endif

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, Tile::blocks)
    tucker_conv2d(const Problem p, const Reduction reduction, const TuckerPlan plan) {
  constexpr int ranks = Tile::ranks, pitch = TuckerPlan::pitch_of(ranks);
  constexpr int core_pitch = TuckerPlan::pitch_of(ranks < kSlab ? ranks : kSlab);
  char* memory = shared_memory();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Window window(p, plan);
  Jobs<T, ranks> jobs{p, reduction, plan, window, memory};
  if constexpr (kMayBeginEarly) previous_kernel_done();
  char* reduced = memory + plan.reduced_offset();
  // ldmatrix.x4 of A, rows of pixels: lanes 0-15 address 16 pixels' columns 0-7 of a k16 step, lanes 16-31 columns
  // 8-15. Of B, rows of filters: two n8 tiles, of each columns 0-7 and 8-15 of the step.
  const int a_column = lane / 16 * 16, b_row = lane % 8 + lane / 16 * 8, b_column = lane / 8 % 2 * 16;

  // Stage 0.
  {
    constexpr int most = ranks / 16 / Tile::parts;  // 16 ranks at a time
    const int part = warp % Tile::parts * most, row = warp / Tile::parts;
    const int t_row = lane % 8 + lane / 8 % 2 * 8, t_column = (part * 16 + lane / 16 * 8) * 2;  // of B, transposed
    float m[Tile::each][most][2][4];
    for (int job = -plan.ahead, slab = 0, first = 0; job < plan.reduce_jobs; ++job) {
      if (job >= 0) jobs.wait();
      jobs.template issue<Kind::reduce>();
      if (job < 0) continue;
      if (slab == 0) {
#pragma unroll
        for (int i = 0; i < Tile::each * most * 8; ++i) m[i / 8 / most][i / 8 % most][i / 4 % 2][i % 4] = 0.0f;
      }
      const char* pixels = jobs.slab(job) + (row * 16 + lane % 16) * TuckerPlan::slab_pitch + a_column;
      const char* factor = jobs.slab(job) + plan.image_bytes() + t_row * pitch + t_column;
      const int count = min(plan.group, plan.pixels - first);
#pragma unroll
      for (int k = 0; k < kSlab / 16; ++k) {
        uint32_t b[most][4];
#pragma unroll
        for (int q = 0; q < most; ++q) ldmatrix_x4_trans(b[q], factor + k * 16 * pitch + q * 32);
#pragma unroll
        for (int i = 0; i < Tile::each; ++i) {
          if ((row + i * Tile::down) * 16 >= count) break;
          uint32_t a[4];
          ldmatrix_x4(a, pixels + i * Tile::down * 16 * TuckerPlan::slab_pitch + k * 32);
#pragma unroll
          for (int q = 0; q < most; ++q) {
            mma_m16n8k16<T>(m[i][q][0], a, b[q][0], b[q][1]);
            mma_m16n8k16<T>(m[i][q][1], a, b[q][2], b[q][3]);
          }
        }
      }
      if (++slab < reduction.slabs) continue;
        // M, rounded once. What is no pixel or no rank is zero, whatever u_in and the image hold.
#pragma unroll
      for (int i = 0; i < Tile::each; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int own_pixel = (row + i * Tile::down) * 16 + half * 8 + lane / 4, pixel = first + own_pixel;
          if (own_pixel >= count) continue;
          const int y = window.iy + pixel / plan.columns, x = window.ix + pixel % plan.columns;
          const bool inside = y >= 0 && y < p.H && x >= 0 && x < p.W;
#pragma unroll
          for (int q = 0; q < most * 2; ++q) {
            const int rank = part * 16 + q * 8 + lane % 4 * 2;
            const float low = m[i][q / 2][q % 2][half * 2], high = m[i][q / 2][q % 2][half * 2 + 1];
            *reinterpret_cast<uint32_t*>(reduced + pixel * pitch + rank * 2) =
                round2<T>(inside && rank < p.C ? low : 0.0f, inside && rank + 1 < p.C ? high : 0.0f);
          }
        }
      }
      slab = 0;
      first += plan.group;
    }
  }

  // Stage 1: 16 pixels a warp, and its share of the filters.
  constexpr int most = ranks / 16 / Tile::shares;
  const int own_row = warp / Tile::shares, share = warp % Tile::shares;
  const int part = share * most;
  float z[most][2][4];
  const float start = poison(p);
#pragma unroll
  for (int i = 0; i < most * 8; ++i) z[i / 8][i / 4 % 2][i % 4] = start;
  {
    const int pixel_y = own_row * 2 + lane % 16 / kTileX, pixel_x = lane % kTileX;
    const char* own_pixel = reduced + (pixel_y * p.stride_h * plan.columns + pixel_x * p.stride_w) * pitch + a_column;
    int r = 0, s = 0, slab = 0, left = p.taps * p.slabs;
    for (int job = 0; job < plan.core_jobs; ++job) {
      jobs.wait();
      jobs.template issue<Kind::core>();
      const char* tile = jobs.core(job) + (part * 16 + b_row) * core_pitch + b_column;
      const int tiles = min(plan.core_tiles, left);
      left -= tiles;
      for (int i = 0; i < tiles; ++i, tile += plan.core_tile()) {
        const char* pixels =
            own_pixel + (r * p.dilation_h * plan.columns + s * p.dilation_w) * pitch + slab * kSlab * 2;
#pragma unroll
        for (int k = 0; k < (ranks < kSlab ? ranks : kSlab) / 16; ++k) {
          uint32_t a[4];
          ldmatrix_x4(a, pixels + k * 32);
#pragma unroll
          for (int q = 0; q < most; ++q) {
            uint32_t b[4];
            ldmatrix_x4(b, tile + q * 16 * core_pitch + k * 32);
            mma_m16n8k16<T>(z[q][0], a, b[0], b[1]);
            mma_m16n8k16<T>(z[q][1], a, b[2], b[3]);
          }
        }
        if (++s == p.S) s = 0, ++r;
        if (r == p.R) r = 0, ++slab;
      }
    }
  }

  // Z, rounded once, for the warps with the same pixels. What is no filter is zero.
  char* maps = memory + plan.maps_offset() + own_row * 16 * pitch;
#pragma unroll
  for (int i = 0; i < most * 4; ++i) {
    const int q = i / 4, j = i / 2 % 2, half = i % 2, filter = part * 16 + q * 16 + j * 8 + lane % 4 * 2;
    *reinterpret_cast<uint32_t*>(maps + (half * 8 + lane / 4) * pitch + filter * 2) =
        round2<T>(filter < p.Q ? z[q][j][half * 2] : 0.0f, filter + 1 < p.Q ? z[q][j][half * 2 + 1] : 0.0f);
  }
  __syncthreads();  // both shares of Z are there
  uint32_t a[ranks / 16][4];
#pragma unroll
  for (int q = 0; q < ranks / 16; ++q) ldmatrix_x4(a[q], maps + lane % 16 * pitch + a_column + q * 32);

  // Stage 2.
  const Pixels pixels{window.n, window.oy + own_row * 2, window.ox};
  char* staging = memory + plan.staging_offset() + warp * kStagingBytes;
#pragma unroll 1
  for (int chunk = 0; chunk < p.chunks; ++chunk) {
    if (chunk % plan.chunks_together == 0) {
      jobs.wait();
      jobs.template issue<Kind::mixing>();
    }
    const char* mixing = jobs.chunk(chunk) + b_row * pitch + b_column;
#pragma unroll 1
    for (int first = share * kStagedColumns; first < kChunk; first += Tile::shares * kStagedColumns) {
      if (chunk * kChunk + first >= p.K) break;
      float y[kStagedColumns / 8][4] = {};
#pragma unroll
      for (int q = 0; q < ranks / 16; ++q) {
#pragma unroll
        for (int j = 0; j < kStagedColumns / 16; ++j) {
          uint32_t b[4];
          ldmatrix_x4(b, mixing + (first + j * 16) * pitch + q * 32);
          mma_m16n8k16<T>(y[2 * j], a[q], b[0], b[1]);
          mma_m16n8k16<T>(y[2 * j + 1], a[q], b[2], b[3]);
        }
      }
      float outputs[kStagedColumns / 2];
#pragma unroll
      for (int i = 0; i < kStagedColumns / 2; ++i) outputs[i] = y[i / 4][i % 4];
      BiasPairs<kStagedColumns> bias;
      bias.template load<T>(p, chunk * kChunk + first);
      store_outputs<T, kStagedColumns>(p, outputs, bias, staging, pixels, chunk * kChunk + first);
    }
  }
}

template <class T, class Tile>
const char* launch_tile(const Problem& p, const Reduction& reduction, const TuckerPlan& plan, bool early,
                        Stream stream) {
  const dim3 grid{static_cast<unsigned>(tucker_tiles(p, plan)), 1, 1}, block{kThreads, 1, 1};
  const auto kernel = tucker_conv2d<T, Tile>;
  return early ? launch_clusters(kernel, grid, 1, block, plan.bytes, stream, p, reduction, plan)
               : launch(kernel, grid, block, plan.bytes, stream, p, reduction, plan);
}

template <class T>
const char* launch_ranks(const Problem& p, const Reduction& reduction, const TuckerPlan& plan, bool early,
                         Stream stream) {
  switch (plan.tall ? plan.ranks : -plan.ranks) {
    case 16:
      return launch_tile<T, TuckerTile<16, true>>(p, reduction, plan, early, stream);
    case 32:
      return launch_tile<T, TuckerTile<32, true>>(p, reduction, plan, early, stream);
    case 64:
      return launch_tile<T, TuckerTile<64, true>>(p, reduction, plan, early, stream);
    case 128:
      return launch_tile<T, TuckerTile<128, true>>(p, reduction, plan, early, stream);
    case -32:
      return launch_tile<T, TuckerTile<32, false>>(p, reduction, plan, early, stream);
    case -64:
      return launch_tile<T, TuckerTile<64, false>>(p, reduction, plan, early, stream);
    default:
      return launch_tile<T, TuckerTile<128, false>>(p, reduction, plan, early, stream);
  }
}

}  // namespace
}  // namespace basisconv::cuda

namespace basisconv {

const char* cuda_tucker_reason(const CudaTuckerConv2d& call, const CudaDevice& device) {
  using namespace cuda;
  const BasisConv2dWeights& w = call.rest.params.weights;
  const char* reason = nullptr;
  if (cuda_variant(call.rest, device, &reason) == CudaVariant::none) return reason;
  if (w.groups != 1) return "the chain in one pass has no groups";
  if (w.precise) return "the chain in one pass rounds its maps, which precise forbids";
  constexpr int64_t most = int64_t{1} << 29;
  if (call.channels >= most) return "the CUDA kernels take sizes below 2^29";
  if (w.C > TuckerPlan::most_ranks || w.Q > TuckerPlan::most_ranks)
    return "the chain in one pass takes ranks up to 128";
  const Problem p = problem_of(call.rest);
  const TuckerPlan plan = tucker_plan(p, reduction_of(call), device);
  if (plan.bytes == 0) return "this device has too little shared memory for the window of a tile and these ranks";
  return tucker_tiles(p, plan) > 0x7FFFFFFF ? "more than 2^31 tiles; split the batch" : nullptr;
}

const char* cuda_tucker_conv2d(const CudaTuckerConv2d& call, const CudaDevice& device, void* stream) {
  using namespace cuda;
  const BasisConv2dParams& params = call.rest.params;
  if (const char* reason = cuda_tucker_reason(call, device)) return reason;
  if (params.N == 0 || params.OH == 0 || params.OW == 0) return nullptr;
  const Problem p = problem_of(call.rest);
  const Reduction reduction = reduction_of(call);
  const TuckerPlan plan = tucker_plan(p, reduction, device);
  const auto on = static_cast<Stream>(stream);
#ifdef BASISCONV_WITHOUT_SM90A
  constexpr bool early = false;  // 9.0 may run code that was made for 8.0 and waits for nobody
#else
  const bool early = device.capability == 90;
#endif
  return params.weights.dtype == DType::bf16 ? launch_ranks<bf16>(p, reduction, plan, early, on)
                                             : launch_ranks<f16>(p, reduction, plan, early, on);
}

}  // namespace basisconv
