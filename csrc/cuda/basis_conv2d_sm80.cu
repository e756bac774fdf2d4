// basis_conv2d on tensor cores by mma.sync, for sm_80 and later: bfloat16 and float16, any geometry and memory layout.
//
// One block of four warps makes 8x8 pixels of one image (of one group), with all Q and K; warp w has pixel rows 2w,
// 2w+1.
//   stage 1  for each slab of 64 channels the halo tile, each input pixel once, lies in shared memory; for each tap
//            A = 16 pixels by ldmatrix from the halo, shifted by the tap, and B = the filters [Q16, 64] of that tap.
//            Where the halo would be larger than its taps are worth (strides, wide dilation) each tap brings its own 64
//            pixels instead.
//   between  the float32 accumulators of two n8 tiles, rounded and packed in pairs, are the A fragment of a k16 step: Z
//            never leaves the registers. `precise` splits them into three TF32 numbers instead, whose sum is exact.
//   stage 2  64 outputs at a time: coefficients from shared memory, then the epilogue of basis_conv2d_epilogue.h.
// Copies run two steps ahead. Input that does not lie in 16-byte pieces (NCHW, C not a multiple of 8, odd views) is
// read element by element: slower, with no copy of the input beside it.
//
// Tests: tests/cuda_on_cpu/test_basis_conv2d.py (no GPU), tests/ops/test_basis_conv2d.py.
#include "basis_conv2d_epilogue.h"

namespace basisconv::cuda {
namespace {

constexpr int kTileY = 8;
constexpr int kThreads = 128;
constexpr int kSlabPitch = kSlab * 2 + 16;  // pixels of the halo: eight in a row never share a bank at stride 1
static_assert(kTileX * kTileY == kThreads / 32 * 16, "each warp has one m16 tile");

// Where things lie in shared memory, and how pixels are fetched. The same on host and device. `stages`: taps in shared
// memory, one in use, the others under way.
template <int Q16, int stages>
struct Layout {
  static constexpr int basis_bytes = Q16 * kSlab * 2;
  static constexpr int mixing_bytes = kChunk * Q16 * 2;
  bool tap_by_tap;
  int rows, columns;   // pixels fetched at a time
  int step_h, step_w;  // from one to the next, in the input
  int pixels_bytes, buffers;

