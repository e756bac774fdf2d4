// stacked_binary_conv2d on the CPU, compiled once per instruction set (BASISCONV_ISA).
//
// float32, bfloat16 and float16 input of any strides, its signs, or packed bits; sums in float. A multiplication by ±1
// is a choice of sign: sums of a few channels are tabulated once a pixel, and the bits of a filter pick one
// (stacked_binary_conv2d_tables.h). The bank stays bits; the maps of all slices live for some pixels in the first-level
// cache, where the outputs add up theirs.
// Test: tests/ops/test_stacked_binary_conv2d.py. Bench: python -m bench run --suite C9.
#include "stacked_binary_conv2d.h"

#include "stacked_binary_conv2d_stage.h"
#include "stacked_binary_conv2d_tables.h"

#define BASISCONV_JOIN2(a, b) a##b
#define BASISCONV_JOIN(a, b) BASISCONV_JOIN2(a, b)

namespace basisconv {
namespace BASISCONV_ISA {

static void pack(const StackedBinaryWeights& w, const StackedPack& pack, const float* bank, const int64_t* index,
                 uint32_t* packed) {
  const int64_t taps = w.R * w.S, bank_low = w.C / w.groups / w.splits, lanes = pack.vectors * kWidth;
  memset(packed, 0, pack.words_size * sizeof(uint32_t));
  for (int64_t set = 0; set < pack.sets; set++) {
    for (int64_t f = 0; f < pack.filters; f++) {
      for (int64_t t = 0; t < taps; t++) {
        uint32_t* at = packed + set * pack.set_size + ((f / lanes * taps + t) * pack.words) * lanes + f % lanes;
        for (int64_t table = 0; table < pack.count; table++) {
          bool positive[Lookup::kStep] = {};
          for (int64_t i = 0; i < Lookup::kStep; i++) {
            const int64_t c = table * Lookup::kStep + i;
            if (c >= pack.low) break;
            // The filter of the bank that channel c of this filter comes from.
            const int64_t j = pack.expanded ? index[(set * pack.filters + f) * w.splits + c / bank_low] : f;
            positive[i] = bank[(j * bank_low + c % bank_low) * taps + t] > 0.0f;
          }
          at[table / pack.per_word * lanes] |= Lookup::code(positive) << (table % pack.per_word * Lookup::kStep);
        }
      }
    }
  }
  int32_t* rows = reinterpret_cast<int32_t*>(packed + pack.words_size);
  const int64_t outputs = w.K / w.groups;
  for (int64_t k = 0; k < w.K; k++) {
    for (int64_t i = 0; i < pack.splits; i++) {
      const int64_t slice = k / outputs * pack.splits + i;
      const int64_t filter = pack.expanded ? k % outputs : index[k * w.splits + i];
      rows[k * pack.splits + i] = static_cast<int32_t>(slice * pack.slots + filter);
    }
  }
}

// What the tiles of one slice and output row share.
struct SliceRow {
  const float* const* rows;  // [R]: tables of the slice in the input row of each tap
  int64_t low_r, high_r;     // taps inside the image
  int64_t S, tap, pixel;     // floats between the pixels of neighbouring taps, and of neighbouring outputs
  int64_t count, words, per_word;
};

// P pixels × F registers of filters: u of one slice and block, over all taps inside the image and all tables.
template <int P, int F>
static BASISCONV_NOINLINE void tile(const SliceRow& slice, int64_t x, const uint32_t* filters, float* maps,
                                    int64_t maps_pixel) {
  Vec::Reg sums[P][F];
  BASISCONV_UNROLL for (int p = 0; p < P; p++) {
    BASISCONV_UNROLL for (int f = 0; f < F; f++) sums[p][f] = Vec::zero();
  }
  Vec::Reg one = Vec::set1(1.0f);
#if defined(BASISCONV_AVX512) && defined(__AVX512F__)
  asm("" : "+v"(one));  // or the compiler would make additions of the multiply-adds again
#endif
  const int64_t pixel = slice.pixel;
  for (int64_t r = slice.low_r; r <= slice.high_r; r++) {
    for (int64_t s = 0; s < slice.S; s++) {
      const float* table = slice.rows[r] + s * slice.tap + x * pixel;
      const uint32_t* word = filters + (r * slice.S + s) * slice.words * F * kWidth;
      for (int64_t left = slice.count; left > 0; left -= slice.per_word, word += F * kWidth) {
        Lookup::Words bits[F];
        BASISCONV_UNROLL for (int f = 0; f < F; f++) bits[f] = Lookup::load(word + f * kWidth);
        const int64_t here = left < slice.per_word ? left : slice.per_word;
        for (int64_t t = 0; t < here; t++, table += Lookup::kEntry) {
          Lookup::Pick picks[F];
          BASISCONV_UNROLL for (int f = 0; f < F; f++) {
            picks[f] = Lookup::pick(bits[f]);
            bits[f] = Lookup::next(bits[f]);
          }
          BASISCONV_UNROLL for (int p = 0; p < P; p++) {
            const Vec::Reg values = Lookup::table(table + p * pixel);
            BASISCONV_UNROLL for (int f = 0; f < F; f++) {
              sums[p][f] = Lookup::add(values, picks[f], sums[p][f], one, (p + f) % 2 == 1);
            }
          }
        }
      }
    }
  }
  BASISCONV_UNROLL for (int p = 0; p < P; p++) {
    BASISCONV_UNROLL for (int f = 0; f < F; f++) Vec::store(maps + p * maps_pixel + f * kWidth, sums[p][f]);
  }
}

template <int F, int P = Lookup::kPixels>
static void tile_of(int64_t pixels, const SliceRow& slice, int64_t x, const uint32_t* filters, float* maps,
                    int64_t maps_pixel) {
  if constexpr (P > 0 && P * F <= Lookup::kAccumulators) {
    if (pixels == P) return tile<P, F>(slice, x, filters, maps, maps_pixel);
  }
  if constexpr (P > 1) tile_of<F, P - 1>(pixels, slice, x, filters, maps, maps_pixel);
}

static BASISCONV_INLINE Vec::Reg activated(const StackedBinaryConv2dParams& params, Vec::Reg value) {
  if (params.activation != Activation::none) value = Vec::max(Vec::zero(), value);
  if (params.activation == Activation::relu6) value = Vec::min(Vec::set1(6.0f), value);
  return value;
}

// The maps of one pixel are its outputs: expanded filters, channels_last.
template <typename T>
static void store_outputs(const StackedBinaryConv2dParams& params, const StackedPack& pack, const float* maps,
                          int64_t pixels, T* to) {
  const int64_t K = params.weights.K, outputs = pack.filters;
  for (int64_t p = 0; p < pixels; p++) {
    for (int64_t slice = 0; slice < pack.slices; slice++) {
      const float* from = maps + (p * pack.slices + slice) * pack.slots;
      for (int64_t j = 0; j < outputs; j += kWidth) {
        const int64_t k = slice * outputs + j, left = outputs - j;
        const Vec::Reg value = Vec::load(from + j);
        if (left >= kWidth) {
          const Vec::Reg out = Vec::fma(value, Vec::load(params.scale + k), Vec::load(params.bias + k));
          Vec::store(to + p * K + k, activated(params, out));
        } else {
          const Vec::Reg out = Vec::fma(value, Vec::load_n(params.scale + k, left), Vec::load_n(params.bias + k, left));
          Vec::store_n(to + p * K + k, activated(params, out), left);
        }
      }
    }
  }
}

// Select and stack, for up to a register of pixels: the maps turned, so that a register holds the pixels of one map;
// an output adds up whole registers; for channels_last a square of outputs is turned back.
template <typename T>
static void stack_maps(const StackedBinaryConv2dParams& params, const StackedPack& pack, const int32_t* rows,
                       const float* maps, int64_t pixels, float* turned, T* to, int64_t to_plane) {
  const int64_t K = params.weights.K, a_pixel = pack.slices * pack.slots;
  for (int64_t i = 0; i < a_pixel; i += kWidth) {
    Vec::Reg square[kWidth];
    BASISCONV_UNROLL for (int p = 0; p < kWidth; p++) square[p] = Vec::load(maps + p * a_pixel + i);
    transpose(square);
    BASISCONV_UNROLL for (int j = 0; j < kWidth; j++) Vec::store(turned + (i + j) * kWidth, square[j]);
  }
  const auto output = [&](int64_t k) BASISCONV_LAMBDA {
    const int32_t* row = rows + k * pack.splits;
    Vec::Reg sum = Vec::load(turned + row[0] * kWidth);
    for (int64_t i = 1; i < pack.splits; i++) sum = Vec::add(sum, Vec::load(turned + row[i] * kWidth));
    return activated(params, Vec::fma(sum, Vec::set1(params.scale[k]), Vec::set1(params.bias[k])));
  };
  if (!params.channels_last) {
    for (int64_t k = 0; k < K; k++) {
      if (pixels == kWidth) {
        Vec::store(to + k * to_plane, output(k));
      } else {
        Vec::store_n(to + k * to_plane, output(k), pixels);
      }
    }
    return;
  }
  for (int64_t k = 0; k < K; k += kWidth) {
    const int64_t left = K - k < kWidth ? K - k : kWidth;
    Vec::Reg square[kWidth];
    BASISCONV_UNROLL for (int i = 0; i < kWidth; i++) square[i] = i < left ? output(k + i) : Vec::zero();
    transpose(square);
    for (int64_t p = 0; p < pixels; p++) {
      if (left == kWidth) {
        Vec::store(to + p * K + k, square[p]);
      } else {
        Vec::store_n(to + p * K + k, square[p], left);
      }
    }
  }
}

// Tables of the input rows that output row y of image n reads, filled unless they are there; taps inside the image.
template <typename T>
struct Inputs {
  const StackedBinaryConv2dParams& params;
  const StackedPlan& plan;
  TableRing ring;
  float* staged;
  int64_t* held;  // [ring_rows]: which input row of the batch a slot holds, or -1

