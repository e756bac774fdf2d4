// From the counts of a warp to results: whole numbers, floats with scale, bias and activation, or bits.
//
// The fragments go through the warp's own staging memory. Then a lane has eight neighbouring filters, whose constants
// stay in its registers, of one pixel after another: numbers leave in pieces of 16 bytes, bits as bytes.
#pragma once
#include "binary_conv2d_problem.h"

namespace basisconv::cuda::binary {

constexpr int kTileX = 8;   // pixels of a tile in a row: the 16 rows of a matrix are two rows of pixels
constexpr int kAtOnce = 8;  // filters of a lane
constexpr int32_t kNoSum = static_cast<int32_t>(0x80000000u);

// What belongs to a filter, in shared memory. `first` and `second`: scale and bias as float bits; for bits the
// threshold t ^ m and m, where m is -1 for a flipped filter: v <= t is ~v >= ~t.
struct alignas(16) Filter {
  uint32_t first, second;
  int32_t every;  // D: T of a pixel whose taps lie all inside the image
  int32_t unused;
};

// How counts become sums: v = factor * and - ones_factor * ones + T, T = inside_factor * I + every_factor * D.
struct Sum {
  int factor, ones_factor, inside_factor, every_factor;

  BASISCONV_DEVICE explicit Sum(const Problem& p) {
    const bool good = *p.tag == p.expected_tag;  // else D is kNoSum, and every v
    factor = !good ? 0 : p.codes ? 2 : 4;
    ones_factor = !good ? 0 : p.codes ? 1 : 2;
    inside_factor = !good || p.codes ? 0 : 1 + p.padding_value;
    every_factor = !good ? 1 : -p.padding_value;
  }
};

BASISCONV_DEVICE float number(const CudaFactor& from, int64_t i) {
  switch (from.type) {
    case FactorType::f32:
      return static_cast<const float*>(from.values)[i];
    case FactorType::bf16:
      return widen(static_cast<const bf16*>(from.values)[i]);
    case FactorType::f16:
      return widen(static_cast<const f16*>(from.values)[i]);
    default:
      return static_cast<float>(static_cast<const double*>(from.values)[i]);
  }
}

BASISCONV_DEVICE const int32_t* totals_of(const Problem& p, int group) {
  return p.totals + static_cast<int64_t>(group) * (p.R + 1) * (p.S + 1) * p.padded;
}

// Filter k of a group, which may be one that only fills the tile.
BASISCONV_DEVICE Filter filter_of(const Problem& p, int group, int k) {
  const bool good = *p.tag == p.expected_tag, real = k < p.K;
  const int64_t channel = static_cast<int64_t>(group) * p.K + k;
  Filter filter{};
  if (p.output_type == BinaryOutput::packed) {
    const bool given = p.threshold != nullptr;
    const int32_t flipped = real && good && given && p.flip[channel] ? -1 : 0;
    const int32_t bound = !real || !good ? 0x7FFFFFFF : given ? p.threshold[channel] : 0;  // no sum reaches 2^31 - 1
    filter.first = static_cast<uint32_t>(bound ^ flipped);
    filter.second = static_cast<uint32_t>(flipped);
  } else {
    const float scale = real && p.scale.values != nullptr ? number(p.scale, channel) : 1.0f;
    filter.first = good ? bits_of(scale) : 0x7FC00000u;
    filter.second = bits_of(real && p.bias.values != nullptr ? number(p.bias, channel) : 0.0f);
  }
  const int32_t every = totals_of(p, group)[(static_cast<int64_t>(p.R + 1) * (p.S + 1) - 1) * p.padded + k];
  filter.every = !good ? kNoSum : p.codes ? 0 : every;
  return filter;
}

// --- staging ---------------------------------------------------------------------------------------------------------

// A pixel's counts, 32 bytes more between pixels, and in every second 128 bytes the halves exchanged: neither stores
// nor loads of 8 bytes meet in a bank. Behind the pixels their ones.
template <int MT, int N8>
struct Staging {
  static constexpr int pixels = 16 * MT;
  static constexpr int pitch = N8 * 32 + 32;
  static constexpr int bytes = pixels * pitch + pixels * 4;
  char* memory;

