#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace basisconv {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "base";
  }
}

Isa isa_of_processor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::base;
#else
  return Isa::base;
#endif
}

Isa isa_in_use() {
  static const Isa chosen = [] {
    Isa isa = isa_of_processor();
    if (const char* cap = std::getenv("BASISCONV_CPU_ISA")) {
      for (Isa wanted : {Isa::base, Isa::avx2, Isa::avx512}) {
        if (std::strcmp(cap, isa_name(wanted)) == 0 && wanted < isa) isa = wanted;
      }
    }
    return isa;
  }();
  return chosen;
}

}  // namespace basisconv
