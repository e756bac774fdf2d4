// Convolutions with filters of +1, -1 and perhaps 0 on the matrix unit of x86 (AMX), as 16x32 tiles of bfloat16.
//
// A float is the exact sum of three bfloat16 terms of 8 bits each, its upper, middle and lower bits; a float16 is one
// of two; signs and packed numbers are bfloat16 themselves. A product by +1 or -1 is exact, so that products of all
// terms, added up in float, are what a float convolution gives. Filters stay bits in memory: each tile of them is
// expanded once for all terms of up to four tiles of pixels, while the unit multiplies by the one before, or, where
// there are few, once a run. Terms below 2^-126 count as zero.
//
// Bits lie as [sets][blocks of 16 filters][planes][channel blocks][taps][16 rows]; in a row bit 2j is channel i of the
// block, bit 2j+1 channel 16 + i, of filter j: the order in which two registers of floats become one of bfloat16. What
// they stand for is told by `Signs`: kPlanes, and expand, which makes a tile of the rows at `words`, those of the next
// plane `plane` words on. What becomes of the maps is told by `Outputs`.
#pragma once
#include "stacked_binary_conv2d_outputs.h"
#include "stacked_binary_conv2d_stage.h"
#include "tiles.h"

namespace basisconv {
namespace BASISCONV_ISA {
namespace {

constexpr int64_t kDepth = kMatrixDepth;         // channels of a tile
constexpr int64_t kTile = kTilePlaces * kDepth;  // bfloat16 of a tile
constexpr int64_t kTileRow = 64;                 // bytes
static_assert(kDepth == 2 * kWidth && kTilePlaces == kWidth);

// What tiles of products are made of.
struct Factors {
  const bf16* pixels[4];  // of each tile of pixels
  int64_t term, terms;    // values between terms, and how many there are
  const int64_t* steps;   // to the pixels of a channel block and tap
  int64_t count;          // of steps
  const uint32_t* words;  // bits of the filters: [blocks][planes][steps][16 rows]
  const bf16* expanded;   // the same, expanded already, or null
};

// Maps of PIXELS tiles of pixels and FILTERS blocks of 16 filters; tile t lies 16*t pixels from the first. Accumulators
// 0 to 3, pixels in 4 and 5, filters in 6 and 7: the intrinsics take numbers of tiles as they are written only.
template <typename Signs, int PIXELS, int FILTERS>
BASISCONV_NOINLINE void multiply(const Factors& factors, float* maps, int64_t maps_pixel) {
  static_assert(PIXELS >= 1 && FILTERS >= 1 && PIXELS * FILTERS <= 4 && FILTERS <= 2);
  alignas(64) bf16 buffer[2][FILTERS][kTile];
  const bf16* const* pixels = factors.pixels;
  // One step ahead of the products: stores must have reached the cache when a tile is loaded.
  const auto expand_for = [&](int64_t i) BASISCONV_LAMBDA {
    if (factors.expanded != nullptr || i == factors.count) return;
    const int64_t plane = factors.count * kTilePlaces;
    for (int f = 0; f < FILTERS; f++) {
      Signs::expand(factors.words + f * Signs::kPlanes * plane + i * kTilePlaces, plane, buffer[i % 2][f]);
    }
  };
  const auto filters = [&](int64_t i, int f) BASISCONV_LAMBDA {
    return factors.expanded != nullptr ? factors.expanded + (f * factors.count + i) * kTile : buffer[i % 2][f];
  };
  _tile_zero(0);
  if constexpr (PIXELS * FILTERS > 1) _tile_zero(1);
  if constexpr (PIXELS * FILTERS > 2) _tile_zero(2);
  if constexpr (PIXELS * FILTERS > 3) _tile_zero(3);
  expand_for(0);
  for (int64_t i = 0; i < factors.count; i++) {
    expand_for(i + 1);
    stores_before_tile_loads();
    _tile_loadd(6, filters(i, 0), kTileRow);
    if constexpr (FILTERS > 1) _tile_loadd(7, filters(i, 1), kTileRow);
    int64_t at = factors.steps[i];
    for (int64_t left = factors.terms; left > 0; left--, at += factors.term) {
      _tile_loadd(4, pixels[0] + at, kTileRow);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (FILTERS > 1) {
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (PIXELS > 1) {
          _tile_loadd(5, pixels[1] + at, kTileRow);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      } else {
        if constexpr (PIXELS > 1) {
          _tile_loadd(5, pixels[1] + at, kTileRow);
          _tile_dpbf16ps(1, 5, 6);
        }
        if constexpr (PIXELS > 2) {
          _tile_loadd(4, pixels[2] + at, kTileRow);
          _tile_dpbf16ps(2, 4, 6);
        }
        if constexpr (PIXELS > 3) {
          _tile_loadd(5, pixels[3] + at, kTileRow);
          _tile_dpbf16ps(3, 5, 6);
        }
      }
    }
  }
  const int64_t row = maps_pixel * static_cast<int64_t>(sizeof(float)), next = kTilePlaces * maps_pixel;
  const int64_t second = FILTERS > 1 ? kTilePlaces : next;
  _tile_stored(0, maps, row);
  if constexpr (PIXELS * FILTERS > 1) _tile_stored(1, maps + second, row);
  if constexpr (PIXELS * FILTERS > 2) _tile_stored(2, maps + (FILTERS > 1 ? next : 2 * next), row);
  if constexpr (PIXELS * FILTERS > 3) _tile_stored(3, maps + (FILTERS > 1 ? next : 2 * next) + second, row);
}

// The upper 8 bits of the significands of x, as floats.
BASISCONV_INLINE Vec::Reg upper(Vec::Reg x) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(-65536)));
}

// What is left of x without its upper bits: nothing where they are all of it, infinities among them.
BASISCONV_INLINE Vec::Reg rest(Vec::Reg x) {
  const Vec::Reg bits = upper(x);
  return _mm512_maskz_sub_ps(_mm512_cmp_ps_mask(x, bits, _CMP_NEQ_UQ), x, bits);
}

// Two registers of channels become a line of upper bits; what they hold besides must be in other terms.
BASISCONV_INLINE void store_upper(bf16* to, Vec::Reg low, Vec::Reg high) {
  const __m512i shifted = _mm512_srli_epi32(_mm512_castps_si512(low), 16);
  _mm512_storeu_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaa, shifted, _mm512_castps_si512(high)));
}

