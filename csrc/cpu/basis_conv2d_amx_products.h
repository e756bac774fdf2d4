// Products of tiles on the matrix unit: up to six tiles of pixels with the same weights.
#pragma once
#include "band.h"
#include "basis_conv2d_amx_tiles.h"
#include "simd.h"

namespace basisconv {
namespace BASISCONV_ISA {

// The rows of a product are those of its first factor: pixels (channels_last, and stage 1), or outputs (NCHW).
enum class Rows { pixels, outputs };

// Up to kTogether tiles of sums, and of pixels. A row is a pixel, or an output of sums in NCHW; bytes from one to the
// next.
struct Sums {
  float* tiles[kTogether];
  int64_t row;
};
struct Pixels {
  const bf16* tiles[kTogether];
  int64_t count, row;
};

// Tile register T holds the sums of pixel tile T, 6 pixels, 7 weights. The intrinsics take numbers of registers as they
// are written only, no template's.
#define BASISCONV_PIXEL_TILE(T)                                                  \
  template <Rows ROWS>                                                           \
  static BASISCONV_INLINE void add_product##T(const bf16* pixels, int64_t row) { \
    _tile_loadd(6, pixels, row);                                                 \
    if constexpr (ROWS == Rows::pixels) {                                        \
      _tile_dpbf16ps(T, 6, 7);                                                   \
    } else {                                                                     \
      _tile_dpbf16ps(T, 7, 6);                                                   \
    }                                                                            \
  }
BASISCONV_PIXEL_TILE(0)
BASISCONV_PIXEL_TILE(1)
BASISCONV_PIXEL_TILE(2)
BASISCONV_PIXEL_TILE(3)
BASISCONV_PIXEL_TILE(4)
BASISCONV_PIXEL_TILE(5)
#undef BASISCONV_PIXEL_TILE

// What a product reads: values from the first pixel of each tile, and from the first weight.
struct Step {
  int64_t pixels, weights;
};

template <int TILES, Rows ROWS>
static void multiply_tiles(const Pixels& pixels, const Step* steps, int64_t count, const bf16* weights,
                           const Sums& sums) {
  static_assert(1 <= TILES && TILES <= kTogether);
  const int64_t row = pixels.row;
  _tile_zero(0);
  if constexpr (TILES > 1) _tile_zero(1);
  if constexpr (TILES > 2) _tile_zero(2);
  if constexpr (TILES > 3) _tile_zero(3);
  if constexpr (TILES > 4) _tile_zero(4);
  if constexpr (TILES > 5) _tile_zero(5);
  for (int64_t i = 0; i < count; i++) {
    const int64_t at = steps[i].pixels;
    _tile_loadd(7, weights + steps[i].weights, kTileRow);
    add_product0<ROWS>(pixels.tiles[0] + at, row);
    if constexpr (TILES > 1) add_product1<ROWS>(pixels.tiles[1] + at, row);
    if constexpr (TILES > 2) add_product2<ROWS>(pixels.tiles[2] + at, row);
    if constexpr (TILES > 3) add_product3<ROWS>(pixels.tiles[3] + at, row);
    if constexpr (TILES > 4) add_product4<ROWS>(pixels.tiles[4] + at, row);
    if constexpr (TILES > 5) add_product5<ROWS>(pixels.tiles[5] + at, row);
  }
  _tile_stored(0, sums.tiles[0], sums.row);
  if constexpr (TILES > 1) _tile_stored(1, sums.tiles[1], sums.row);
  if constexpr (TILES > 2) _tile_stored(2, sums.tiles[2], sums.row);
  if constexpr (TILES > 3) _tile_stored(3, sums.tiles[3], sums.row);
  if constexpr (TILES > 4) _tile_stored(4, sums.tiles[4], sums.row);
  if constexpr (TILES > 5) _tile_stored(5, sums.tiles[5], sums.row);
}

// Sums of each tile = Σ over the steps of its pixels times the weights.
template <Rows ROWS>
static void multiply(const Pixels& pixels, const Step* steps, int64_t count, const bf16* weights, const Sums& sums) {
  switch (pixels.count) {
    case 1:
      return multiply_tiles<1, ROWS>(pixels, steps, count, weights, sums);
    case 2:
      return multiply_tiles<2, ROWS>(pixels, steps, count, weights, sums);
    case 3:
      return multiply_tiles<3, ROWS>(pixels, steps, count, weights, sums);
    case 4:
      return multiply_tiles<4, ROWS>(pixels, steps, count, weights, sums);
    case 5:
      return multiply_tiles<5, ROWS>(pixels, steps, count, weights, sums);
    default:
      return multiply_tiles<6, ROWS>(pixels, steps, count, weights, sums);
  }
}

// Calls run(first, number) for tiles in equal shares of at most kTogether.
template <typename Run>
static BASISCONV_INLINE void in_shares(int64_t count, const Run& run) {
  const int64_t share = even_share(count, kTogether);
  for (int64_t t = 0; t < count; t += share) run(t, count - t < share ? count - t : share);
}

}  // namespace BASISCONV_ISA
}  // namespace basisconv
