// The CPU kernels of bitpack, one an instruction set.
#pragma once
#include "../ops/bitpack.h"

namespace basisconv {

// Rows [begin, end) of the N * H rows.
using CpuBitpack = void (*)(const BitpackParams& params, int64_t begin, int64_t end);

void cpu_bitpack_base(const BitpackParams& params, int64_t begin, int64_t end);
void cpu_bitpack_avx2(const BitpackParams& params, int64_t begin, int64_t end);
void cpu_bitpack_avx512(const BitpackParams& params, int64_t begin, int64_t end);

}  // namespace basisconv