// The input of a pass: [terms][slices][channel blocks] of places of the band.
template <typename T>
class InputTerms {
 public:
  InputTerms(const StackedBinaryConv2dParams& params, const StackedPlan& plan, float* memory, float* staged)
      : params_(params),
        plan_(plan),
        pack_(plan.pack),
        memory_(reinterpret_cast<bf16*>(memory)),
        staged_(staged),
        plane_(plan.band.plane() * kDepth) {}

  int64_t term() const { return pack_.slices * pack_.count * plane_; }
  const bf16* pixels(int64_t slice, int64_t start) const {
    return memory_ + slice * pack_.count * plane_ + start * kDepth;
  }
  int64_t tap(int64_t block, int64_t r, int64_t s) const { return block * plane_ + plan_.band.tap(r, s) * kDepth; }

  void begin(int64_t image, int64_t oy) {
    image_ = image;
    oy_ = oy;
    filled_ = 0;
  }

  // Fills the input rows that outputs up to row `row` of the pass read, as far as that has not been done.
  void fill_for(int64_t row) {
    for (; filled_ < plan_.band.input_rows(row); filled_++)
      fill(filled_, oy_ * params_.stride_h - params_.pad_top + filled_);
  }

 private:
  bf16* line(int64_t row, int64_t column) const { return memory_ + plan_.band.place(row, column) * kDepth; }

  void zero(int64_t row, int64_t begin, int64_t end) const {
    for (int64_t x = begin; x < end; x++) {
      bf16* to = line(row, x);
      for (int64_t i = plan_.terms * pack_.slices * pack_.count; i > 0; i--, to += plane_) {
        _mm512_storeu_si512(to, _mm512_setzero_si512());
      }
    }
  }