  BASISCONV_EITHER Layout(const Problem& p, bool by_tap) {
    const int halo_rows = (kTileY - 1) * p.stride_h + (p.R - 1) * p.dilation_h + 1;
    const int halo_columns = (kTileX - 1) * p.stride_w + (p.S - 1) * p.dilation_w + 1;
    tap_by_tap = by_tap || int64_t{halo_rows} * halo_columns >= int64_t{p.taps} * kTileX * kTileY;
    rows = tap_by_tap ? kTileY : halo_rows;
    columns = tap_by_tap ? kTileX : halo_columns;
    step_h = tap_by_tap ? p.stride_h : 1;
    step_w = tap_by_tap ? p.stride_w : 1;
    pixels_bytes = (rows * columns * kSlabPitch + 127) / 128 * 128;
    // Beside the pixels in use those of the `stages - 1` taps that are under way: one slab, or as many as they span.
    const int ahead = tap_by_tap ? stages - 1 : (stages - 1 + p.taps - 1) / p.taps;
    const int all = tap_by_tap ? p.slabs * p.taps : p.slabs;
    buffers = all < 1 + ahead ? all : 1 + ahead;
  }
  // The basis and the coefficients are swizzled by their address: they come first, at multiples of 1024.
  BASISCONV_EITHER int pixels_offset() const { return stages * basis_bytes + 2 * mixing_bytes; }
  BASISCONV_EITHER int mixing_offset(int buffer) const { return stages * basis_bytes + buffer * mixing_bytes; }
  // The epilogue's staging lies over the pixels, which nobody reads after stage 1.
  BASISCONV_EITHER int bytes() const {
    const int stage1 = buffers * pixels_bytes, stage2 = kThreads / 32 * kStagingBytes;
    return pixels_offset() + (stage1 > stage2 ? stage1 : stage2);
  }
};

// Input pixels of one slab from (y, x) on. Outside the image, and beyond the channels up to the next multiple of 16,
// they are zero.
template <class T, class L>
BASISCONV_DEVICE void fetch_pixels(const Problem& p, const L& layout, char* to, int n, int y, int x, int c0) {
  const int channels = min(kSlab, (p.C - c0 + 15) / 16 * 16);
  const T* image = static_cast<const T*>(p.input) + n * p.in.n + (static_cast<int64_t>(blockIdx.y) * p.C + c0) * p.in.c;
  const int pixels = layout.rows * layout.columns;
  if (p.input_in_16_bytes) {
    // Eight lanes a pixel, 16 bytes a lane: a thread keeps its channels and goes down the pixels.
    const int c = threadIdx.x % 8 * 8;
    if (c >= channels) return;
    const int left = p.C - c0 - c, bytes = left <= 0 ? 0 : left < 8 ? left * 2 : 16;
    int row = 0, column = threadIdx.x / 8;
    for (int pixel = threadIdx.x / 8; pixel < pixels; pixel += kThreads / 8, column += kThreads / 8) {
      while (column >= layout.columns) column -= layout.columns, ++row;
      const int at_y = y + row * layout.step_h, at_x = x + column * layout.step_w;
      const bool inside = bytes > 0 && at_y >= 0 && at_y < p.H && at_x >= 0 && at_x < p.W;
      const void* from = inside ? static_cast<const void*>(image + at_y * p.in.h + at_x * p.in.w + c) : p.basis;
      cp_async16(to + pixel * kSlabPitch + c * 2, from, inside ? bytes : 0);
    }
    return;
  }
  for (int i = threadIdx.x; i < pixels * channels; i += kThreads) {
    const int pixel = p.pixels_side_by_side ? i % pixels : i / channels;
    const int c = p.pixels_side_by_side ? i / pixels : i % channels;
    const int at_y = y + pixel / layout.columns * layout.step_h, at_x = x + pixel % layout.columns * layout.step_w;
    const bool inside = c0 + c < p.C && at_y >= 0 && at_y < p.H && at_x >= 0 && at_x < p.W;
    *reinterpret_cast<T*>(to + pixel * kSlabPitch + c * 2) =
        inside ? image[c * p.in.c + at_y * p.in.h + at_x * p.in.w] : T{0};
  }
}

BASISCONV_DEVICE void fetch_tile(char* to, const char* from, int bytes) {
  for (int i = threadIdx.x * 16; i < bytes; i += kThreads * 16) cp_async16(to + i, from + i, 16);
}

// 16 pixels x 32 outputs from Z rounded to T. `row` and `column` are this lane's part of the address of ldmatrix.x4:
// two n8 tiles, lanes 0-7 and 16-23 at the first 16 bytes of a k16 step.
template <class T, int Q16>
BASISCONV_DEVICE void recombine(float (&y)[4][4], const uint32_t (&z)[Q16 / 16][4], const char* mixing, int first,
                                int row, int column) {
  constexpr int width = mixing_width(Q16);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int q = 0; q < Q16 / 16; ++q) {
      constexpr int steps = width / 16;  // k16 steps in a tile
      uint32_t b[4];
      const uint32_t offset = (first + j * 16 + row) * width * 2 + q % steps * 32 + column;
      ldmatrix_x4(b, mixing + q / steps * kChunk * width * 2 + swizzled(offset, width * 2));
      mma_m16n8k16<T>(y[2 * j], z[q], b[0], b[1]);
      mma_m16n8k16<T>(y[2 * j + 1], z[q], b[2], b[3]);
    }
  }
}

