// basis_conv2d on the CPU: packing and the choice of variant. Compiled once per instruction set (BASISCONV_ISA).
//
// float32, bfloat16 and float16 tensors; arithmetic in float. Input of any strides; result in channels_last or NCHW.
// Wins over two convolutions because z stays in the cache, small Q fills whole registers, and 3x3 runs as Winograd.
// Test: tests/ops/test_basis_conv2d.py. Bench: python -m bench run --suite C1.
#include "basis_conv2d.h"

#include "basis_conv2d_direct.h"
#include "basis_conv2d_winograd.h"

#define BASISCONV_JOIN2(a, b) a##b
#define BASISCONV_JOIN(a, b) BASISCONV_JOIN2(a, b)

namespace basisconv {
namespace BASISCONV_ISA {

// One register of packed filters at a time: its lanes' taps side by side, transformed if need be, then stored by
// position.
static void pack_filters(const BasisConv2dWeights& w, const CpuPack& pack, const float* filters, float* packed) {
  const int64_t group_channels = w.C / w.groups, group_filters = w.Q / w.groups, taps = w.R * w.S;
  const bool winograd = pack.variant == CpuVariant::winograd;
  const int64_t per_register = kWidth / pack.lanes, steps = pack.block / pack.lanes;
  const int64_t block_weights = steps * pack.vectors * kWidth;  // one position of one channel block
  float* side_by_side = new float[taps * kWidth];
  float transformed[25 * kWidth];
  for (int64_t group = 0; group < w.groups; group++) {
    for (int64_t f = 0; f < pack.filter_blocks; f++) {
      float* of_group = packed + group * pack.group_size;
      for (int64_t b = 0; b < pack.channel_blocks; b++) {
        for (int64_t i = 0; i < steps * pack.vectors; i++) {
          const int64_t step = i / pack.vectors, v = i % pack.vectors;
          for (int64_t lane = 0; lane < kWidth; lane++) {
            const int64_t q = f * pack.filters + v * per_register + lane / pack.lanes;
            const int64_t c = b * pack.block + step * pack.lanes + lane % pack.lanes;
            const bool real = q < group_filters && c < group_channels;
            const float* g = filters + ((group * group_filters + q) * group_channels + c) * taps;
            for (int64_t t = 0; t < taps; t++) side_by_side[t * kWidth + lane] = real ? g[t] : 0.0f;
          }
          if (winograd && w.stride_h == 2) {
            transform_filter<Form<2, 2>>(side_by_side, transformed);
          } else if (winograd && pack.tile_width == 4) {
            transform_filter<Form<1, 4>>(side_by_side, transformed);
          } else if (winograd) {
            transform_filter<Form<1, 2>>(side_by_side, transformed);
          }
          const float* from = winograd ? transformed : side_by_side;
          for (int64_t p = 0; p < pack.positions; p++) {
            const int64_t at = winograd ? winograd_filters_at(pack, p, f, b)
                                        : ((f * pack.channel_blocks + b) * pack.positions + p) * block_weights;
            Vec::store(of_group + at + i * kWidth, Vec::load(from + p * kWidth));
          }
        }
      }
    }
  }
  delete[] side_by_side;
}

// [panels][slots][rows]: `rows` outputs side by side, padded with zeros.
static void pack_coefficients(const BasisConv2dWeights& w, const CpuPack& pack, const float* coefficients,
                              int64_t panels, int64_t rows, float* packed) {
  const int64_t group_filters = w.Q / w.groups, mixed = w.Q / w.mixing_groups, outputs = w.K / w.mixing_groups;
  for (int64_t group = 0; group < w.mixing_groups; group++) {
    for (int64_t p = 0; p < panels; p++) {
      for (int64_t slot = 0; slot < pack.slots; slot++) {
        // A slot is a map of one convolution group, or padding behind that group's maps.
        const int64_t within = slot % pack.maps, q = slot / pack.maps * group_filters + within;
        for (int64_t row = 0; row < rows; row++) {
          const int64_t k = p * rows + row;
          const bool real = within < group_filters && k < outputs;
          *packed++ = real ? coefficients[(group * outputs + k) * mixed + q] : 0.0f;
        }
      }
    }
  }
}

static void pack(const BasisConv2dWeights& w, const CpuPack& pack, const float* filters, const float* coefficients,
                 float* packed) {
  pack_filters(w, pack, filters, packed);
  packed += pack.filters_size;
  pack_coefficients(w, pack, coefficients, pack.panels, pack.output_vectors * static_cast<int64_t>(kWidth), packed);
  packed += pack.coefficients_size;
  pack_coefficients(w, pack, coefficients, pack.planar_panels, pack.planar_rows, packed);
}

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

}  // namespace BASISCONV_ISA

CpuBasisConv2d BASISCONV_JOIN(cpu_basis_conv2d_, BASISCONV_ISA)() { return {BASISCONV_ISA::pack, BASISCONV_ISA::run}; }

}  // namespace basisconv
