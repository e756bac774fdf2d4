// The CPU kernels of stacked_binary_conv2d: one table of functions an instruction set.
#pragma once
#include "stacked_binary_conv2d_plan.h"

namespace basisconv {

struct CpuStackedBinaryConv2d {
  // bank [n, low, R, S] of +1 and -1 and index [K, splits], dense → the packed words and rows.
  void (*pack)(const StackedBinaryWeights& weights, const StackedPack& pack, const float* bank, const int64_t* index,
               uint32_t* packed);
  // Output rows [begin, end) over the batch; scratch is 64-byte aligned, plan.scratch() floats, with any content.
  void (*run)(const StackedBinaryConv2dParams& params, const StackedPlan& plan, float* scratch, int64_t begin,
              int64_t end);
};

CpuStackedBinaryConv2d cpu_stacked_binary_conv2d_base();
CpuStackedBinaryConv2d cpu_stacked_binary_conv2d_avx2();
CpuStackedBinaryConv2d cpu_stacked_binary_conv2d_avx512();
CpuStackedBinaryConv2d cpu_stacked_binary_conv2d_amx();  // packs for the matrix unit only

}  // namespace basisconv
