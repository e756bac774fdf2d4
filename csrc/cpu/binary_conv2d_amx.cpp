// binary_conv2d on the matrix unit of x86 (AMX): products of 16x64 by 64x16 tiles of bytes.
//
// A pixel's channel is its sign or code as a byte, the padding value outside the image; a filter's is 1 - 2w, the sign
// turned round, expanded from the words that the counting kernels read, once a pass, into tiles that stay in the cache.
// Output pixels are numbered through the padded rows of a pass: 16 of them in a row are one tile load, whichever rows
// they lie in, and what falls between the rows is not stored. All planes of a code are one product. Where the channels
// do not stay in the first-level cache together, the sums of a pass wait there from chunk to chunk. Wins where a tile
// has enough to multiply: see binary_plan. Test: tests/packaging/test_binary_without_torch.py. Bench: python -m bench
// run --suite C5 --suite C6.
#include "band.h"
#include "binary_conv2d.h"
#include "binary_conv2d_lines.h"
#include "binary_conv2d_pack.h"
#include "binary_conv2d_store.h"
#include "tiles.h"

namespace basisconv {
namespace BASISCONV_ISA {
namespace {

constexpr int64_t kSide = 16;  // pixels or filters of a tile
static_assert(kTileChannels == 64, "bytes of a tile row");
constexpr int64_t kTileBytes = kSide * kTileChannels;
constexpr int64_t kMostTiles = 4;  // of pixels, each with its accumulator

// One tap of 64 channels: where its pixels lie in the band, and its filters in the packed weights.
struct Product {
  int64_t pixels, filters;  // bytes
  bool whole;               // two words of channels, not one
};

// Whether some tap of an axis reads every stride-th pixel from `phase` on.
bool reads(int64_t taps, int64_t dilation, int64_t stride, int64_t phase) {
  for (int64_t t = 0; t < taps; t++) {
    if (t * dilation % stride == phase) return true;
  }
  return false;
}

// The input of a pass: [groups][chunks of 64 channels][row phases][column phases][rows][columns][64].
struct ByteBand {
  const BinaryConv2dParams& p;
  const BinaryPlan& plan;
  uint8_t* bytes;
  Lines lines;

  void fill(int64_t n, int64_t first, int64_t rows) const {
    const int64_t count = rows + (p.weights.R - 1) * p.dilation_h / p.stride_h;
    for (int64_t phase = 0; phase < p.stride_h; phase++) {
      if (!reads(p.weights.R, p.dilation_h, p.stride_h, phase)) continue;
      uint8_t* to = bytes + phase * p.stride_w * plan.phase_bytes;
      for (int64_t i = 0; i < count; i++, to += plan.columns * kTileChannels) {
        const int64_t y = (first + i) * p.stride_h + phase - p.pad_top;
        if (0 <= y && y < p.H) {
          row(n, y, to);
        } else {
          outside_row(to);
        }
      }
    }
  }

  // Bit i: whether channel i of this chunk is one of the group's; the others are zero everywhere.
  __mmask64 channels(int64_t chunk) const {
    const int64_t left = p.weights.C / p.weights.groups - chunk % plan.chunks * kTileChannels;
    return left < kTileChannels ? (__mmask64{1} << left) - 1 : ~__mmask64{0};
  }
  __m512i outside(int64_t chunk) const {
    return _mm512_maskz_mov_epi8(channels(chunk), _mm512_set1_epi8(static_cast<char>(p.padding_value)));
  }

  void outside_row(uint8_t* to) const {
    for (int64_t c = 0; c < p.weights.groups * plan.chunks; c++) {
      const __m512i value = outside(c);
      for (int64_t phase = 0; phase < p.stride_w; phase++) {
        uint8_t* pixel = to + c * plan.chunk_bytes + phase * plan.phase_bytes;
        for (int64_t x = 0; x < plan.columns; x++) _mm512_storeu_si512(pixel + x * kTileChannels, value);
      }
    }
  }

