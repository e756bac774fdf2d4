#include "ternary_conv2d_plan.h"

#include <algorithm>
#include <cstring>

namespace basisconv {
namespace {

// A chunk's input under one block of pixels shall stay in the first-level cache, and its lists be long.
constexpr int64_t kChunkTaps = 288, kLeastChunk = 8, kMostChunk = 128;
constexpr int64_t kSumFloats = 16384;  // of all filters' sums: an eighth of a second-level cache of 512 KiB
constexpr int64_t kMostColumns = 512;
constexpr int64_t kHeaderBytes = 64;

// Nanoseconds a pixel, fitted to layers on an Intel Xeon with AMX: of an entry of a list, with floats and with 16-bit
// numbers; of a term of a tile of weights, and of expanding it.
constexpr double kFloatEntry = 0.034, kShortEntry = 0.017, kTileTerm = 0.42, kTileBits = 0.1;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

StackedBinaryWeights stacked_weights(const TernaryConv2dWeights& w) {
  return {w.C, w.K, w.K / w.groups, 1, w.groups, w.R, w.S};
}

// Whether filters without a zero would be quicker as tiles, with inputs of one term: a tile is 16 filters by 32
// channels, whatever there is of them.
bool worth_tiles(const TernaryConv2dWeights& w, const StackedPack& tiles) {
  const double weights = static_cast<double>(w.K * tiles.low * w.R * w.S);
  return static_cast<double>(tiles.words_size) / kTernaryTileWords * (kTileTerm + kTileBits) < weights * kFloatEntry;
}

// The weights as tiles: see sign_products.h.
void pack_tiles(const TernaryConv2dWeights& w, const StackedPack& tiles, const int32_t* planes, uint32_t* packed) {
  const int64_t taps = w.R * w.S, words = ceil_div(tiles.low, 32);
  std::memset(packed, 0, tiles.words_size * sizeof(uint32_t));
  const int64_t plane = tiles.count * taps * kTilePlaces;
  for (int64_t k = 0; k < w.K; k++) {
    const int64_t f = k % tiles.filters, bit = f % kTilePlaces * 2;
    uint32_t* of_block = packed + k / tiles.filters * tiles.set_size + f / kTilePlaces * 2 * plane;
    for (int64_t sign = 0; sign < 2; sign++) {
      for (int64_t t = 0; t < taps; t++) {
        const int32_t* from = planes + ((k * 2 + sign) * taps + t) * words;
        for (int64_t c = 0; c < tiles.low; c++) {
          const uint32_t set = static_cast<uint32_t>(from[c / 32]) >> (c % 32) & 1u;
          uint32_t* rows = of_block + sign * plane + (c / kMatrixDepth * taps + t) * kTilePlaces;
          rows[c % kTilePlaces] |= set << (bit + c % kMatrixDepth / kTilePlaces);
        }
      }
    }
  }
  pack_rows(stacked_weights(w), tiles, nullptr, packed);
}

}  // namespace

TernaryPack ternary_pack(const TernaryConv2dWeights& w) {
  TernaryPack pack{};
  const int64_t channels = w.C / w.groups, taps = w.R * w.S;
  pack.chunk = std::min(channels, std::clamp(kChunkTaps / taps, kLeastChunk, kMostChunk));
  pack.chunk = std::max<int64_t>(1, std::min(pack.chunk, 65535 / taps));  // entries have 16 bits
  pack.chunks = ceil_div(channels, pack.chunk);
  pack.chunk_taps = pack.chunk * taps;
  pack.lists = pack.chunks * w.K * 2;
  pack.starts_at = kHeaderBytes;
  pack.tiles_at = pack.starts_at + (pack.lists + 1) * 4;
  pack.tiles = expanded_matrix_pack(stacked_weights(w), kTernaryTileWords);
  if (!worth_tiles(w, pack.tiles)) pack.tiles = {};
  pack.entries_at = pack.tiles_at + pack.tiles.size() * 4;
  return pack;
}

TernaryPackHeader ternary_pack_header(const TernaryConv2dWeights& w, int64_t entries) {
  return {kTernaryPackVersion, w.C, w.K, w.R, w.S, w.groups, ternary_pack(w).chunk, entries};
}

int64_t ternary_most_packed_bytes(const TernaryConv2dWeights& w) {
  return ternary_pack(w).bytes(w.K * (w.C / w.groups) * w.R * w.S);
}

int64_t ternary_pack_planes(const TernaryConv2dWeights& w, const int32_t* planes, char* packed, bool tiles) {
  const TernaryPack pack = ternary_pack(w);
  const int64_t channels = w.C / w.groups, words = ceil_div(channels, 32);
  uint32_t* starts = reinterpret_cast<uint32_t*>(packed + pack.starts_at);
  uint16_t* entries = reinterpret_cast<uint16_t*>(packed + pack.entries_at);
  int64_t count = 0;
  for (int64_t chunk = 0; chunk < pack.chunks; chunk++) {
    const int64_t first = chunk * pack.chunk, last = std::min(channels, first + pack.chunk);
    for (int64_t k = 0; k < w.K; k++) {
      for (int64_t sign = 0; sign < 2; sign++) {
        *starts++ = static_cast<uint32_t>(count);
        const int32_t* plane = planes + (k * 2 + sign) * w.R * w.S * words;
        for (int64_t c = first; c < last; c++) {
          for (int64_t tap = 0; tap < w.R * w.S; tap++) {
            const uint32_t word = static_cast<uint32_t>(plane[tap * words + c / 32]);
            if (word >> (c % 32) & 1u) entries[count++] = static_cast<uint16_t>((c - first) * w.R * w.S + tap);
          }
        }
      }
    }
  }
  *starts = static_cast<uint32_t>(count);
  if (tiles && pack.tiles.words_size > 0)
    pack_tiles(w, pack.tiles, planes, reinterpret_cast<uint32_t*>(packed + pack.tiles_at));
  const TernaryPackHeader header = ternary_pack_header(w, count);
  std::memcpy(packed, &header, sizeof(header));
  return count;
}

bool ternary_packed_fits(const TernaryConv2dWeights& w, const char* packed, int64_t bytes) {
  const TernaryPack pack = ternary_pack(w);
  if (bytes < pack.entries_at) return false;
  TernaryPackHeader header;
  std::memcpy(&header, packed, sizeof(header));
  const TernaryPackHeader expected = ternary_pack_header(w, header.entries);
  if (std::memcmp(&header, &expected, sizeof(header)) != 0) return false;
  return header.entries >= 0 && header.entries <= (bytes - pack.entries_at) / 2;
}

bool ternary_lists_fit(const TernaryConv2dWeights& w, const char* packed) {
  const TernaryPack pack = ternary_pack(w);
  TernaryPackHeader header;
  std::memcpy(&header, packed, sizeof(header));
  const uint32_t* starts = reinterpret_cast<const uint32_t*>(packed + pack.starts_at);
  bool ordered = starts[0] == 0 && starts[pack.lists] == header.entries;
  for (int64_t i = 0; i < pack.lists; i++) ordered &= starts[i] <= starts[i + 1];
  const uint16_t* entries = reinterpret_cast<const uint16_t*>(packed + pack.entries_at);
  uint16_t largest = 0;
  for (int64_t i = 0; i < header.entries; i++) largest = std::max(largest, entries[i]);
  return ordered && (header.entries == 0 || largest < pack.chunk_taps);
}

bool ternary_tiles_fit(const TernaryConv2dWeights& w, const char* packed) {
  const TernaryPack pack = ternary_pack(w);
  return rows_fit(stacked_weights(w), pack.tiles, packed + pack.tiles_at);
}

StackedBinaryConv2dParams ternary_as_stacked(const TernaryConv2dParams& p, const TernaryPack& pack) {
  StackedBinaryConv2dParams s{};
  s.weights = stacked_weights(p.weights);
  s.mode = p.words == nullptr ? StackedMode::real : p.signs ? StackedMode::packed_signs : StackedMode::packed_codes;
  s.dtype = p.dtype;
  s.N = p.N;
  s.H = p.H;
  s.W = p.W;
  s.OH = p.OH;
  s.OW = p.OW;
  s.stride_h = p.stride_h;
  s.stride_w = p.stride_w;
  s.dilation_h = p.dilation_h;
  s.dilation_w = p.dilation_w;
  s.pad_top = p.pad_top;
  s.pad_left = p.pad_left;
  s.input = p.words == nullptr ? p.input : p.words;
  s.input_stride_n = p.input_stride_n;
  s.input_stride_c = p.input_stride_c;
  s.input_stride_h = p.input_stride_h;
  s.input_stride_w = p.input_stride_w;
  s.planes = p.words == nullptr ? 0 : p.bit_planes;
  s.packed = p.packed + pack.tiles_at;
  s.scale = p.scale;
  s.bias = p.bias;
  s.output = p.output;
  s.channels_last = p.channels_last;
  s.activation = p.activation;
  return s;
}

StackedPlan ternary_tiles_plan(const TernaryConv2dParams& p, const TernaryPack& pack) {
  StackedPack tiles = pack.tiles;
  if (p.negative_scale != nullptr) {  // the planes as filters of their own
    tiles.tile_words = kTilePlaces;
    tiles.blocks *= 2;
    tiles.slots *= 2;
  }
  StackedPlan plan = stacked_plan(ternary_as_stacked(p, pack), tiles);
  if (p.negative_scale != nullptr) plan.stacking_size = 0;
  return plan;
}

bool ternary_multiplies(const TernaryConv2dParams& p, const TernaryPack& pack) {
  if (pack.tiles.words_size == 0) return false;
  TernaryPackHeader header;
  std::memcpy(&header, p.packed, sizeof(header));
  // Nanoseconds a pixel, measured on an Intel Xeon with AMX.
  const double terms = p.words != nullptr || p.dtype == DType::bf16 ? 1 : p.dtype == DType::f16 ? 2 : 3;
  const double tiles =
      static_cast<double>(pack.tiles.words_size) / (p.negative_scale == nullptr ? kTernaryTileWords : kTilePlaces);
  const double lists = static_cast<double>(header.entries) * (p.words != nullptr ? kShortEntry : kFloatEntry);
  return tiles * (terms * kTileTerm + kTileBits) < lists;
}

bool ternary_sums_fit(const TernaryConv2dParams& p) {
  const int64_t largest = p.signs ? 1 : (int64_t{1} << p.bit_planes) - 1;
  return p.weights.C / p.weights.groups * p.weights.R * p.weights.S * largest <= 32767;
}

TernaryPlan ternary_plan(const TernaryConv2dParams& p, int64_t width, int64_t threads) {
  const TernaryConv2dWeights& w = p.weights;
  TernaryPlan plan{};
  plan.pack = ternary_pack(w);
  // Tap r reads row y * stride + r * dilation: phase (r * dilation) % stride, shifted by (r * dilation) / stride rows.
  const int64_t shift_h = (w.R - 1) * p.dilation_h / p.stride_h, shift_w = (w.S - 1) * p.dilation_w / p.stride_w;
  plan.phases_h = std::min(p.stride_h, (w.R - 1) * p.dilation_h + 1);
  plan.phases_w = std::min(p.stride_w, (w.S - 1) * p.dilation_w + 1);
  plan.columns = std::min(p.OW, kMostColumns);
  plan.column_strips = ceil_div(p.OW, plan.columns);
  plan.pitch = plan.columns + shift_w;
  const int64_t block = kTernaryMostVectors * width;
  const int64_t sums = w.K * (p.negative_scale != nullptr ? 2 : 1);
  plan.rows = std::clamp(std::max(block, kSumFloats / sums) / plan.pitch, int64_t{1}, p.OH);
  plan.row_strips = ceil_div(p.OH, plan.rows);
  plan.rows = ceil_div(p.OH, plan.row_strips);
  plan.input_rows = plan.rows + shift_h;
  plan.plane = plan.phases_h * plan.phases_w * plan.input_rows * plan.pitch;
  const int64_t registers = ceil_div((plan.rows - 1) * plan.pitch + plan.columns, width);
  const int64_t blocks = ceil_div(registers, kTernaryMostVectors);
  plan.vectors = ceil_div(registers, blocks);
  plan.line = blocks * plan.vectors * width;
  const int64_t strips = p.N * plan.row_strips * plan.column_strips;
  plan.filter_parts = std::clamp(ceil_div(threads, std::max<int64_t>(strips, 1)), int64_t{1}, w.K / w.groups);
  plan.units = strips * w.groups * plan.filter_parts;
  // The last block reads past the last plane by less than a line.
  plan.input_floats = ceil_div(plan.pack.chunk * plan.plane + plan.line, 16) * 16;
  const int64_t filters = ceil_div(w.K / w.groups, plan.filter_parts);
  plan.sum_floats = (p.negative_scale != nullptr ? 2 : 1) * filters * plan.line + width * plan.line;
  return plan;
}

void ternary_offsets(const TernaryConv2dParams& p, const TernaryPlan& plan, int32_t* offsets) {
  const TernaryConv2dWeights& w = p.weights;
  for (int64_t c = 0; c < plan.pack.chunk; c++) {
    for (int64_t r = 0; r < w.R; r++) {
      for (int64_t s = 0; s < w.S; s++) {
        const int64_t down = r * p.dilation_h, right = s * p.dilation_w;
        const int64_t phase = down % p.stride_h * plan.phases_w + right % p.stride_w;
        const int64_t row = phase * plan.input_rows + down / p.stride_h;
        *offsets++ = static_cast<int32_t>(c * plan.plane + row * plan.pitch + right / p.stride_w);
      }
    }
  }
}

}  // namespace basisconv
