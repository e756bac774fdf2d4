// What the sm_90a kernels with halo tiles share: places in rings of mbarriers, tiles of the output, parts of a cluster.
#pragma once
#include "basis_conv2d_problem.h"
#include "hopper.h"

namespace basisconv::cuda {

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

  BASISCONV_DEVICE Bars(uint64_t* first, int ring) : full(first + 2 * ring * kMostStages), empty(full + kMostStages) {}
};

// Where the tile of a number begins, in the output; it has the same pixels of so many images.
struct Tile {
  int n, y, x;

  BASISCONV_DEVICE Tile(const Problem& p, int tile_y, int number, int images = 1) {
    const int across = (p.OW + kTileX - 1) / kTileX;
    const int down = (p.OH + tile_y - 1) / tile_y;
    n = number / across / down * images;
    y = number / across % down * tile_y;
    x = number % across * kTileX;
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

// A warp is done with a place, or with what it wrote: the last one that is lets the others go on.
BASISCONV_DEVICE void release(uint64_t* bar) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) bar_arrive(bar);
}

}  // namespace basisconv::cuda