  static BASISCONV_DEVICE int place(int column) { return (column * 4) ^ (column / 32 % 2 * 64); }
  BASISCONV_DEVICE int& ones(int pixel) const { return reinterpret_cast<int*>(memory + pixels * pitch)[pixel]; }

  // A lane l = 4g + t of an m16n8 accumulator has the columns 2t and 2t + 1 of pixels g and g + 8.
  BASISCONV_DEVICE void put(const int (&sums)[MT][N8][4], const int (&all_ones)[MT][4]) const {
    const int lane = threadIdx.x % 32;
    warp_reuses(memory, bytes);
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int pixel = m * 16 + half * 8 + lane / 4;
#pragma unroll
        for (int j = 0; j < N8; ++j) {
          int2* to = reinterpret_cast<int2*>(memory + pixel * pitch + place(j * 8 + lane % 4 * 2));
          *to = int2{sums[m][j][half * 2], sums[m][j][half * 2 + 1]};
        }
        if (lane % 4 == 0) ones(pixel) = all_ones[m][half * 2];
      }
    }
    __syncwarp();
  }
  // Eight neighbouring filters, see filter_of_column.
  BASISCONV_DEVICE void get(int (&sums)[kAtOnce], int pixel, int filter) const {
    const char* from = memory + pixel * pitch;
    const int first = N8 == 8 ? filter / 32 * 32 + filter / 8 % 4 * 2 : filter, next = N8 == 8 ? 8 : 2;
#pragma unroll
    for (int i = 0; i < kAtOnce / 2; ++i) {
      const int2 two = *reinterpret_cast<const int2*>(from + place(first + i * next));
      sums[2 * i] = two.x, sums[2 * i + 1] = two.y;
    }
  }
};

// --- borders ---------------------------------------------------------------------------------------------------------

// The taps of an axis that lie inside the image: from..to - 1.
struct Taps {
  int from, to;

  BASISCONV_DEVICE Taps(int first, int dilation, int taps, int size) {
    from = first >= 0 ? 0 : min(taps, (-first + dilation - 1) / dilation);
    to = first >= size ? 0 : min(taps, (size - 1 - first) / dilation + 1);
    if (to < from) to = from;
  }
};

// Adds sign * the totals of eight filters.
BASISCONV_DEVICE void add_totals(int (&to)[kAtOnce], int sign, const int32_t* totals) {
#pragma unroll
  for (int i = 0; i < kAtOnce; i += 4) {
    const int4 four = *reinterpret_cast<const int4*>(totals + i);
    to[i] += sign * four.x, to[i + 1] += sign * four.y, to[i + 2] += sign * four.z, to[i + 3] += sign * four.w;
  }
}

// I of eight filters at the pixel whose window begins at (y, x) of the input.
BASISCONV_DEVICE void inside_totals(const Problem& p, int (&found)[kAtOnce], int y, int x, const int32_t* totals) {
  const Taps down(y, p.dilation_h, p.R, p.H), across(x, p.dilation_w, p.S, p.W);
  const int64_t line = static_cast<int64_t>(p.S + 1) * p.padded;
  const int64_t left = static_cast<int64_t>(across.from) * p.padded, right = static_cast<int64_t>(across.to) * p.padded;
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) found[i] = 0;
  add_totals(found, 1, totals + down.to * line + right);
  add_totals(found, -1, totals + down.from * line + right);
  add_totals(found, -1, totals + down.to * line + left);
  add_totals(found, 1, totals + down.from * line + left);
}

// --- results ---------------------------------------------------------------------------------------------------------

// Eight filters of a lane and where they stand.
struct Lane {
  uint32_t first[kAtOnce], second[kAtOnce];
  int every[kAtOnce];
  int group, k;     // the first of them in its group
  int64_t channel;  // and among all
};

