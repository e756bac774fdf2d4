// binary_conv2d on the CPU by counting bits: the loops over passes, blocks of filters and tiles. Compiled once per
// instruction set (BASISCONV_ISA).
//
// Input real (packed on the way in), signs or codes; output whole numbers, floats or bits. Wins over int8 because a
// register holds 128 to 512 pairs of bits and nothing but bits moves between the layers.
// Test: tests/ops/test_binary_conv2d.py. Bench: python -m bench.binary_conv2d.
#include "binary_conv2d.h"

#include "binary_conv2d_pack.h"
#include "binary_conv2d_rows.h"
#include "binary_conv2d_store.h"

#if defined(BASISCONV_VPOPCNTDQ) || !(defined(BASISCONV_AVX512) || defined(BASISCONV_AVX2))
#define BASISCONV_WORDS
#include "binary_conv2d_words.h"
#else
#include "binary_conv2d_nibbles.h"
#endif

#define BASISCONV_JOIN2(a, b) a##b
#define BASISCONV_JOIN(a, b) BASISCONV_JOIN2(a, b)

namespace basisconv {
namespace BASISCONV_ISA {

constexpr int64_t kMostBlock = 64, kMostPixels = 8;

// A tile: the counts of all planes, then the result.
struct Tile {
  const BinaryConv2dParams& p;
  const BinaryPlan& plan;
  alignas(64) int32_t raw[kMostPixels * kMostBlock];
  alignas(64) int32_t of_plane[kMostPixels * kMostBlock];
  alignas(64) float values[kMostBlock];

#if !defined(BASISCONV_WORDS)
  template <int P, int F>
  BASISCONV_INLINE void count_vectors(const Taps& taps, const uint8_t* bits, int32_t* to) {
    Sums<P, F> sums;
    count_nibbles<P, F>(taps, bits, sums, to);
    sums.spill(to);
  }
#endif

  template <int P>
  BASISCONV_INLINE void count(const Taps& taps, const uint8_t* bits, int32_t* to) {
#if defined(BASISCONV_WORDS)
    if (plan.pack.vectors == 2) return count_words<P, 2>(taps, bits, to);
    count_words<P, 1>(taps, bits, to);
#else
    if constexpr (Bytes::kMostVectors == 2) {
      if (plan.pack.vectors == 2) return count_vectors<P, 2>(taps, bits, to);
    }
    count_vectors<P, 1>(taps, bits, to);
#endif
  }

  template <int P>
  BASISCONV_NOINLINE void run(Taps taps, const uint8_t* bits, const Spot& at, const int32_t* table_of_row,
                              int64_t class_size) {
    count<P>(taps, bits, raw);
    for (int32_t plane = 1; plane < p.planes; plane++) {
      taps.offset += plan.plane_bytes;
      count<P>(taps, bits, of_plane);
      for (int64_t i = 0; i < P * plan.pack.block; i++) raw[i] += of_plane[i] << plane;
    }
    store_tile(p, at, P, raw, plan.pack.block, table_of_row, class_size, values);
  }

