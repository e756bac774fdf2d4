// What the one-pass kernel of tucker_conv2d brings into shared memory, and when.
#pragma once
#include "tucker_conv2d_plan.h"

namespace basisconv::cuda {

constexpr int kThreads = TuckerPlan::warps * 32;

// The pixels of a tile, and of its halo in the image.
struct Window {
  int n, oy, ox, iy, ix;

  BASISCONV_DEVICE Window(const Problem& p, const TuckerPlan& plan) {
    const int across = (p.OW + kTileX - 1) / kTileX, down = (p.OH + plan.tile_y() - 1) / plan.tile_y();
    const int tile = static_cast<int>(blockIdx.x);
    n = tile / across / down;
    oy = tile / across % down * plan.tile_y();
    ox = tile % across * kTileX;
    iy = oy * p.stride_h - p.pad_top;
    ix = ox * p.stride_w - p.pad_left;
  }
};

// Pixels of the halo from number `first` on, one slab of channels; zeros outside the image and behind the channels.
template <class T>
BASISCONV_DEVICE void fetch_pixels(const Problem& p, const Reduction& reduction, const TuckerPlan& plan,
                                   const Window& window, char* to, int first, int c0) {
  const int count = min(plan.group, plan.pixels - first), left = reduction.C - c0;
  const T* image = static_cast<const T*>(p.input) + window.n * p.in.n + static_cast<int64_t>(c0) * p.in.c;
  if (p.input_in_16_bytes) {
    // Eight lanes a pixel, 16 bytes a lane: a thread keeps its channels and goes down the pixels.
    const int c = threadIdx.x % 8 * 8;
    const int bytes = left <= c ? 0 : left - c < 8 ? (left - c) * 2 : 16;
    const int begin = first + threadIdx.x / 8;
    int row = begin / plan.columns, column = begin % plan.columns;
    for (int pixel = threadIdx.x / 8; pixel < count; pixel += kThreads / 8) {
      const int y = window.iy + row, x = window.ix + column;
      const bool inside = bytes > 0 && y >= 0 && y < p.H && x >= 0 && x < p.W;
      const void* from = inside ? static_cast<const void*>(image + y * p.in.h + x * p.in.w + c) : p.basis;
      cp_async16(to + pixel * TuckerPlan::slab_pitch + c * 2, from, inside ? bytes : 0);
      row += plan.step_rows, column += plan.step_columns;
      if (column >= plan.columns) column -= plan.columns, ++row;
    }
    return;
  }
  for (int i = threadIdx.x; i < count * kSlab; i += kThreads) {
    const int pixel = p.pixels_side_by_side ? i % count : i / kSlab;
    const int c = p.pixels_side_by_side ? i / count : i % kSlab;
    const int y = window.iy + (first + pixel) / plan.columns, x = window.ix + (first + pixel) % plan.columns;
    const bool inside = c < left && y >= 0 && y < p.H && x >= 0 && x < p.W;
    *reinterpret_cast<T*>(to + pixel * TuckerPlan::slab_pitch + c * 2) =
        inside ? image[c * p.in.c + y * p.in.h + x * p.in.w] : T{0};
  }
}

// u_in of one slab, a row a channel; zeros behind the channels and the ranks.
template <class T, int ranks>
BASISCONV_DEVICE void fetch_factor(const Problem& p, const Reduction& reduction, char* to, int c0) {
  constexpr int pitch = TuckerPlan::pitch_of(ranks), lanes = ranks / 8;
  const int left = reduction.C - c0;
  const T* factor = static_cast<const T*>(reduction.u_in) + c0 * reduction.stride_c;
  if (reduction.in_16_bytes) {
    const int rank = threadIdx.x % lanes * 8;
#pragma unroll
    for (int c = threadIdx.x / lanes; c < kSlab; c += kThreads / lanes) {
      const bool inside = c < left && rank < p.C;
      const void* from = inside ? static_cast<const void*>(factor + c * reduction.stride_c + rank) : p.basis;
      cp_async16(to + c * pitch + rank * 2, from, inside ? 16 : 0);
    }
    return;
  }
  for (int i = threadIdx.x; i < kSlab * ranks; i += kThreads) {
    const int c = i / ranks, rank = i % ranks;
    *reinterpret_cast<T*>(to + c * pitch + rank * 2) =
        c < left && rank < p.C ? factor[c * reduction.stride_c + rank * reduction.stride_i] : T{0};
  }
}

// Packed tiles of `packed_rows` rows of `packed_width` numbers into tiles of `rows` rows of `width`: at the pitch of
// the kernel instead of the swizzle, with zeros behind them.
template <int rows, int width>
BASISCONV_DEVICE void fetch_tiles(const Problem& p, char* to, const char* from, int tiles, int packed_rows,
                                  int packed_width) {
  constexpr int lanes = width / 8, pitch = TuckerPlan::pitch_of(width);
  const int column = threadIdx.x % lanes * 8, first = threadIdx.x / lanes;
  // What is wider than a swizzled row lies in tiles side by side.
  const int side = column / kSlab * packed_rows * kSlab * 2, within = column % kSlab * 2, row_bytes = packed_width * 2;
  const int bytes = min(row_bytes, kSlab * 2);
  const int tile_bytes = packed_rows * row_bytes;
  for (int at = first; at < tiles * rows; at += kThreads / lanes) {
    const int tile = at / rows, row = at % rows;
    const bool there = row < packed_rows && column < packed_width;
    const char* piece = from + tile * tile_bytes + side + swizzled(row * bytes + within, bytes);
    cp_async16(to + at * pitch + column * 2, there ? piece : p.basis, there ? 16 : 0);
  }
}

// The sequence of all copies: slabs of the image with theirs of u_in, taps of the core, chunks of coefficients. Every
// thread issues its part of each.
enum class Kind { reduce, core, mixing };

template <class T, int ranks>
struct Jobs {
  static constexpr int ranks_of_slab = ranks < kSlab ? ranks : kSlab;
  const Problem& p;
  const Reduction& reduction;
  const TuckerPlan& plan;
  const Window& window;
  char* memory;
  int issued = 0;

