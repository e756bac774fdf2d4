// What binary_plan chooses, for problems read line by line: N C H K R stride groups planes threads, a square map and
// kernel, padding R / 2, planes 0 for signs. Prints counts or products, and the bytes of scratch. Usage: binary_choice
// SET. Compiled by test_binary_without_torch.py.
#include <iostream>
#include <string>

#include "../../csrc/cpu/binary_conv2d_plan.h"

using namespace basisconv;

int main(int count, char** arguments) {
  if (count != 2) return 2;
  const Isa isa = arguments[1] == std::string("amx") ? Isa::amx : Isa::avx512_bf16;
  BinaryConv2dParams p{};
  BinaryConv2dWeights& w = p.weights;
  int64_t threads;
  while (std::cin >> p.N >> w.C >> p.H >> w.K >> w.R >> p.stride_h >> w.groups >> p.planes >> threads) {
    p.codes = p.planes > 0;
    p.planes = p.codes ? p.planes : 1;
    p.W = p.H;
    w.S = w.R;
    p.stride_w = p.stride_h;
    p.dilation_h = p.dilation_w = 1;
    p.pad_top = p.pad_left = w.R / 2;
    p.OH = p.OW = (p.H + 2 * (w.R / 2) - w.R) / p.stride_h + 1;
    const BinaryPlan plan = binary_plan(p, binary_pack(w, isa), isa, threads);
    std::cout << (plan.raw == BinaryRaw::products ? "products " : "counts ") << plan.scratch_bytes << "\n";
  }
  return 0;
}
