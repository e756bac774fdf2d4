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

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
  pack.entries_at = pack.starts_at + (pack.lists + 1) * 4;
  return pack;
}

TernaryPackHeader ternary_pack_header(const TernaryConv2dWeights& w, int64_t entries) {
  return {kTernaryPackVersion, w.C, w.K, w.R, w.S, w.groups, ternary_pack(w).chunk, entries};
}

int64_t ternary_most_packed_bytes(const TernaryConv2dWeights& w) {
  return ternary_pack(w).bytes(w.K * (w.C / w.groups) * w.R * w.S);
}

int64_t ternary_pack_planes(const TernaryConv2dWeights& w, const int32_t* planes, char* packed) {
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
  if (header.entries < 0 || header.entries > (bytes - pack.entries_at) / 2) return false;
  const uint32_t* starts = reinterpret_cast<const uint32_t*>(packed + pack.starts_at);
  bool ordered = starts[0] == 0 && starts[pack.lists] == header.entries;
  for (int64_t i = 0; i < pack.lists; i++) ordered &= starts[i] <= starts[i + 1];
  const uint16_t* entries = reinterpret_cast<const uint16_t*>(packed + pack.entries_at);
  uint16_t largest = 0;
  for (int64_t i = 0; i < header.entries; i++) largest = std::max(largest, entries[i]);
  return ordered && (header.entries == 0 || largest < pack.chunk_taps);
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
