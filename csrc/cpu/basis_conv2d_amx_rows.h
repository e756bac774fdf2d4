// What the matrix unit needs before it can multiply: its configuration, and input rows in bfloat16.
#pragma once
#include "basis_conv2d_plan.h"
#include "simd.h"

namespace basisconv {
namespace BASISCONV_ISA {

constexpr int64_t kSide = 16;              // rows of a tile: pixels, outputs, or channel pairs
constexpr int64_t kDepth = 32;             // channels (or maps) of a tile
constexpr int64_t kTile = kSide * kDepth;  // bf16 of a tile
constexpr int64_t kTileRow = 64;           // bytes

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

// Ring of padded input rows in bf16: [channel_blocks of all groups][stride_w][ring_columns][32 channels].
struct HalfRing {
  bf16* rows;
  int64_t row_size, plane, columns, phases, slots;

  bf16* row(int64_t y) const { return rows + y % slots * row_size; }
  int64_t column(int64_t x) const { return ((x % phases) * columns + x / phases) * kDepth; }
};

// 16 pixels of up to 32 channels whose pixels are neighbours: pairs of channels as 32-bit values, turned.
static inline void turn_pixels(const bf16* from, int64_t channel_stride, int64_t channels, int64_t pixels, bf16* to) {
  Vec::Reg square[kSide];
  const __mmask16 valid = Vec::first(pixels);
  for (int64_t i = 0; i < kSide; i++) {
    const __mmask16 low = 2 * i < channels ? valid : 0, high = 2 * i + 1 < channels ? valid : 0;
    const bf16* row = from + 2 * i * channel_stride;
    const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(low, row));
    const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(high, row + channel_stride));
    square[i] = _mm512_castsi512_ps(_mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
  }
  transpose(square);
  for (int64_t i = 0; i < pixels; i++) _mm512_storeu_si512(to + i * kDepth, _mm512_castps_si512(square[i]));
}

static void fill_row(const BasisConv2dParams& params, const CpuPack& pack, const HalfRing& ring, int64_t n, int64_t y) {
  const int64_t group_channels = params.weights.C / params.weights.groups;
  const bf16* source = static_cast<const bf16*>(params.input) + n * params.input_stride_n + y * params.input_stride_h;
  for (int64_t group = 0; group < params.weights.groups; group++) {
    for (int64_t b = 0; b < pack.channel_blocks; b++) {
      const int64_t rest = group_channels - b * kDepth;
      const int64_t channels = rest < kDepth ? rest : kDepth;
      const __mmask32 valid = channels == kDepth ? ~0u : (1u << channels) - 1u;
      const bf16* from = source + (group * group_channels + b * kDepth) * params.input_stride_c;
      bf16* to = ring.row(y) + (group * pack.channel_blocks + b) * ring.plane;
      if (params.input_stride_c == 1) {
        int64_t phase = params.pad_left % ring.phases, at = params.pad_left / ring.phases;
        for (int64_t x = 0; x < params.W; x++) {
          const __m512i pixel = _mm512_maskz_loadu_epi16(valid, from + x * params.input_stride_w);
          _mm512_storeu_si512(to + (phase * ring.columns + at) * kDepth, pixel);
          if (++phase == ring.phases) {
            phase = 0;
            at++;
          }
        }
      } else if (params.input_stride_w == 1) {
        alignas(64) bf16 staged[kTile];
        for (int64_t x = 0; x < params.W; x += kSide) {
          const int64_t pixels = params.W - x < kSide ? params.W - x : kSide;
          turn_pixels(from + x, params.input_stride_c, channels, pixels, staged);
          for (int64_t i = 0; i < pixels; i++) {
            memcpy(to + ring.column(params.pad_left + x + i), staged + i * kDepth, kTileRow);
          }
        }
      } else {
        for (int64_t x = 0; x < params.W; x++) {
          bf16* pixel = to + ring.column(params.pad_left + x);
          for (int64_t c = 0; c < channels; c++) pixel[c] = from[x * params.input_stride_w + c * params.input_stride_c];
        }
      }
    }
  }
}

}  // namespace BASISCONV_ISA
}  // namespace basisconv