  BASISCONV_DEVICE char* slab(int job) const {
    return memory + plan.slab_offset() + job % plan.slab_stages * plan.slab_bytes();
  }
  BASISCONV_DEVICE char* core(int job) const {
    return memory + plan.core_offset() + job % plan.core_stages * plan.core_tiles * plan.core_tile();
  }
  BASISCONV_DEVICE char* chunk(int number) const {
    return memory + number % (plan.mixing_stages * plan.chunks_together) * plan.mixing_tile();
  }

  // The next one, of this kind or a later one. A group even where nothing is left to copy: as many are under way in the
  // last jobs as in the first.
  template <Kind first_kind>
  BASISCONV_DEVICE void issue() {
    const int of_core = issued - plan.reduce_jobs, job = of_core - plan.core_jobs;
    if (of_core < 0) {
      if constexpr (first_kind == Kind::reduce) {
        const int c0 = issued % reduction.slabs * kSlab, first = issued / reduction.slabs * plan.group;
        fetch_pixels<T>(p, reduction, plan, window, slab(issued), first, c0);
        fetch_factor<T, ranks>(p, reduction, slab(issued) + plan.image_bytes(), c0);
      }
    } else if (job < 0) {
      if constexpr (first_kind != Kind::mixing) {
        const int begin = of_core * plan.core_tiles, end = min(begin + plan.core_tiles, p.taps * p.slabs);
        const char* from = p.basis + static_cast<int64_t>(begin) * plan.core_rows * kSlab * 2;
        fetch_tiles<ranks, ranks_of_slab>(p, core(of_core), from, end - begin, plan.core_rows, kSlab);
      }
    } else if (job < plan.mixing_jobs) {
      const int begin = job * plan.chunks_together, end = min(begin + plan.chunks_together, p.chunks);
      const char* from = p.mixing + static_cast<int64_t>(begin) * kChunk * plan.core_rows * 2;
      fetch_tiles<kChunk, ranks>(p, chunk(begin), from, end - begin, kChunk, plan.core_rows);
    }
    cp_async_commit();
    ++issued;
  }
  // The next job's data have landed for all, and all are done with the one before it, whose place is filled anew.
  BASISCONV_DEVICE void wait() const {
    if (plan.ahead == 2) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
  }
};

}  // namespace basisconv::cuda
