// stacked_binary_conv2d on the CPU, compiled once per instruction set (BASISCONV_ISA).
//
// float32, bfloat16 and float16 input of any strides, its signs, or packed bits; sums in float. A multiplication by ±1
// is a choice of sign: sums of a few channels are tabulated once a pixel, and the bits of a filter pick one
// (stacked_binary_conv2d_tables.h). The bank stays bits; the maps of all slices live for some pixels in the first-level
// cache, where the outputs add up theirs.
// Test: tests/ops/test_stacked_binary_conv2d.py. Bench: python -m bench run --suite C9.
#include "stacked_binary_conv2d.h"

#include "stacked_binary_conv2d_outputs.h"
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
            const int64_t j = filter_of_channel(w, pack, index, set, f, c);
            positive[i] = bank[(j * bank_low + c % bank_low) * taps + t] > 0.0f;
          }
          at[table / pack.per_word * lanes] |= Lookup::code(positive) << (table % pack.per_word * Lookup::kStep);
        }
      }
    }
  }
  pack_rows(w, pack, index, packed);
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
  float* staged = scratch + plan.ring_size;
  float* maps = staged + plan.staged_size;
  const Finish<T> finish(params, plan, maps + plan.maps_size);

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
      for (int64_t x = 0; x < pixels; x += kWidth) {
        Pixels of{{}, pixels - x < kWidth ? pixels - x : kWidth};
        for (int64_t p = 0; p < kWidth; p++) of.at[p] = maps + (x + (p < of.count ? p : 0)) * a_pixel;
        finish(of, n, y * params.OW + start + x);
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