  void fill(int64_t row, int64_t y) const {
    const int64_t width = plan_.band.columns * params_.stride_w, left = params_.pad_left;
    if (y < 0 || y >= params_.H) return zero(row, 0, width);
    zero(row, 0, left);
    if (plan_.in_place) {
      const T* image = static_cast<const T*>(params_.input) + image_ * params_.input_stride_n;
      split_row(image + y * params_.input_stride_h, params_.input_stride_w, row);
    } else {
      if (params_.planes > 0) {
        stage_packed(params_, image_, y, staged_);
      } else {
        stage_real<T>(params_, image_, y, staged_);
      }
      split_row(staged_, params_.weights.C, row);
    }
    zero(row, left + params_.W, width);
  }

  template <typename From>
  void split_row(const From* from, int64_t pixel, int64_t row) const {
    for (int64_t x = 0; x < params_.W; x++, from += pixel) split(from, line(row, params_.pad_left + x));
  }

  // The channels of a pixel become lines of terms.
  template <typename From>
  void split(const From* from, bf16* to) const {
    for (int64_t slice = 0; slice < pack_.slices; slice++, from += pack_.low) {
      for (int64_t c = 0; c < pack_.low; c += kDepth, to += plane_) {
        const int64_t left = pack_.low - c;
        Vec::Reg low, high;
        if (left >= kDepth) {
          low = Vec::load(from + c);
          high = Vec::load(from + c + kWidth);
        } else {
          low = left >= kWidth ? Vec::load(from + c) : Vec::load_n(from + c, left);
          high = left > kWidth ? Vec::load_n(from + c + kWidth, left - kWidth) : Vec::zero();
        }
        bf16* term = to;
        store_upper(term, low, high);
        for (int64_t i = plan_.terms; i > 1; i--) {
          low = rest(low);
          high = rest(high);
          store_upper(term += this->term(), low, high);
        }
      }
    }
  }

  const StackedBinaryConv2dParams& params_;
  const StackedPlan& plan_;
  const StackedPack& pack_;
  bf16* const memory_;
  float* const staged_;
  const int64_t plane_;  // values of a channel block
  int64_t image_ = 0, oy_ = 0;
  int64_t filled_ = 0;  // input rows that are there
};

template <typename T, typename Signs, typename Outputs>
struct SignProducts {
  const StackedBinaryConv2dParams& params;
  const StackedPlan& plan;
  InputTerms<T> input;
  const int64_t* steps;
  const bf16* expanded;  // few filters are, once
  float* maps;
  Outputs outputs;

  // Output rows oy ... oy+rows-1 of an image.
  void pass(int64_t image, int64_t oy, int64_t rows) {
    input.begin(image, oy);
    const int64_t tiles = plan.band.tiles(rows);
    for (int64_t done = 0; done < tiles; done += plan.tiles) {
      const int64_t count = tiles - done < plan.tiles ? tiles - done : plan.tiles;
      PixelTile at[kMatrixMostTiles];
      for (int64_t t = 0; t < count; t++) at[t] = plan.band.tile(done + t, oy, rows);
      input.fill_for(at[count - 1].row);
      multiply_tiles(at, count);
      for (int64_t t = 0; t < count; t++) finish(image, at[t], maps + t * kTilePlaces * a_pixel());
    }
  }

  int64_t a_pixel() const { return plan.pack.slices * plan.pack.slots; }

  // One slice after the other: the input rows that tiles share stay in the first-level cache. Two blocks of filters
  // share the loads of pixels.
  void multiply_tiles(const PixelTile* at, int64_t count) const {
    for (int64_t slice = 0; slice < plan.pack.slices; slice++) {
      const int64_t paired = plan.pack.blocks - plan.pack.blocks % 2;
      for (int64_t t = 0; paired > 0 && t < count; t += 2) {
        for (int64_t b = 0; b < paired; b += 2) multiply_share(at, t, count - t < 2 ? 1 : 2, slice, b, true);
      }
      if (paired == plan.pack.blocks) continue;
      const int64_t share = even_share(count, 4);
      for (int64_t t = 0; t < count; t += share) {
        multiply_share(at, t, count - t < share ? count - t : share, slice, paired, false);
      }
    }
  }

