// Sizes of the tiles that basis_conv2d multiplies on the matrix unit.
#pragma once
#include <cstdint>

#include "tiles.h"

namespace basisconv {
namespace BASISCONV_ISA {

constexpr int64_t kSide = 16;              // rows of a tile: pixels, outputs, or channel pairs
constexpr int64_t kDepth = 32;             // channels (or maps) of a tile
constexpr int64_t kTile = kSide * kDepth;  // bf16 of a tile
constexpr int64_t kTileRow = 64;           // bytes

}  // namespace BASISCONV_ISA
}  // namespace basisconv
