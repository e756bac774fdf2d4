// Which instruction set the CPU kernels run on.
#pragma once
#include <cstdint>

namespace basisconv {

// avx512_vpopcntdq: AVX-512 with a popcount of its own; avx512_bf16: that with products of bfloat16 pairs; amx: that
// with the matrix unit and its products of bfloat16 and of bytes. What has no kernel of its own for a set runs on the
// widest below that has one.
enum class Isa : int32_t { base = 0, avx2 = 1, avx512 = 2, avx512_vpopcntdq = 3, avx512_bf16 = 4, amx = 5 };

// The widest set that was compiled; setup.py names it, and leaves out those that the compiler does not know.
constexpr Isa kWidestIsa = Isa::BASISCONV_WIDEST;

const char* isa_name(Isa isa);

// The widest set of this processor.
Isa isa_of_processor();

// The set in use: the widest that processor and library have, capped by BASISCONV_CPU_ISA; decided once a process.
Isa isa_in_use();

}  // namespace basisconv
