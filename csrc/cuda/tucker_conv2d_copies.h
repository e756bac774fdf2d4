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

// Pixels of the halo from number `first` on, one slab of channels; zeros outside the image, and behind the channels up
// to the next multiple of 16.
template <class T>
BASISCONV_DEVICE void fetch_pixels(const Problem& p, const Reduction& reduction, const TuckerPlan& plan,
                                   const Window& window, char* to, int first, int c0) {
  const int count = min(plan.group, plan.pixels - first), left = reduction.C - c0;
  const int channels = min(kSlab, (left + 15) / 16 * 16);
  const T* image = static_cast<const T*>(p.input) + window.n * p.in.n + static_cast<int64_t>(c0) * p.in.c;
  if (p.input_in_16_bytes) {
    // Eight lanes a pixel, 16 bytes a lane: a thread keeps its channels and goes down the pixels.
    const int c = threadIdx.x % 8 * 8;
    if (c >= channels) return;
    const int bytes = left <= c ? 0 : left - c < 8 ? (left - c) * 2 : 16;
    const int begin = first + threadIdx.x / 8;
    int row = begin / plan.columns, column = begin % plan.columns;
    for (int pixel = threadIdx.x / 8; pixel < count; pixel += kThreads / 8, column += kThreads / 8) {
      while (column >= plan.columns) column -= plan.columns, ++row;
      const int y = window.iy + row, x = window.ix + column;
      const bool inside = bytes > 0 && y >= 0 && y < p.H && x >= 0 && x < p.W;
      const void* from = inside ? static_cast<const void*>(image + y * p.in.h + x * p.in.w + c) : p.basis;
      cp_async16(to + pixel * TuckerPlan::slab_pitch + c * 2, from, inside ? bytes : 0);
    }
    return;
  }
  for (int i = threadIdx.x; i < count * channels; i += kThreads) {
    const int pixel = p.pixels_side_by_side ? i % count : i / channels;
    const int c = p.pixels_side_by_side ? i / count : i % channels;
    const int y = window.iy + (first + pixel) / plan.columns, x = window.ix + (first + pixel) % plan.columns;
    const bool inside = c < left && y >= 0 && y < p.H && x >= 0 && x < p.W;
    *reinterpret_cast<T*>(to + pixel * TuckerPlan::slab_pitch + c * 2) =
        inside ? image[c * p.in.c + y * p.in.h + x * p.in.w] : T{0};
  }
}

// u_in of one slab, a row a channel; zeros behind the channels and the ranks, up to multiples of 16.
template <class T>
BASISCONV_DEVICE void fetch_factor(const Problem& p, const Reduction& reduction, char* to, int pitch, int c0) {
  const int left = reduction.C - c0, channels = min(kSlab, (left + 15) / 16 * 16), ranks = (p.C + 15) / 16 * 16;
  const T* factor = static_cast<const T*>(reduction.u_in) + c0 * reduction.stride_c;
  if (reduction.in_16_bytes) {
    const int pieces = ranks / 8;
    for (int i = threadIdx.x; i < channels * pieces; i += kThreads) {
      const int c = i / pieces, rank = i % pieces * 8;
      const bool inside = c < left && rank < p.C;
      const void* from = inside ? static_cast<const void*>(factor + c * reduction.stride_c + rank) : p.basis;
      cp_async16(to + c * pitch + rank * 2, from, inside ? 16 : 0);
    }
    return;
  }
  for (int i = threadIdx.x; i < channels * ranks; i += kThreads) {
    const int c = i / ranks, rank = i % ranks;
    *reinterpret_cast<T*>(to + c * pitch + rank * 2) =
        c < left && rank < p.C ? factor[c * reduction.stride_c + rank * reduction.stride_i] : T{0};
  }
}

// Tiles `begin` to `end` of the packed core, of their rows what the ranks need: without the swizzle, at the pitch here.
BASISCONV_DEVICE void fetch_core(const Problem& p, const TuckerPlan& plan, char* to, int begin, int end) {
  const int pieces = min(kSlab, (p.C + 15) / 16 * 16) / 8;
  const char* from = p.basis + static_cast<int64_t>(begin) * plan.core_rows * kSlab * 2;
  for (int i = threadIdx.x; i < (end - begin) * plan.core_rows * pieces; i += kThreads) {
    const int row = i / pieces, piece = i % pieces;
    cp_async16(to + row * plan.core_pitch() + piece * 16, from + swizzled(row * kSlab * 2 + piece * 16, kSlab * 2), 16);
  }
}

// The sequence of all copies: slabs of the image with theirs of u_in, taps of the core, chunks of coefficients. Every
// thread issues its part of each.
template <class T>
struct Jobs {
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
  BASISCONV_DEVICE char* mixing(int chunk) const { return memory + chunk % plan.mixing_stages * plan.mixing_tile(); }

  // A group even where nothing is left to copy: as many are under way in the last jobs as in the first.
  BASISCONV_DEVICE void issue() {
    int job = issued++;
    if (job < plan.reduce_jobs) {
      const int c0 = job % reduction.slabs * kSlab, first = job / reduction.slabs * plan.group;
      fetch_pixels<T>(p, reduction, plan, window, slab(job), first, c0);
      fetch_factor<T>(p, reduction, slab(job) + plan.image_bytes(), plan.pitch(), c0);
    } else if ((job -= plan.reduce_jobs) < plan.core_jobs) {
      const int begin = job * plan.core_tiles, end = min(begin + plan.core_tiles, p.taps * p.slabs);
      fetch_core(p, plan, core(job), begin, end);
    } else if ((job -= plan.core_jobs) < plan.chunks) {
      const char* from = p.mixing + static_cast<int64_t>(job) * plan.mixing_tile();
      char* to = mixing(job);
      for (int i = threadIdx.x * 16; i < plan.mixing_tile(); i += kThreads * 16) cp_async16(to + i, from + i, 16);
    }
    cp_async_commit();
  }
  // The next job's data have landed for all, and all are done with the one before it, whose place is filled anew.
  BASISCONV_DEVICE void next() {
    if (plan.ahead == 2) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    issue();
  }
};

}  // namespace basisconv::cuda