// A pixel of a warp, counted through the batch: `behind` pixels behind the first, which image n holds.
struct Pixel {
  int n;
  int64_t first;
  int behind;

  BASISCONV_DEVICE int64_t number() const { return first + behind; }
};

// Eight numbers as words: in pieces of 16 bytes, or one by one.
template <class T>
BASISCONV_DEVICE void store_words(const Problem& p, const Lane& lane, const Pixel& pixel,
                                  const uint32_t (&words)[kAtOnce * sizeof(T) / 4]) {
  const int filters = p.groups * p.K;
  T* output = static_cast<T*>(p.output);
  if (p.output_in_16_bytes) {
    T* first = output + pixel.first * filters + lane.channel;  // the same for all pixels
    uint4* to = reinterpret_cast<uint4*>(first + static_cast<int64_t>(pixel.behind) * filters);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i) {
      if (lane.k + i * 4 < p.K) to[i] = uint4{words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]};
    }
    return;
  }
  const int64_t step = p.channels_last ? 1 : static_cast<int64_t>(p.OH) * p.OW;
  const int64_t image = pixel.n * (filters - 1) * step;  // of NCHW: what the images before have more than pixels
  T* to = output + (p.channels_last ? pixel.number() * filters : pixel.number() + image) + lane.channel * step;
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i, to += step) {
    if (lane.k + i >= p.K) break;
    if constexpr (sizeof(T) == 2) {
      to->bits = static_cast<uint16_t>(words[i / 2] >> i % 2 * 16);
    } else {
      *reinterpret_cast<uint32_t*>(to) = words[i];
    }
  }
}

// Float results. One branch for all eight on the activation, which is the same for the whole grid; NaN stays NaN.
BASISCONV_DEVICE void to_floats(const Problem& p, const Lane& lane, const Pixel& pixel, const int (&sums)[kAtOnce],
                                float (&values)[kAtOnce]) {
  const float factor = p.pixel_scale.values != nullptr ? number(p.pixel_scale, pixel.number()) : 1.0f;
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    values[i] = static_cast<float>(sums[i]) * float_of(lane.first[i]) * factor + float_of(lane.second[i]);
  }
  if (p.activation != BinaryActivation::none) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) values[i] = values[i] <= 0.0f ? 0.0f : values[i];
  }
  if (p.activation == BinaryActivation::relu6) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) values[i] = values[i] > 6.0f ? 6.0f : values[i];
  }
}

struct WholeNumbers {
  static BASISCONV_DEVICE void store(const Problem& p, const Lane& lane, const Pixel& pixel, const int (&sums)[8]) {
    uint32_t words[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) words[i] = static_cast<uint32_t>(sums[i]);
    store_words<int32_t>(p, lane, pixel, words);
  }
};

struct WideFloats {
  static BASISCONV_DEVICE void store(const Problem& p, const Lane& lane, const Pixel& pixel, const int (&sums)[8]) {
    float values[kAtOnce];
    to_floats(p, lane, pixel, sums, values);
    uint32_t words[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) words[i] = bits_of(values[i]);
    store_words<float>(p, lane, pixel, words);
  }
};

template <class Half>
struct HalfFloats {
  static BASISCONV_DEVICE void store(const Problem& p, const Lane& lane, const Pixel& pixel, const int (&sums)[8]) {
    float values[kAtOnce];
    to_floats(p, lane, pixel, sums, values);
    uint32_t words[kAtOnce / 2];
#pragma unroll
    for (int i = 0; i < kAtOnce; i += 2) words[i / 2] = round2<Half>(values[i], values[i + 1]);
    store_words<Half>(p, lane, pixel, words);
  }
};

