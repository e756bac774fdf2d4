// The CPU kernels of ternary_conv2d: one table of functions an instruction set.
#pragma once
#include "ternary_conv2d_plan.h"

namespace basisconv {

struct CpuTernaryConv2d {
  int64_t width;  // floats of a register; 16-bit numbers, of packed activations, are twice as many
  // Units [begin, end) of the plan; scratch is 64-byte aligned, plan.scratch() floats, with any content.
  void (*run)(const TernaryConv2dParams& params, const TernaryPlan& plan, const int32_t* offsets, float* scratch,
              int64_t begin, int64_t end);
};

CpuTernaryConv2d cpu_ternary_conv2d_base();
CpuTernaryConv2d cpu_ternary_conv2d_avx2();
CpuTernaryConv2d cpu_ternary_conv2d_avx512();

// With a matrix unit, of the tiles: output rows [begin, end) over the batch. negative_scale as in TernaryConv2dParams.
void cpu_ternary_conv2d_amx(const StackedBinaryConv2dParams& params, const StackedPlan& plan,
                            const float* negative_scale, float* scratch, int64_t begin, int64_t end);

}  // namespace basisconv
