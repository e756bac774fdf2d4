// basis_conv2d on the CPU: packing and the choice of variant. Compiled once per instruction set (BASISCONV_ISA).
//
// float32, bfloat16 and float16 tensors; arithmetic in float. With products of bfloat16 pairs (BASISCONV_PAIRS)
// bfloat16 alone, the same tiles on slots of two channels. Input of any strides; result in channels_last or NCHW.
// Wins over two convolutions because z stays in the cache, small Q fills whole registers, and 3x3 runs as Winograd.
// Test: tests/ops/test_basis_conv2d.py. Bench: python -m bench run --suite C1 --suite C3.
#include "basis_conv2d.h"

#include "basis_conv2d_direct.h"
#include "basis_conv2d_filters.h"
#if !defined(BASISCONV_PAIRS)
#include "basis_conv2d_winograd.h"
#endif

#define BASISCONV_JOIN2(a, b) a##b
#define BASISCONV_JOIN(a, b) BASISCONV_JOIN2(a, b)

namespace basisconv {
namespace BASISCONV_ISA {

// One register of taps to the positions of Winograd's form; only floats are ever transformed.
static void transform([[maybe_unused]] const CpuPack& pack, [[maybe_unused]] const float* taps,
                      [[maybe_unused]] float* transformed) {
#if !defined(BASISCONV_PAIRS)
  if (pack.position_rows == 5) {
    transform_filter<Form<2, 2>>(taps, transformed);
  } else if (pack.tile_width == 4) {
    transform_filter<Form<1, 4>>(taps, transformed);
  } else {
    transform_filter<Form<1, 2>>(taps, transformed);
  }
#endif
}

// One register of packed filters at a time: its lanes' taps side by side, transformed if need be, then stored by
// position; and as taps, for those who transform them when they are used.
static void pack_filters(const BasisConv2dWeights& w, const CpuPack& pack, const BasisFilters& filters,
                         Slots::Value* packed, Slots::Value* packed_taps) {
  const int64_t taps = w.R * w.S;
  const int64_t per_register = kWidth / pack.lanes, steps = pack.block / pack.lanes / Slots::kValues;
  const int64_t block_weights = steps * pack.vectors * kRegisterValues;  // one position of one channel block
  FilterBlock block(w, pack, filters);
  int64_t places[kRegisterValues];  // of what lies in the first register of a block
  for (int64_t at = 0; at < kRegisterValues; at++) {
    const int64_t lane = at / Slots::kValues;
    places[at] = block.place(lane / pack.lanes, 0, lane % pack.lanes * Slots::kValues + at % Slots::kValues);
  }
  float* side_by_side = new float[taps * kRegisterValues];
  float transformed[25 * kRegisterValues];
  const bool winograd = pack.variant == CpuVariant::winograd;
  const int64_t columns = winograd ? pack.position_columns : pack.positions;
  const auto store = [&](Slots::Value* to, const float* from) BASISCONV_LAMBDA {
    for (int64_t j = 0; j < kRegisterValues; j += kWidth) Vec::store(to + j, Vec::load(from + j));
  };
  for (int64_t group = 0; group < w.groups; group++) {
    for (int64_t f = 0; f < pack.filter_blocks; f++) {
      for (int64_t b = 0; b < pack.channel_blocks; b++) {
        block.read(group, f, b);
        const auto of_position = [&](int64_t p) BASISCONV_LAMBDA {
          return group * pack.group_size + (winograd
                                                ? winograd_filters_at(pack, p, f, b)
                                                : ((f * pack.channel_blocks + b) * pack.positions + p) * block_weights);
        };
        const int64_t first = of_position(0), next_row = of_position(columns) - first;
        const int64_t next_column = of_position(1) - first;
        const int64_t first_tap = group * pack.taps_group_size + winograd_taps_at(pack, f, b);
        for (int64_t i = 0; i < steps * pack.vectors; i++) {
          const int64_t step = i / pack.vectors, v = i % pack.vectors;
          for (int64_t t = 0; t < taps; t++) {
            const float* g = block.at(block.place(v * per_register, t, step * pack.lanes * Slots::kValues));
            for (int64_t at = 0; at < kRegisterValues; at++) side_by_side[t * kRegisterValues + at] = g[places[at]];
          }
          if (pack.filters_size > 0) {
            if (winograd) transform(pack, side_by_side, transformed);
            const float* from = winograd ? transformed : side_by_side;
            for (int64_t row = 0; row < pack.positions / columns; row++) {
              for (int64_t column = 0; column < columns; column++, from += kRegisterValues) {
                store(packed + first + row * next_row + column * next_column + i * kRegisterValues, from);
              }
            }
          }
          if (pack.taps_size > 0) {
            for (int64_t t = 0; t < taps; t++) {
              store(packed_taps + first_tap + (i * taps + t) * kRegisterValues, side_by_side + t * kRegisterValues);
            }
          }
        }
      }
    }
  }
  delete[] side_by_side;
}

// [panels][slots][rows][values of a slot]: `rows` outputs side by side, padded with zeros.
static void pack_coefficients(const BasisConv2dWeights& w, const CpuPack& pack, const float* coefficients,
                              int64_t panels, int64_t rows, Slots::Value* packed) {
  const int64_t group_filters = w.Q / w.groups, mixed = w.Q / w.mixing_groups, outputs = w.K / w.mixing_groups;
  for (int64_t group = 0; group < w.mixing_groups; group++) {
    for (int64_t p = 0; p < panels; p++) {
      const int64_t count = outputs - p * rows < rows ? outputs - p * rows : rows;
      for (int64_t slot = 0; slot < pack.slots; slot++) {
        const float* of_map[Slots::kValues];  // the panel's first coefficient; none of padding behind a group's maps
        for (int64_t v = 0; v < Slots::kValues; v++) {
          const int64_t map = slot * Slots::kValues + v, within = map % pack.maps;
          const int64_t q = map / pack.maps * group_filters + within;
          of_map[v] = within < group_filters ? coefficients + (group * outputs + p * rows) * mixed + q : nullptr;
        }
        for (int64_t k = 0; k < rows; k++) {
          for (int64_t v = 0; v < Slots::kValues; v++) {
            from_float(of_map[v] && k < count ? of_map[v][k * mixed] : 0.0f, packed++);
          }
        }
      }
    }
  }
}

static void pack(const BasisConv2dWeights& w, const CpuPack& pack, const BasisFilters& filters,
                 const float* coefficients, float* packed) {
  Slots::Value* of_filters = reinterpret_cast<Slots::Value*>(packed);
  Slots::Value* mixing = of_filters + Slots::kValues * pack.filters_size;
  Slots::Value* planar = mixing + Slots::kValues * pack.coefficients_size;
  pack_filters(w, pack, filters, of_filters, planar + Slots::kValues * pack.planar_size);
  if (pack.coefficients_size > 0) {
    pack_coefficients(w, pack, coefficients, pack.panels, pack.output_vectors * static_cast<int64_t>(kWidth), mixing);
  }
  if (pack.planar_size > 0) {
    pack_coefficients(w, pack, coefficients, pack.planar_panels, pack.planar_rows, planar);
  }
}

#if defined(BASISCONV_PAIRS)

static void run(const BasisConv2dParams& params, const CpuPlan& plan, float* scratch, int64_t begin, int64_t end) {
  run_direct<bf16>(params, plan, scratch, begin, end);
}

#else

template <typename T>
static void run_as(const BasisConv2dParams& params, const CpuPlan& plan, float* scratch, int64_t begin, int64_t end) {
  if (plan.pack.variant == CpuVariant::direct) {
    run_direct<T>(params, plan, scratch, begin, end);
  } else if (params.weights.stride_h == 2) {
    run_winograd<T, Form<2, 2>>(params, plan, scratch, begin, end);
  } else if (plan.pack.tile_width == 4) {
    run_winograd<T, Form<1, 4>>(params, plan, scratch, begin, end);
  } else {
    run_winograd<T, Form<1, 2>>(params, plan, scratch, begin, end);
  }
}

static void run(const BasisConv2dParams& params, const CpuPlan& plan, float* scratch, int64_t begin, int64_t end) {
  switch (params.weights.dtype) {
    case DType::f32:
      return run_as<float>(params, plan, scratch, begin, end);
    case DType::bf16:
      return run_as<bf16>(params, plan, scratch, begin, end);
    case DType::f16:
      return run_as<f16>(params, plan, scratch, begin, end);
  }
}

#endif

}  // namespace BASISCONV_ISA

CpuBasisConv2d BASISCONV_JOIN(cpu_basis_conv2d_, BASISCONV_ISA)() { return {BASISCONV_ISA::pack, BASISCONV_ISA::run}; }

}  // namespace basisconv