// A byte, and behind the last filter of all bytes of zeros up to a whole word.
struct Bits {
  static BASISCONV_DEVICE void store(const Problem& p, const Lane& lane, const Pixel& pixel, const int (&sums)[8]) {
    uint32_t byte = 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const bool set = (sums[i] ^ static_cast<int>(lane.second[i])) >= static_cast<int>(lane.first[i]);
      byte |= set ? 1u << i : 0u;
    }
    const int64_t all = (static_cast<int64_t>(p.groups) * p.K + 31) / 32 * 4, at = lane.channel / 8;
    const bool last = lane.group == p.groups - 1;
    uint8_t* to = static_cast<uint8_t*>(p.output) + pixel.number() * all;
    if (lane.k < p.K || (last && at < all)) to[at] = static_cast<uint8_t>(byte);
    if (last && lane.k + kAtOnce == p.padded) {
      for (int64_t behind = at + 1; behind < all; ++behind) to[behind] = 0;
    }
  }
};

// All pixels of a warp; the first is (y, x) of image n of the output.
template <class Kind, int MT, int N8>
BASISCONV_DEVICE void store_pixels(const Problem& p, const Lane& lane, const Staging<MT, N8>& staging, int n, int y,
                                   int x) {
  constexpr int together = 32 / N8;  // pixels of a warp at once
  const Sum sum(p);
  const int iy = y * p.stride_h - p.pad_top, ix = x * p.stride_w - p.pad_left;
  const int down = min(2 * MT - 1, p.OH - 1 - y) * p.stride_h, right = min(kTileX - 1, p.OW - 1 - x) * p.stride_w;
  const bool whole = p.codes || (iy >= 0 && ix >= 0 && iy + down + (p.R - 1) * p.dilation_h < p.H &&
                                 ix + right + (p.S - 1) * p.dilation_w < p.W);
  const int32_t* totals = totals_of(p, lane.group) + lane.k;
  const int64_t number = (static_cast<int64_t>(n) * p.OH + y) * p.OW + x;
#pragma unroll 1
  for (int i = threadIdx.x % 32 / N8; i < Staging<MT, N8>::pixels; i += together) {
    const int row = i / kTileX, column = i % kTileX;
    if (y + row >= p.OH || x + column >= p.OW) continue;
    int sums[kAtOnce];
    staging.get(sums, i, threadIdx.x % N8 * kAtOnce);
    const int minus = sum.ones_factor * staging.ones(i);
    if (whole) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) sums[j] = sums[j] * sum.factor + (lane.every[j] - minus);
    } else {
      int inside[kAtOnce];
      inside_totals(p, inside, iy + row * p.stride_h, ix + column * p.stride_w, totals);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int total = sum.inside_factor * inside[j] + sum.every_factor * lane.every[j];
        sums[j] = sums[j] * sum.factor + (total - minus);
      }
    }
    Kind::store(p, lane, {n, number, row * p.OW + column}, sums);
  }
}

// The epilogue of a warp: its pixels are 2 * MT rows from (y, x) on; `first` is the tile's first filter in its group.
template <int MT, int N8>
BASISCONV_DEVICE void store_tile(const Problem& p, const Filter* filters, const Staging<MT, N8>& staging, int n, int y,
                                 int x, int group, int first) {
  Lane lane;
  const int column = threadIdx.x % N8 * kAtOnce;
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    const Filter filter = filters[column + i];
    lane.first[i] = filter.first, lane.second[i] = filter.second, lane.every[i] = filter.every;
  }
  lane.group = group;
  lane.k = first + column;
  lane.channel = static_cast<int64_t>(group) * p.K + lane.k;
  switch (p.output_type) {
    case BinaryOutput::packed:
      return store_pixels<Bits>(p, lane, staging, n, y, x);
    case BinaryOutput::i32:
      return store_pixels<WholeNumbers>(p, lane, staging, n, y, x);
    case BinaryOutput::f32:
      return store_pixels<WideFloats>(p, lane, staging, n, y, x);
    case BinaryOutput::bf16:
      return store_pixels<HalfFloats<bf16>>(p, lane, staging, n, y, x);
    case BinaryOutput::f16:
      return store_pixels<HalfFloats<f16>>(p, lane, staging, n, y, x);
  }
}

}  // namespace basisconv::cuda::binary
