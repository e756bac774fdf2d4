// binary_conv2d on tensor cores by mma.sync over single bits (AND, popcount), for sm_80 and later: any geometry.
//
// One block of four warps makes 8x8 or 16x8 pixels of one image (of one group) and 64 filters, or 16 where a group has
// no more; a warp has two or four rows of pixels.
//   mainloop  for each plane of the input and each slab of channels the halo tile, each input pixel once, lies in
//   shared
//             memory; a step takes two units of 128 bits from it, each shifted by its taps, by ldmatrix, and from the
//             filters. Where the halo would be larger than its taps are worth (strides, wide dilation) each step brings
//             its own pixels instead. A plane's counts are doubled before the next lower one is added.
//   epilogue  binary_conv2d_store.h.
// Copies run two chunks of steps ahead. Pixels that do not lie in pieces of 16 bytes (C not a multiple of 128, groups
// that end inside a word) are put together from words in registers.
//
// Tests: tests/cuda_on_cpu/test_binary_conv2d.py (no GPU), tests/ops/test_binary_conv2d.py.
#include "binary_conv2d_store.h"

namespace basisconv::cuda::binary {
namespace {

constexpr int kThreads = 128;
constexpr int kStages = 3;  // chunks of filters in shared memory: one in use, the others under way

// Where things lie in shared memory, and how pixels are fetched. The same on host and device.
template <int MT, int N8>
struct Layout {
  static constexpr int tile_y = 8 * MT;
  static constexpr int columns = 8 * N8;
  static constexpr int unit_bytes = (columns + 1) * kUnitBytes;
  static constexpr int filters_bytes = columns * static_cast<int>(sizeof(Filter));
  bool tap_by_tap;
  int rows, width;     // pixels fetched at a time
  int step_h, step_w;  // from one to the next, in the input
  int stages, stage_bytes, buffers, buffer_bytes;
  uint32_t by_width;  // ceil(2^32 / width)