  // As many pixels as are left, at most P.
  template <int P>
  BASISCONV_INLINE void run_at_most(int64_t pixels, const Taps& taps, const uint8_t* bits, const Spot& at,
                                    const int32_t* table_of_row, int64_t class_size) {
    if constexpr (P > 1) {
      if (pixels < P) return run_at_most<P - 1>(pixels, taps, bits, at, table_of_row, class_size);
    }
    run<P>(taps, bits, at, table_of_row, class_size);
  }
};

#if defined(BASISCONV_WORDS)
constexpr int kMostTile = Words::kPixels;
#else
constexpr int kMostTile = 7;
#endif
static_assert(kMostTile <= kMostPixels, "a tile has room for its counts");

static void run(const BinaryConv2dParams& p, const BinaryPlan& plan, uint8_t* scratch, int64_t begin, int64_t end) {
  const BinaryConv2dWeights& w = p.weights;
  const BinaryPack& pack = plan.pack;
  const int64_t ring_bytes = (plan.ring_rows * plan.row_bytes + 63) / 64 * 64;
  const int64_t line_bytes = (plan.line_words * 4 + 63) / 64 * 64;
  uint32_t* line = reinterpret_cast<uint32_t*>(scratch + ring_bytes);
  Ring ring{p, plan, scratch, Lines{p, line, line + p.W * words_for(w.C)}};
  const uint8_t** pointers = reinterpret_cast<const uint8_t**>(scratch + ring_bytes + line_bytes);
  const uint8_t* bits = static_cast<const uint8_t*>(p.packed) + pack.counts_bytes;
  const int64_t tap_bytes = pack.units * pack.block * pack.unit_bytes;
  const int64_t class_size = w.groups * pack.padded, filters = w.K / w.groups;
  Tile tile{p, plan, {}, {}, {}};

  Taps taps{};
  taps.pixel_step = p.stride_w * plan.pixel_bytes;
  taps.runs = p.dilation_w == 1 ? 1 : w.S;
  taps.run_units = pack.units * (p.dilation_w == 1 ? w.S : 1);
  taps.run_step = p.dilation_w * plan.pixel_bytes;

  for (int64_t unit = begin; unit < end; unit++) {
    const int64_t n = unit / plan.passes, first = unit % plan.passes * plan.rows;
    const int64_t last = first + plan.rows < p.OH ? first + plan.rows : p.OH;
    if (p.output_type == BinaryOutput::packed) {
      const int64_t row_words = p.OW * words_for(w.K);
      memset(static_cast<uint32_t*>(p.output) + (n * p.OH + first) * row_words, 0, (last - first) * row_words * 4);
    }
    // The valid taps of each output row, and the input rows of all of them.
    int64_t low[kMostPassRows], count[kMostPassRows], from = p.H, to = 0;
    for (int64_t y = first; y < last; y++) {
      const int64_t i = y - first;
      count[i] = 0;
      low[i] = 0;
      for (int64_t r = 0; r < w.R; r++) {
        const int64_t row = y * p.stride_h + r * p.dilation_h - p.pad_top;
        if (row < 0 || row >= p.H) continue;
        if (count[i]++ == 0) low[i] = r;
        from = row < from ? row : from;
        to = row + 1 > to ? row + 1 : to;
      }
    }
    if (from < to) ring.hold(n, from, to);
    for (int64_t y = first; y < last; y++) {
      const int64_t i = y - first;
      for (int64_t r = 0; r < count[i]; r++) {
        pointers[i * w.R + r] = ring.row(y * p.stride_h + (low[i] + r) * p.dilation_h - p.pad_top);
      }
    }
    for (int64_t g = 0; g < w.groups; g++) {
      for (int64_t block = 0; block < pack.blocks; block++) {
        const uint8_t* of_block = bits + (g * pack.blocks + block) * w.R * w.S * tap_bytes;
        const int64_t padded = g * pack.padded + block * pack.block, left = filters - block * pack.block;
        Spot at{};
        at.n = n;
        at.k = g * filters + block * pack.block;
        at.count = left < pack.block ? left : pack.block;
        at.flip = p.flip + padded;
        for (at.y = first; at.y < last; at.y++) {
          const int64_t i = at.y - first;
          taps.rows = pointers + i * w.R;
          taps.count = count[i];
          const int32_t* table = p.table + p.row_class[at.y] * p.column_classes * class_size + padded;
          const uint8_t* of_taps = of_block + low[i] * w.S * tap_bytes;
          for (at.x = 0; at.x < p.OW; at.x += pack.pixels) {
            taps.offset = (g * plan.columns + at.x * p.stride_w) * plan.pixel_bytes;
            const int64_t pixels = p.OW - at.x < pack.pixels ? p.OW - at.x : pack.pixels;
            tile.run_at_most<kMostTile>(pixels, taps, of_taps, at, table, class_size);
          }
        }
      }
    }
  }
}

}  // namespace BASISCONV_ISA

CpuBinaryConv2d BASISCONV_JOIN(cpu_binary_conv2d_, BASISCONV_ISA)() {
  return {BASISCONV_ISA::pack, BASISCONV_ISA::run};
}

}  // namespace basisconv