  void row(int64_t n, int64_t y, uint8_t* to) const {
    const int64_t words = words_for(p.weights.C / p.weights.groups);
    for (int32_t plane = 0; plane < p.planes; plane++) {
      const uint32_t* bits = lines.of_row(n, y, plane);
      for (int64_t g = 0; g < p.weights.groups; g++) {
        const uint32_t* of_group = lines.of_group(bits, g);
        for (int64_t c = 0; c < plan.chunks; c++) {
          const int64_t bytes_left = (words - 2 * c) * 4;
          for (int64_t phase = 0; phase < p.stride_w; phase++) {
            if (!reads(p.weights.S, p.dilation_w, p.stride_w, phase)) continue;
            pixels(of_group + 2 * c, bytes_left < 8 ? 4 : 8, plane, phase, c,
                   to + (g * plan.chunks + c) * plan.chunk_bytes + phase * plan.phase_bytes);
          }
        }
      }
    }
  }

  // Every stride-th pixel: signs become bytes; the bits of a code are added up, plane by plane.
  void pixels(const uint32_t* bits, size_t size, int32_t plane, int64_t phase, int64_t chunk, uint8_t* to) const {
    const int64_t words = words_for(p.weights.C / p.weights.groups);
    const __m512i value = _mm512_set1_epi8(static_cast<char>(1 << plane)), zero = _mm512_setzero_si512();
    const __m512i minus = p.codes ? zero : _mm512_maskz_mov_epi8(channels(chunk), _mm512_set1_epi8(-1));
    const __m512i beside = outside(chunk);
    int64_t x = phase - p.pad_left;
    for (int64_t i = 0; i < plan.columns; i++, x += p.stride_w, to += kTileChannels) {
      if (x < 0 || x >= p.W) {
        _mm512_storeu_si512(to, beside);
        continue;
      }
      uint64_t set = 0;
      if (size == 8) {
        memcpy(&set, bits + x * words, 8);
      } else {
        memcpy(&set, bits + x * words, 4);
      }
      const __m512i before = plane == 0 ? zero : _mm512_loadu_si512(to);
      _mm512_storeu_si512(to, _mm512_mask_add_epi8(plane == 0 ? minus : before, set, before, value));
    }
  }
};

// The words of 16 filters to a tile [16 times 4 channels][16 filters][4 channels] of 1 - 2w: four bits of a filter
// index a table of four bytes.
struct Expander {
  __m512i table =
      _mm512_setr_epi32(0x01010101, 0x010101ff, 0x0101ff01, 0x0101ffff, 0x01ff0101, 0x01ff01ff, 0x01ffff01, 0x01ffffff,
                        static_cast<int>(0xff010101), static_cast<int>(0xff0101ff), static_cast<int>(0xff01ff01),
                        static_cast<int>(0xff01ffff), static_cast<int>(0xffff0101), static_cast<int>(0xffff01ff),
                        static_cast<int>(0xffffff01), static_cast<int>(0xffffffff));

  BASISCONV_INLINE void rows(__m512i words, uint8_t* to) const {
    BASISCONV_UNROLL for (int i = 0; i < 8; i++) {
      _mm512_storeu_si512(to + i * kTileChannels, _mm512_permutexvar_epi32(_mm512_srli_epi32(words, 4 * i), table));
    }
  }
  BASISCONV_INLINE void tile(const uint8_t* filters, int64_t step, bool whole, uint8_t* to) const {
    rows(_mm512_loadu_si512(filters), to);
    rows(whole ? _mm512_loadu_si512(filters + step) : _mm512_setzero_si512(), to + kTileBytes / 2);
    stores_before_tile_loads();
  }
};

struct Tiles {
  const BinaryConv2dParams& p;
  const BinaryPlan& plan;
  int64_t word_bytes;  // from one word of 16 filters to the next
  uint8_t* expanded;   // [plan.kept] tiles of filters
  int64_t turns;       // to which place a product's tile of filters goes: all bits, or those below plan.kept
  alignas(64) int32_t raw[kMostTiles * kSide * kSide];  // [pixels][16 filters]
  alignas(64) float values[kSide];

  uint8_t* place(int64_t product) const { return expanded + (product & turns) * kTileBytes; }