  const float* row(int64_t n, int64_t y) const {
    const int64_t slot = y % plan.ring_rows, wanted = n * params.H + y;
    float* tables = ring.rows + slot * ring.row_size;
    if (held[slot] == wanted) return tables;
    held[slot] = wanted;
    const float* from = staged;
    int64_t pixel = params.weights.C;
    if (plan.in_place) {
      from = static_cast<const float*>(params.input) + n * params.input_stride_n + y * params.input_stride_h;
      pixel = params.input_stride_w;
    } else if (params.planes > 0) {
      stage_packed(params, n, y, staged);
    } else {
      stage_real<T>(params, n, y, staged);
    }
    fill_tables(params, plan.pack, ring, from, pixel, tables);
    return tables;
  }
};

template <typename T>
static void run_as(const StackedBinaryConv2dParams& params, const StackedPlan& plan, float* scratch, int64_t begin,
                   int64_t end) {
  const StackedPack& pack = plan.pack;
  const StackedBinaryWeights& w = params.weights;
  const uint32_t* words = static_cast<const uint32_t*>(params.packed);
  const int32_t* stacking = reinterpret_cast<const int32_t*>(words + pack.words_size);
  float* staged = scratch + plan.ring_size;
  float* maps = staged + plan.staged_size;
  float* turned = maps + plan.maps_size;
  memset(maps, 0, plan.maps_size * sizeof(float));  // pixels that pad the last register are read and dropped

  int64_t* held = new int64_t[plan.ring_rows];
  const float** rows = new const float*[2 * w.R];
  for (int64_t i = 0; i < plan.ring_rows; i++) held[i] = -1;
  const Inputs<T> inputs{params, plan, make_table_ring(params, plan, scratch), staged, held};
  const float** slice_rows = rows + w.R;
  const int64_t pixel = inputs.ring.pixel;
  SliceRow slice{slice_rows,   0, 0, w.S, params.dilation_w * pixel, params.stride_w * pixel, pack.count, pack.words,
                 pack.per_word};
  const int64_t a_pixel = pack.slices * pack.slots, lanes = pack.vectors * kWidth;
  const int64_t block_size = w.R * w.S * pack.words * lanes;

  for (int64_t unit = begin; unit < end; unit++) {
    const int64_t n = unit / params.OH, y = unit % params.OH;
    slice.low_r = w.R;
    slice.high_r = -1;
    for (int64_t r = 0; r < w.R; r++) {
      const int64_t in_y = y * params.stride_h + r * params.dilation_h - params.pad_top;
      if (in_y < 0 || in_y >= params.H) continue;
      rows[r] = inputs.row(n, in_y);
      if (slice.low_r > r) slice.low_r = r;
      slice.high_r = r;
    }
    T* output = static_cast<T*>(params.output);
    output += params.channels_last ? unit * params.OW * w.K : n * w.K * params.OH * params.OW + y * params.OW;
    for (int64_t start = 0; start < params.OW; start += plan.chunk) {
      const int64_t pixels = params.OW - start < plan.chunk ? params.OW - start : plan.chunk;
      for (int64_t x = 0; x < pixels; x += plan.pixels) {
        const int64_t here = pixels - x < plan.pixels ? pixels - x : plan.pixels;
        for (int64_t s = 0; s < pack.slices; s++) {
          for (int64_t r = slice.low_r; r <= slice.high_r; r++)
            slice_rows[r] = rows[r] + s * pack.count * Lookup::kEntry;
          const uint32_t* filters = words + (pack.sets > 1 ? s * pack.set_size : 0);
          for (int64_t b = 0; b < pack.blocks; b++) {
            float* to = maps + x * a_pixel + s * pack.slots + b * lanes;
            if (pack.vectors == 2) {
              tile_of<2>(here, slice, start + x, filters + b * block_size, to, a_pixel);
            } else {
              tile_of<1>(here, slice, start + x, filters + b * block_size, to, a_pixel);
            }
          }
        }
      }
      if (pack.expanded && params.channels_last) {
        store_outputs(params, pack, maps, pixels, output + start * w.K);
        continue;
      }
      for (int64_t x = 0; x < pixels; x += kWidth) {
        const int64_t here = pixels - x < kWidth ? pixels - x : kWidth;
        T* to = output + (start + x) * (params.channels_last ? w.K : 1);
        stack_maps(params, pack, stacking, maps + x * a_pixel, here, turned, to, params.OH * params.OW);
      }
    }
  }
  delete[] rows;
  delete[] held;
}

static void run(const StackedBinaryConv2dParams& params, const StackedPlan& plan, float* scratch, int64_t begin,
                int64_t end) {
  switch (params.dtype) {
    case DType::f32:
      return run_as<float>(params, plan, scratch, begin, end);
    case DType::bf16:
      return run_as<bf16>(params, plan, scratch, begin, end);
    case DType::f16:
      return run_as<f16>(params, plan, scratch, begin, end);
  }
}

}  // namespace BASISCONV_ISA

CpuStackedBinaryConv2d BASISCONV_JOIN(cpu_stacked_binary_conv2d_, BASISCONV_ISA)() {
  return {BASISCONV_ISA::pack, BASISCONV_ISA::run};
}

}  // namespace basisconv
