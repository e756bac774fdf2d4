#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace basisconv {
namespace {

#if defined(__x86_64__)
// Conversions from and to float16; not every compiler has a name for it in __builtin_cpu_supports.
bool has_f16c() {
  constexpr unsigned kF16c = 1u << 29;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & kF16c) != 0;
}

// The matrix unit with both of its products, of bfloat16 and of bytes (every processor with one of them has the other
// so far), and the kernel's leave to use its registers, which is asked for once a process.
bool has_amx() {
#if defined(__linux__)
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kAmx = kAmxBf16 | kAmxTile | kAmxInt8;
  if ((edx & kAmx) != kAmx) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx:
      return "amx";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::avx512_vpopcntdq:
      return "avx512_vpopcntdq";
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
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  const bool popcount = avx512 && __builtin_cpu_supports("avx512vpopcntdq");
  if (popcount && __builtin_cpu_supports("avx512bf16")) return has_amx() ? Isa::amx : Isa::avx512_bf16;
  return popcount ? Isa::avx512_vpopcntdq : avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::base;
#else
  return Isa::base;
#endif
}

Isa isa_in_use() {
  static const Isa chosen = [] {
    Isa isa = std::min(isa_of_processor(), kWidestIsa);
    if (const char* cap = std::getenv("BASISCONV_CPU_ISA")) {
      for (Isa wanted : {Isa::base, Isa::avx2, Isa::avx512, Isa::avx512_vpopcntdq, Isa::avx512_bf16, Isa::amx}) {
        if (std::strcmp(cap, isa_name(wanted)) == 0 && wanted < isa) isa = wanted;
      }
    }
    return isa;
  }();
  return chosen;
}

}  // namespace basisconv
