// The CPU kernels of basis_conv2d: one table of functions an instruction set.
#pragma once
#include "basis_conv2d_plan.h"

namespace basisconv {

// [Q, C/groups, R, S] as float, in this order or with the channels innermost: how far neighbours lie from each other.
struct BasisFilters {
  const float* values;
  int64_t filter_stride, channel_stride, tap_stride;
};

struct CpuBasisConv2d {
  // filters and coefficients [K, Q or Q/groups], dense → the packed floats, those parts of `pack` that have a size.
  void (*pack)(const BasisConv2dWeights& weights, const CpuPack& pack, const BasisFilters& filters,
               const float* coefficients, float* packed);
  // Units [begin, end) of the plan; scratch is 64-byte aligned, plan.scratch() floats, with any content.
  void (*run)(const BasisConv2dParams& params, const CpuPlan& plan, float* scratch, int64_t begin, int64_t end);
};

CpuBasisConv2d cpu_basis_conv2d_base();
CpuBasisConv2d cpu_basis_conv2d_avx2();
CpuBasisConv2d cpu_basis_conv2d_avx512();
CpuBasisConv2d cpu_basis_conv2d_avx512_bf16();  // packs of pairs only
CpuBasisConv2d cpu_basis_conv2d_amx();          // packs of the amx variant only

}  // namespace basisconv
