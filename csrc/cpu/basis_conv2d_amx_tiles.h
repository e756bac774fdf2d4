// Sizes of the tiles that basis_conv2d multiplies on the matrix unit.
#pragma once
#include "basis_conv2d_plan.h"
#include "tiles.h"

namespace basisconv {
namespace BASISCONV_ISA {

constexpr int64_t kSide = kAmxSide;        // rows of a tile: pixels, outputs, or channel pairs
constexpr int64_t kDepth = kAmxDepth;      // channels (or maps) of a tile
constexpr int64_t kTile = kSide * kDepth;  // bf16 of a tile
constexpr int64_t kTileRow = 64;           // bytes

constexpr int64_t kTogether = kAmxTogether;
constexpr int64_t kOutputs = 2 * kSide;       // of a block, channels_last: a cache line of bfloat16
constexpr int64_t kBlock = kSide * kOutputs;  // sums of a pixel tile in a block

}  // namespace BASISCONV_ISA
}  // namespace basisconv