  // Products that are added to the sums of some tiles of pixels in one visit.
  struct Block {
    const Product* products;
    int64_t count;
    bool first;     // the sums begin with these
    int32_t* sums;  // [tiles][pixels][16 filters]
  };

  // T tiles of pixels; kExpand: the filters are expanded on the way, a tile ahead of its use.
  template <int T, bool kExpand>
  void multiply(const Block& block, const uint8_t* pixels, const uint8_t* filters) {
    const Product* products = block.products;
    const int64_t count = block.count;
    int32_t* sums = block.sums;
    if (block.first) {
      _tile_zero(0);
      if constexpr (T > 1) _tile_zero(1);
      if constexpr (T > 2) _tile_zero(2);
      if constexpr (T > 3) _tile_zero(3);
    } else {
      _tile_loadd(0, sums, kSide * 4);
      if constexpr (T > 1) _tile_loadd(1, sums + kSide * kSide, kSide * 4);
      if constexpr (T > 2) _tile_loadd(2, sums + 2 * kSide * kSide, kSide * 4);
      if constexpr (T > 3) _tile_loadd(3, sums + 3 * kSide * kSide, kSide * 4);
    }
    const Expander expander;
    if constexpr (kExpand) expander.tile(filters + products[0].filters, word_bytes, products[0].whole, place(0));
    for (int64_t i = 0; i < count; i++) {
      if (kExpand && i + 1 < count) {
        const Product& next = products[i + 1];
        expander.tile(filters + next.filters, word_bytes, next.whole, place(i + 1));
      }
      const uint8_t* of_pixels = pixels + products[i].pixels;
      _tile_loadd(6, place(i), kTileChannels);
      _tile_loadd(4, of_pixels, kTileChannels);
      _tile_dpbssd(0, 4, 6);
      if constexpr (T > 1) {
        _tile_loadd(5, of_pixels + kTileBytes, kTileChannels);
        _tile_dpbssd(1, 5, 6);
      }
      if constexpr (T > 2) {
        _tile_loadd(4, of_pixels + 2 * kTileBytes, kTileChannels);
        _tile_dpbssd(2, 4, 6);
      }
      if constexpr (T > 3) {
        _tile_loadd(5, of_pixels + 3 * kTileBytes, kTileChannels);
        _tile_dpbssd(3, 5, 6);
      }
    }
    _tile_stored(0, sums, kSide * 4);
    if constexpr (T > 1) _tile_stored(1, sums + kSide * kSide, kSide * 4);
    if constexpr (T > 2) _tile_stored(2, sums + 2 * kSide * kSide, kSide * 4);
    if constexpr (T > 3) _tile_stored(3, sums + 3 * kSide * kSide, kSide * 4);
  }

  // As many tiles as are left, at most T.
  template <int T>
  void multiply_at_most(int64_t tiles, bool expand, const Block& block, const uint8_t* pixels, const uint8_t* filters) {
    if constexpr (T > 1) {
      if (tiles < T) return multiply_at_most<T - 1>(tiles, expand, block, pixels, filters);
    }
    if (expand) return multiply<T, true>(block, pixels, filters);
    multiply<T, false>(block, pixels, filters);
  }