// A float32 is the sum of three TF32 numbers of 11, 11 and 2 bits, each what its 13 low bits leave.
BASISCONV_DEVICE float take_tf32(float& rest) {
  const float taken = float_of(bits_of(rest) & 0xFFFFE000u);
  rest = rest == taken ? 0.0f : rest - taken;  // an infinity leaves nothing
  return taken;
}

// Z as float32, 16 bytes a lane and eight filters, in memory that the warp has for itself.
template <int Q16>
struct KeptMaps {
  static constexpr int bytes = Q16 / 8 * 32 * 16;  // of a warp
  static_assert(bytes * (kThreads / 32) <= 2 * Layout<Q16, 2>::basis_bytes, "lies over the basis");
  char* memory;

  BASISCONV_DEVICE float4& at(int q) const {
    return *reinterpret_cast<float4*>(memory + (q * 32 + threadIdx.x % 32) * 16);
  }
};

// The same from Z as float32. The order of a sum is free, so a k8 step takes filters 2t for its column t and 2t + 1 for
// t + 4: what an accumulator's lane holds, and two neighbours in memory.
template <class T, int Q16>
BASISCONV_DEVICE void recombine_precisely(float (&y)[4][4], const KeptMaps<Q16>& z, const char* mixing, int first) {
  constexpr int width = mixing_width(Q16), steps = width / 8;
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int q = 0; q < Q16 / 8; ++q) {
    const float4 kept = z.at(q);
    float rest[4] = {kept.x, kept.z, kept.y, kept.w};
    const char* tile = mixing + q / steps * kChunk * width * 2;
#pragma unroll
    for (int part = 0; part < 3; ++part) {
      float a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = take_tf32(rest[i]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t offset = (first + j * 8 + lane / 4) * width * 2 + q % steps * 16 + lane % 4 * 4;
        const uint32_t word = *reinterpret_cast<const uint32_t*>(tile + swizzled(offset, width * 2));
        const T low{static_cast<uint16_t>(word)}, high{static_cast<uint16_t>(word >> 16)};
        mma_m16n8k8_tf32(y[j], a, widen(low), widen(high));
      }
    }
  }
}