  BASISCONV_EITHER Layout(const Problem& p, bool by_tap) {
    const int64_t halo_rows = (tile_y - 1) * int64_t{p.stride_h} + (p.R - 1) * int64_t{p.dilation_h} + 1;
    const int64_t halo_width =
        (kTileX - 1) * int64_t{p.stride_w} + (p.across - 1) * int64_t{p.merged} * p.dilation_w + 1;
    tap_by_tap = by_tap || halo_rows >= 4096 || halo_width >= 4096 ||
                 halo_rows * halo_width >= int64_t{p.positions} * tile_y * kTileX;
    rows = tap_by_tap ? tile_y : static_cast<int>(halo_rows);
    width = tap_by_tap ? kTileX : static_cast<int>(halo_width);
    step_h = tap_by_tap ? p.stride_h : 1;
    step_w = tap_by_tap ? p.stride_w : 1;
    by_width = static_cast<uint32_t>((0xFFFFFFFFull + width) / width);
    const int64_t slabs = int64_t{p.planes} * p.slabs, chunks = slabs * p.chunks;
    stages = chunks < kStages ? static_cast<int>(chunks) : kStages;
    stage_bytes = p.chunk_steps * 2 * unit_bytes;
    // Beside the pixels in use those of the chunks that are under way: one slab, or as many as they span.
    const int64_t most = tap_by_tap ? kStages : 1 + (kStages - 1 + p.chunks - 1) / p.chunks;
    const int64_t all = tap_by_tap ? chunks : slabs;
    buffers = static_cast<int>(all < most ? all : most);
    buffer_bytes = (tap_by_tap ? p.chunk_steps * 2 : p.slab_units) * rows * width * kUnitBytes;
  }
  BASISCONV_EITHER int pixels_offset() const { return filters_bytes + stages * stage_bytes; }
  // The epilogue's staging lies over the mainloop's memory.
  BASISCONV_EITHER int64_t bytes() const {
    const int64_t mainloop = pixels_offset() + int64_t{buffers} * buffer_bytes;
    const int64_t epilogue = filters_bytes + kThreads / 32 * Staging<MT, N8>::bytes;
    return mainloop > epilogue ? mainloop : epilogue;
  }
};

// A word of a group's channels at a pixel. Groups that begin inside a word have their bits in two of them; bits of the
// next group may stand behind the last: the filters, that of ones too, have zeros there.
BASISCONV_DEVICE uint32_t word_of(const Problem& p, const uint32_t* pixel, int group, int word) {
  const int64_t bit = static_cast<int64_t>(group) * p.C + word * 32;
  const int at = static_cast<int>(bit / 32), shift = static_cast<int>(bit % 32);
  const uint32_t low = pixel[at] >> shift;
  return shift != 0 && at + 1 < p.words ? low | pixel[at + 1] << (32 - shift) : low;
}

// Input pixels from (y, x) on: `units` units of each, the first of them `unit` among those of the group; they lie
// `pitch` bytes apart. Outside the image, and behind the last word, bits are zero.
template <class Layout>
BASISCONV_DEVICE void fetch_pixels(const Problem& p, const Layout& layout, char* to, int pitch, int n, int plane, int y,
                                   int x, int unit, int units, int group) {
  const uint32_t* image = p.input + (static_cast<int64_t>(n) * p.planes + plane) * p.H * p.W * p.words;
  const int pixels = layout.rows * layout.width;
  for (int i = threadIdx.x; i < pixels * units; i += kThreads) {
    const int pixel = units == 2 ? i / 2 : i, which = units == 2 ? i % 2 : 0;
    const int row = static_cast<int>(static_cast<uint64_t>(pixel) * layout.by_width >> 32);
    const int at_y = y + row * layout.step_h, at_x = x + (pixel - row * layout.width) * layout.step_w;
    const bool row_inside = at_y >= 0 && at_y < p.H;
    const int word = (unit + which) * kUnitWords;
    char* here = to + which * pitch + pixel * kUnitBytes;
    if (p.input_in_16_bytes) {
      const bool inside = row_inside && at_x >= 0 && at_x < p.W && word < p.group_words;
      const uint32_t* from = image + (static_cast<int64_t>(at_y) * p.W + at_x) * p.words + group * (p.C / 32) + word;
      cp_async16(here, inside ? static_cast<const void*>(from) : p.filters, inside ? kUnitBytes : 0);
      continue;
    }
    uint32_t words[kUnitWords];
    const int slot_words = kUnitWords / p.merged;
#pragma unroll
    for (int j = 0; j < kUnitWords; ++j) {
      const int column = at_x + j / slot_words * p.dilation_w, of_group = word + j % slot_words;
      const bool inside = row_inside && column >= 0 && column < p.W && of_group < p.group_words;
      words[j] =
          inside ? word_of(p, image + (static_cast<int64_t>(at_y) * p.W + column) * p.words, group, of_group) : 0;
    }
    *reinterpret_cast<uint4*>(here) = uint4{words[0], words[1], words[2], words[3]};
  }
}

// The taps of a unit: a row of the filter, and how many units of it come before.
struct Position {
  int r, s;