  void multiply_share(const PixelTile* at, int64_t t, int64_t tiles, int64_t slice, int64_t b, bool pair) const {
    const StackedPack& pack = plan.pack;
    const int64_t count = pack.count * params.weights.R * params.weights.S;
    const uint32_t* words = static_cast<const uint32_t*>(params.packed) + (pack.sets > 1 ? slice * pack.set_size : 0);
    Factors factors{{},     input.term(), plan.terms, steps, count, words + b * Signs::kPlanes * count * kTilePlaces,
                    nullptr};
    if (plan.filters_size > 0) factors.expanded = expanded + b * count * kTile;
    for (int64_t i = 0; i < tiles; i++) factors.pixels[i] = input.pixels(slice, at[t + i].start);
    using Function = decltype(&multiply<Signs, 1, 1>);
    static constexpr Function kSingle[] = {multiply<Signs, 1, 1>, multiply<Signs, 2, 1>, multiply<Signs, 3, 1>,
                                           multiply<Signs, 4, 1>};
    static constexpr Function kPair[] = {multiply<Signs, 1, 2>, multiply<Signs, 2, 2>};
    float* to = maps + t * kTilePlaces * a_pixel() + slice * pack.slots + b * kTilePlaces;
    (pair ? kPair : kSingle)[tiles - 1](factors, to, a_pixel());
  }

  void finish(int64_t image, const PixelTile& tile, const float* of_tile) const {
    Pixels pixels{{}, 0};
    for (uint32_t valid = tile.valid; valid; valid &= valid - 1) {
      pixels.at[pixels.count++] = of_tile + __builtin_ctz(valid) * a_pixel();
    }
    if (pixels.count == 0) return;
    for (int64_t p = pixels.count; p < kWidth; p++) pixels.at[p] = pixels.at[0];
    outputs(pixels, image, tile.output);
  }
};

template <typename T, typename Signs, typename Outputs>
void run_as(const StackedBinaryConv2dParams& params, const StackedPlan& plan, const Outputs& outputs, float* scratch,
            int64_t begin, int64_t end) {
  const StackedBinaryWeights& w = params.weights;
  float* staged = scratch + plan.ring_size;
  bf16* expanded = reinterpret_cast<bf16*>(staged + plan.staged_size);
  float* maps = staged + plan.staged_size + plan.filters_size;
  const InputTerms<T> input(params, plan, scratch, staged);
  const int64_t taps = w.R * w.S, count = plan.pack.count * taps, plane = count * kTilePlaces;
  for (int64_t i = 0; i < plan.filters_size * 2 / kTile; i++) {
    const uint32_t* of_block = static_cast<const uint32_t*>(params.packed) + i / count * Signs::kPlanes * plane;
    Signs::expand(of_block + i % count * kTilePlaces, plane, expanded + i * kTile);
  }
  int64_t* steps = new int64_t[count];
  for (int64_t i = 0; i < count; i++) steps[i] = input.tap(i / taps, i / w.S % w.R, i % w.S);
  const TileRegisters registers;
  SignProducts<T, Signs, Outputs> run{params, plan, input, steps, expanded, maps, outputs};
  plan.band.each_pass(begin, end, [&](int64_t image, int64_t oy, int64_t rows) { run.pass(image, oy, rows); });
  delete[] steps;
}

// Output rows [begin, end) over the batch. Outputs<T> is made of params, plan, its part of the scratch and `more`.
template <typename Signs, template <typename> typename Outputs, typename... More>
void run_products(const StackedBinaryConv2dParams& params, const StackedPlan& plan, float* scratch, int64_t begin,
                  int64_t end, More... more) {
  float* own = scratch + plan.scratch() - plan.stacking_size;
  switch (params.dtype) {
    case DType::f32:
      return run_as<float, Signs>(params, plan, Outputs<float>(params, plan, own, more...), scratch, begin, end);
    case DType::bf16:
      return run_as<bf16, Signs>(params, plan, Outputs<bf16>(params, plan, own, more...), scratch, begin, end);
    case DType::f16:
      return run_as<f16, Signs>(params, plan, Outputs<f16>(params, plan, own, more...), scratch, begin, end);
  }
}

}  // namespace
}  // namespace BASISCONV_ISA
}  // namespace basisconv