template <class T, int Q16, bool precise, int stages>
__global__ void __launch_bounds__(kThreads, 1) basis_conv2d_sm80(const Problem p, const bool tap_by_tap) {
  using L = Layout<Q16, stages>;
  const L layout(p, tap_by_tap);
  char* bases = shared_memory();
  char* halos = bases + layout.pixels_offset();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const char* basis_tiles = p.basis + blockIdx.y * p.basis_bytes;
  const char* mixing_tiles = p.mixing + blockIdx.y * p.mixing_bytes;

  // Locate.
  const int tiles_x = (p.OW + kTileX - 1) / kTileX, tiles_y = (p.OH + kTileY - 1) / kTileY;
  const int n = blockIdx.x / tiles_x / tiles_y;
  const int oy = blockIdx.x / tiles_x % tiles_y * kTileY, ox = blockIdx.x % tiles_x * kTileX;
  const int iy = oy * p.stride_h - p.pad_top, ix = ox * p.stride_w - p.pad_left;
  const Pixels pixels{n, oy + warp * 2, ox};
  const int steps = p.taps * p.slabs;

  // A step is one tap of one slab; the halo of a slab travels with its first tap. Every step commits a group, so that
  // as many are under way in the last steps as in the first.
  int ahead = 0, ahead_r = 0, ahead_s = 0, ahead_slab = 0;
  auto fetch = [&] {
    if (ahead < steps) {
      if (layout.tap_by_tap || (ahead_r == 0 && ahead_s == 0)) {
        const int buffer = (layout.tap_by_tap ? ahead : ahead_slab) % layout.buffers;
        const int y = layout.tap_by_tap ? iy + ahead_r * p.dilation_h : iy;
        const int x = layout.tap_by_tap ? ix + ahead_s * p.dilation_w : ix;
        fetch_pixels<T>(p, layout, halos + buffer * layout.pixels_bytes, n, y, x, ahead_slab * kSlab);
      }
      const char* tile = basis_tiles + static_cast<int64_t>(ahead) * L::basis_bytes;
      fetch_tile(bases + ahead % stages * L::basis_bytes, tile, L::basis_bytes);
      ++ahead;
      if (++ahead_s == p.S) ahead_s = 0, ++ahead_r;
      if (ahead_r == p.R) ahead_r = 0, ++ahead_slab;
    }
    cp_async_commit();
  };
  fetch_tile(bases + layout.mixing_offset(0), mixing_tiles, L::mixing_bytes);
  for (int i = 0; i < stages - 1; ++i) fetch();

  // Stage 1. ldmatrix.x4 of A: lanes 0-15 address 16 pixels' channels 0-7 of a k16 step, lanes 16-31 channels 8-15.
  const int pixel_y = warp * 2 + lane % 16 / kTileX, pixel_x = lane % kTileX;
  const int a_row =
      layout.tap_by_tap ? pixel_y * kTileX + pixel_x : pixel_y * p.stride_h * layout.columns + pixel_x * p.stride_w;
  const int a_lane = a_row * kSlabPitch + lane / 16 * 16;
  const int b_row = lane % 8 + lane / 16 * 8, b_column = lane / 8 % 2 * 16;
  const uint32_t b_lane = swizzled(b_row * kSlab * 2 + b_column, kSlab * 2);
  float z[Q16 / 8][4];
  const float start = poison(p);
#pragma unroll
  for (int i = 0; i < Q16 / 2; ++i) z[i / 4][i % 4] = start;
  int r = 0, s = 0, slab = 0;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<stages - 2>();
    __syncthreads();  // this step's tiles have landed for all, and all are done with the slot that is filled next
    fetch();
    const int shift = layout.tap_by_tap ? 0 : r * p.dilation_h * layout.columns + s * p.dilation_w;
    const int buffer = (layout.tap_by_tap ? step : slab) % layout.buffers;
    const char* a_tile = halos + buffer * layout.pixels_bytes + a_lane + shift * kSlabPitch;
    const char* b_tile = bases + step % stages * L::basis_bytes;
    const int k_steps = min(kSlab / 16, (p.C - slab * kSlab + 15) / 16);
#pragma unroll
    for (int k = 0; k < kSlab / 16; ++k) {
      if (k >= k_steps) break;
      uint32_t a[4];
      ldmatrix_x4(a, a_tile + k * 32);
      const char* b_step = b_tile + (b_lane ^ static_cast<uint32_t>(k * 32));  // the swizzle of column block k
#pragma unroll
      for (int q = 0; q < Q16 / 16; ++q) {
        uint32_t b[4];
        ldmatrix_x4(b, b_step + q * 16 * kSlab * 2);
        mma_m16n8k16<T>(z[2 * q], a, b[0], b[1]);
        mma_m16n8k16<T>(z[2 * q + 1], a, b[2], b[3]);
      }
    }
    if (++s == p.S) s = 0, ++r;
    if (r == p.R) r = 0, ++slab;
  }

  // Between the stages: z is rounded once.
#pragma unroll
  for (int q = 0; q < Q16 / 8; ++q) clear_filling(p, z[q], q * 8);
  if (p.maps != nullptr) {
#pragma unroll
    for (int q = 0; q < Q16 / 8; ++q) store_maps<T>(p, z[q], pixels, q * 8);
  }
  uint32_t rounded[Q16 / 16][4];
#pragma unroll
  for (int q = 0; q < Q16 / 16; ++q) {
#pragma unroll
    for (int i = 0; i < 4; ++i) rounded[q][i] = round2<T>(z[2 * q + i / 2][i % 2 * 2], z[2 * q + i / 2][i % 2 * 2 + 1]);
  }

  // Stage 2.
  char* staging = halos + warp * kStagingBytes;
  const KeptMaps<Q16> kept{bases + warp * KeptMaps<Q16>::bytes};