  BASISCONV_DEVICE void advance(const Problem& p, int count) {
    for (s += count; s >= p.across; s -= p.across) ++r;
  }
  BASISCONV_DEVICE int down(const Problem& p) const { return r * p.dilation_h; }
  BASISCONV_DEVICE int right(const Problem& p) const { return s * p.merged * p.dilation_w; }
};

template <int MT, int N8>
__global__ void __launch_bounds__(kThreads, 4) binary_conv2d_sm80(const Problem p, const Layout<MT, N8> layout) {
  using L = Layout<MT, N8>;
  char* memory = shared_memory();
  Filter* filters = reinterpret_cast<Filter*>(memory);
  char* stages = memory + L::filters_bytes;
  char* pixel_buffers = memory + layout.pixels_offset();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // Locate.
  const int group = blockIdx.y / p.blocks, block = blockIdx.y % p.blocks, first = block * L::columns;
  const int tiles_x = (p.OW + kTileX - 1) / kTileX, tiles_y = (p.OH + L::tile_y - 1) / L::tile_y;
  const int n = blockIdx.x / tiles_x / tiles_y;
  const int oy = blockIdx.x / tiles_x % tiles_y * L::tile_y, ox = blockIdx.x % tiles_x * kTileX;
  const int iy = oy * p.stride_h - p.pad_top, ix = ox * p.stride_w - p.pad_left;
  const char* tile = p.filters + static_cast<int64_t>(blockIdx.y) * p.tile_bytes;
  const int pixels = layout.rows * layout.width;

  // A chunk is a few steps of one slab of one plane, the highest plane first; in halo mode the pixels of a slab travel
  // with its first chunk. Every chunk commits a group, so that as many are under way in the last as in the first.
  const int all = p.planes * p.slabs * p.chunks;
  int ahead = 0, ahead_chunk = 0, ahead_slab = 0, ahead_plane = p.planes - 1, ahead_stage = 0, ahead_buffer = 0;
  auto fetch = [&] {
    if (ahead < all) {
      const int step = ahead_chunk * p.chunk_steps, steps = min(p.chunk_steps, p.steps - step);
      const char* from = tile + (static_cast<int64_t>(ahead_slab) * p.steps + step) * 2 * L::unit_bytes;
      char* to = stages + ahead_stage * layout.stage_bytes;
      for (int i = threadIdx.x * 16; i < steps * 2 * L::unit_bytes; i += kThreads * 16)
        cp_async16(to + i, from + i, 16);
      char* buffer = pixel_buffers + ahead_buffer * layout.buffer_bytes;
      const int fetches = layout.tap_by_tap ? steps * 2 : step == 0 ? 1 : 0;
#pragma unroll 1
      for (int i = 0; i < fetches; ++i) {
        int down = 0, right = 0, unit = ahead_slab * p.slab_units;
        if (layout.tap_by_tap) {
          const int position = (step * 2 + i) / p.slab_units;
          unit += (step * 2 + i) % p.slab_units;
          if (position < p.positions) {  // else its filters are zeros: any bits will do
            down = position / p.across * p.dilation_h;
            right = position % p.across * p.merged * p.dilation_w;
          }
        }
        fetch_pixels(p, layout, buffer + i * pixels * kUnitBytes, pixels * kUnitBytes, n, ahead_plane, iy + down,
                     ix + right, unit, layout.tap_by_tap ? 1 : p.slab_units, group);
      }
      ++ahead;
      if (++ahead_stage == layout.stages) ahead_stage = 0;
      if (++ahead_chunk == p.chunks) {
        ahead_chunk = 0;
        if (++ahead_slab == p.slabs) ahead_slab = 0, --ahead_plane;
      }
      if ((layout.tap_by_tap || ahead_chunk == 0) && ++ahead_buffer == layout.buffers) ahead_buffer = 0;
    }
    cp_async_commit();
  };

  // ldmatrix.x4 of A: lanes 0-15 address 16 pixels of a step's first unit, lanes 16-31 of its second; of B: lanes 0-7
  // and 8-15 eight filters of both units, the others the next eight.
  const int half = lane / 16;
  const int pixel_y = warp * MT * 2 + lane % 16 / kTileX, pixel_x = lane % kTileX;
  const int a_row =
      layout.tap_by_tap ? pixel_y * kTileX + pixel_x : pixel_y * p.stride_h * layout.width + pixel_x * p.stride_w;
  const int a_lane = (a_row + (p.slab_units == 2 || layout.tap_by_tap ? half * pixels : 0)) * kUnitBytes;
  const int a_next = (layout.tap_by_tap ? 2 * kTileX : 2 * p.stride_h * layout.width) * kUnitBytes;
  const int b_lane = lane / 8 % 2 * L::unit_bytes + (lane / 16 * 8 + lane % 8) * kUnitBytes;
  const int ones_lane = L::columns * kUnitBytes + lane % 4 * 4;

  int sums[MT][N8][4] = {}, ones[MT][4] = {};
  int chunk = 0, slab = 0, stage = 0, buffer = 0;
  Position at{0, 0};
  for (int done = 1 - kStages; done < all; ++done) {
    if (done >= 0) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // this chunk has landed for all, and all are done with the slot that is filled next
    }
    fetch();
    if (done == -1) {  // while the first chunks are under way
      for (int i = threadIdx.x; i < L::columns; i += kThreads) filters[i] = filter_of(p, group, first + i);
    }
    if (done < 0) continue;
    if (chunk == 0) {
      at = {0, 0};
      if (p.slab_units == 1) at.advance(p, half);
      if (slab == 0 && done != 0) {  // the next lower plane
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            ones[m][i] *= 2;
#pragma unroll
            for (int j = 0; j < N8; ++j) sums[m][j][i] *= 2;
          }
        }
      }
    }
    const int steps = min(p.chunk_steps, p.steps - chunk * p.chunk_steps);
    const char* a_tile = pixel_buffers + buffer * layout.buffer_bytes + a_lane;
    const char* b_tile = stages + stage * layout.stage_bytes;
    for (int step = 0; step < steps; ++step, b_tile += 2 * L::unit_bytes) {
      int shift = step * 2 * pixels;
      if (!layout.tap_by_tap) {
        shift = at.r < p.R ? at.down(p) * layout.width + at.right(p) : 0;
        at.advance(p, p.slab_units == 2 ? 1 : 2);
      }
      uint32_t a[MT][4];
#pragma unroll
      for (int m = 0; m < MT; ++m) ldmatrix_x4(a[m], a_tile + shift * kUnitBytes + m * a_next);
      const uint32_t one0 = *reinterpret_cast<const uint32_t*>(b_tile + ones_lane);
      const uint32_t one1 = *reinterpret_cast<const uint32_t*>(b_tile + ones_lane + L::unit_bytes);
#pragma unroll
      for (int m = 0; m < MT; ++m) mma_m16n8k256_and_popc(ones[m], a[m], one0, one1);
#pragma unroll
      for (int j = 0; j < N8 / 2; ++j) {
        uint32_t b[4];
        ldmatrix_x4(b, b_tile + b_lane + j * 16 * kUnitBytes);
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          mma_m16n8k256_and_popc(sums[m][2 * j], a[m], b[0], b[1]);
          mma_m16n8k256_and_popc(sums[m][2 * j + 1], a[m], b[2], b[3]);
        }
      }
    }
    if (++stage == layout.stages) stage = 0;
    if (++chunk == p.chunks) {
      chunk = 0;
      if (++slab == p.slabs) slab = 0;
    }
    if ((layout.tap_by_tap || chunk == 0) && ++buffer == layout.buffers) buffer = 0;
  }

  // Store.
  cp_async_wait<0>();
  __syncthreads();  // nobody reads the mainloop's memory
  const Staging<MT, N8> staging{stages + warp * Staging<MT, N8>::bytes};
  staging.put(sums, ones);
  store_tile<MT, N8>(p, filters, staging, n, oy + warp * MT * 2, ox, group, first);
}

