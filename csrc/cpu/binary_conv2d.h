// The CPU kernels of binary_conv2d: one table of functions an instruction set.
#pragma once
#include "binary_conv2d_plan.h"

namespace basisconv {

struct CpuBinaryConv2d {
  // Sign words of the filters, [K][R * S][words_for(C / groups)], → counts and bits; both must be zero before.
  void (*pack)(const BinaryConv2dWeights& weights, const BinaryPack& pack, const uint32_t* words, int32_t* counts,
               uint8_t* bits);
  // Units [begin, end) of the plan; scratch is 64-byte aligned, plan.scratch_bytes, with any content.
  void (*run)(const BinaryConv2dParams& params, const BinaryPlan& plan, uint8_t* scratch, int64_t begin, int64_t end);
};

CpuBinaryConv2d cpu_binary_conv2d_base();
CpuBinaryConv2d cpu_binary_conv2d_avx2();
CpuBinaryConv2d cpu_binary_conv2d_avx512();            // byte shuffles of 512 bits
CpuBinaryConv2d cpu_binary_conv2d_avx512_vpopcntdq();  // counts bits itself
CpuBinaryConv2d cpu_binary_conv2d_amx();               // multiplies on the matrix unit: plans of products

}  // namespace basisconv