#pragma unroll 1
  for (int chunk = 0; chunk < p.chunks; ++chunk) {
    cp_async_wait<0>();
    __syncthreads();  // the coefficients have landed for all, and nobody reads stage 1's memory or the other buffer
    if (precise && chunk == 0) {
      warp_reuses(kept.memory, KeptMaps<Q16>::bytes);
#pragma unroll
      for (int q = 0; q < Q16 / 8; ++q) kept.at(q) = float4{z[q][0], z[q][1], z[q][2], z[q][3]};
    }
    if (chunk + 1 < p.chunks) {
      const char* tile = mixing_tiles + static_cast<int64_t>(chunk + 1) * L::mixing_bytes;
      fetch_tile(bases + layout.mixing_offset((chunk + 1) % 2), tile, L::mixing_bytes);
    }
    cp_async_commit();
    const char* mixing = bases + layout.mixing_offset(chunk % 2);
    for (int first = 0; first < kChunk; first += kStagedColumns) {
      if (chunk * kChunk + first >= p.K) break;
      float y[4][4] = {};
      if constexpr (precise) {
        recombine_precisely<T, Q16>(y, kept, mixing, first);
      } else {
        recombine<T, Q16>(y, rounded, mixing, first, b_row, b_column);
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

template <class T, int Q16, int stages = (Q16 > 128 ? 2 : 3)>
const char* launch_sm80(const Problem& p, bool precise, int shared_limit, Stream stream) {
  const int64_t tiles = int64_t{p.N} * tiles_of(p.OH, kTileY) * tiles_of(p.OW, kTileX);
  if (tiles > 0x7FFFFFFF) return "more than 2^31 tiles of 8x8 pixels; split the batch";
  Layout<Q16, stages> layout(p, false);
  if (layout.bytes() > shared_limit) layout = Layout<Q16, stages>(p, true);
  if (layout.bytes() > shared_limit) {
    if constexpr (Q16 == 128 && stages == 3) return launch_sm80<T, Q16, 2>(p, precise, shared_limit, stream);
    return "this device has too little shared memory for so many basis filters";
  }
  const dim3 grid{static_cast<unsigned>(tiles), static_cast<unsigned>(p.groups), 1}, block{kThreads, 1, 1};
  const auto kernel = precise ? basis_conv2d_sm80<T, Q16, true, stages> : basis_conv2d_sm80<T, Q16, false, stages>;
  return launch(kernel, grid, block, layout.bytes(), stream, p, layout.tap_by_tap);
}

template <class T>
const char* launch_filters(const Problem& p, bool precise, int shared_limit, Stream stream) {
  switch (padded_filters(p.Q)) {
    case 16:
      return launch_sm80<T, 16>(p, precise, shared_limit, stream);
    case 32:
      return launch_sm80<T, 32>(p, precise, shared_limit, stream);
    case 64:
      return launch_sm80<T, 64>(p, precise, shared_limit, stream);
    case 128:
      return launch_sm80<T, 128>(p, precise, shared_limit, stream);
    case 256:
      return launch_sm80<T, 256>(p, precise, shared_limit, stream);
    default:
      return "more than 256 basis filters in a group";
  }
}

}  // namespace
}  // namespace basisconv::cuda

namespace basisconv {

const char* cuda_basis_conv2d_sm80(const CudaBasisConv2d& call, const CudaDevice& device, void* stream) {
  const cuda::Problem p = cuda::problem_of(call);
  const bool precise = call.params.weights.precise;
  const auto on = static_cast<cuda::Stream>(stream);
  return call.params.weights.dtype == DType::bf16 ? cuda::launch_filters<bf16>(p, precise, device.shared_bytes, on)
                                                  : cuda::launch_filters<f16>(p, precise, device.shared_bytes, on);
}

}  // namespace basisconv