template <int MT, int N8>
const char* launch_sm80(const Problem& p, const CudaDevice& device, Stream stream) {
  using L = Layout<MT, N8>;
  const int64_t tiles = int64_t{p.N} * ceil_div(p.OH, L::tile_y) * ceil_div(p.OW, kTileX);
  if (tiles > 0x7FFFFFFF) return "more than 2^31 tiles of pixels; split the batch";
  L layout(p, false);
  if (layout.bytes() > device.shared_bytes) layout = L(p, true);
  if (layout.bytes() > device.shared_bytes) return "this device has too little shared memory";
  const dim3 grid{static_cast<unsigned>(tiles), static_cast<unsigned>(p.groups * p.blocks), 1};
  return launch(binary_conv2d_sm80<MT, N8>, grid, dim3{kThreads, 1, 1}, layout.bytes(), stream, p, layout);
}

}  // namespace

// Twice the pixels a block read the filters half as often; not where rows would be wasted, or blocks be too few.
const char* run_sm80(const Problem& p, const CudaDevice& device, Stream stream) {
  if (p.blocks * (p.K <= kFewFilters ? kFewFilters : 64) != p.padded) return "the packed filters are of another width";
  if (p.K <= kFewFilters) return launch_sm80<1, kFewFilters / 8>(p, device, stream);
  const int64_t small = ceil_div(p.OH, 8), large = ceil_div(p.OH, 16);
  const int64_t blocks = int64_t{p.N} * large * ceil_div(p.OW, kTileX) * p.groups * p.blocks;
  const bool twice = 2 * large <= small + 1 && small > 1 && blocks >= 2 * int64_t{device.multiprocessors};
  return twice ? launch_sm80<2, 8>(p, device, stream) : launch_sm80<1, 8>(p, device, stream);
}

}  // namespace basisconv::cuda::binary
