// What the matrix unit needs before it can multiply: its configuration.
#pragma once
#include <cstdint>

#include "simd.h"

namespace basisconv {
namespace BASISCONV_ISA {

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// Eight whole tiles. A constant in memory: the compiler's intrinsic names only its first bytes as read.
static const TileConfig kWholeTiles = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Tile loads name no memory to the compiler either: what they read must have been stored before this line.
static BASISCONV_INLINE void stores_before_tile_loads() { asm volatile("" ::: "memory"); }

// The tile registers belong to the thread; whoever configured them before (oneDNN caches that) finds them as they were.
class TileRegisters {
 public:
  TileRegisters() {
    _tile_storeconfig(&before_);
    _tile_loadconfig(&kWholeTiles);
  }
  ~TileRegisters() {
    if (before_.palette) {
      _tile_loadconfig(&before_);
    } else {
      _tile_release();
    }
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  TileConfig before_ = {};
};

}  // namespace BASISCONV_ISA
}  // namespace basisconv
