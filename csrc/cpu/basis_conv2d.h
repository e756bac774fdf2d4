// The CPU kernels of basis_conv2d: one table of functions an instruction set.
#pragma once
#include "basis_conv2d_plan.h"

namespace basisconv {

struct CpuBasisConv2d {
  // filters [Q, C/groups, R, S] and coefficients [K, Q or Q/groups] as float, dense → the packed floats.
  void (*pack)(const BasisConv2dWeights& weights, const CpuPack& pack, const float* filters, const float* coefficients,
               float* packed);
  // Units [begin, end) of the plan; scratch is 64-byte aligned, plan.scratch() floats, with any content.
  void (*run)(const BasisConv2dParams& params, const CpuPlan& plan, float* scratch, int64_t begin, int64_t end);
};

CpuBasisConv2d cpu_basis_conv2d_base();
CpuBasisConv2d cpu_basis_conv2d_avx2();
CpuBasisConv2d cpu_basis_conv2d_avx512();
CpuBasisConv2d cpu_basis_conv2d_avx512_bf16();  // packs of pairs only
CpuBasisConv2d cpu_basis_conv2d_amx();          // packs of the amx variant only

}  // namespace basisconv