  // The numbered pixels [begin, end) of a pass that starts at row `at.y`, as far as they lie in the output.
  void store(Spot at, int64_t begin, int64_t end, const int32_t* sums, const int32_t* table, int64_t class_size) {
    const int64_t first = at.y;
    for (int64_t i = begin; i < end;) {
      at.y = first + i / plan.columns;
      at.x = i % plan.columns;
      const int64_t row_end = i - at.x + plan.columns, last = i - at.x + p.OW;
      const int64_t pixels = (last < end ? last : end) - i;
      if (pixels > 0) {
        const int32_t* of_row = table + p.row_class[at.y] * p.column_classes * class_size;
        store_tile(p, at, pixels, sums + (i - begin) * kSide, kSide, of_row, class_size, values);
      }
      i = row_end;
    }
  }
};

void run(const BinaryConv2dParams& p, const BinaryPlan& plan, uint8_t* scratch, int64_t begin, int64_t end) {
  const BinaryConv2dWeights& w = p.weights;
  const BinaryPack& pack = plan.pack;
  const int64_t filters = w.K / w.groups, class_size = w.groups * pack.padded, count = plan.products;
  const int64_t word_bytes = pack.block * pack.unit_bytes, tap_bytes = pack.units * word_bytes;
  // The last tile of a pass may reach a few pixels past the band: into the tiles of filters.
  uint8_t* expanded = scratch + plan.band_bytes;
  int32_t* sums = reinterpret_cast<int32_t*>(expanded + plan.kept * kTileBytes);
  Product* products = reinterpret_cast<Product*>(expanded + plan.kept * kTileBytes + plan.sums_bytes);
  uint32_t* line = reinterpret_cast<uint32_t*>(products + count);
  const uint8_t* bits = static_cast<const uint8_t*>(p.packed) + pack.counts_bytes;
  const ByteBand band{p, plan, scratch, Lines{p, line, line + p.W * words_for(w.C)}};
  for (int64_t i = 0; i < count; i++) {
    const int64_t c = i / (w.R * w.S), s = i % w.S, r = i / w.S % w.R;
    const int64_t y = r * p.dilation_h, x = s * p.dilation_w;
    const int64_t phase = y % p.stride_h * p.stride_w + x % p.stride_w;
    const int64_t pixel = y / p.stride_h * plan.columns + x / p.stride_w;
    products[i].pixels = c * plan.chunk_bytes + phase * plan.phase_bytes + pixel * kTileChannels;
    products[i].filters = (r * w.S + s) * tap_bytes + 2 * c * word_bytes;
    products[i].whole = 2 * c + 1 < pack.units;
  }
  const TileRegisters registers;
  Tiles tiles{p, plan, word_bytes, expanded, plan.kept == plan.block ? -1 : plan.kept - 1, {}, {}};

  for (int64_t unit = begin; unit < end; unit++) {
    Spot at{};
    at.n = unit / plan.passes;
    at.y = unit % plan.passes * plan.rows;
    const int64_t rows = at.y + plan.rows < p.OH ? plan.rows : p.OH - at.y;
    if (p.output_type == BinaryOutput::packed) {
      const int64_t row_words = p.OW * words_for(w.K);
      memset(static_cast<uint32_t*>(p.output) + (at.n * p.OH + at.y) * row_words, 0, rows * row_words * 4);
    }
    band.fill(at.n, at.y, rows);
    stores_before_tile_loads();
    const int64_t pixels = (rows - 1) * plan.columns + p.OW;
    const int64_t together = even_share((pixels + kSide - 1) / kSide, kMostTiles) * kSide;
    for (int64_t g = 0; g < w.groups; g++) {
      for (int64_t k = 0; k < filters; k += kSide) {
        const uint8_t* of_block =
            bits + (g * pack.blocks + k / pack.block) * w.R * w.S * tap_bytes + k % pack.block * pack.unit_bytes;
        at.k = g * filters + k;
        at.count = filters - k < kSide ? filters - k : kSide;
        at.flip = p.flip + g * pack.padded + k;
        for (int64_t done = 0; done < count; done += plan.block) {
          const int64_t rest = count - done;
          Tiles::Block block{products + done, rest < plan.block ? rest : plan.block, done == 0, tiles.raw};
          for (int64_t i = 0; i < pixels; i += together) {
            const int64_t left = pixels - i < together ? pixels - i : together;
            const uint8_t* from = scratch + g * plan.chunks * plan.chunk_bytes + i * kTileChannels;
            if (plan.sums_bytes) block.sums = sums + i * kSide;
            tiles.multiply_at_most<kMostTiles>((left + kSide - 1) / kSide, i == 0, block, from, of_block);
            if (rest <= plan.block) tiles.store(at, i, i + left, block.sums, p.table + g * pack.padded + k, class_size);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace BASISCONV_ISA

CpuBinaryConv2d cpu_binary_conv2d_amx() { return {BASISCONV_ISA::pack, BASISCONV_ISA::run}; }

}  // namespace basisconv
