"""Writes ``probe_wgmma.h``: wgmma of single bits and of bfloat16, for more N than the wrappers of the kernels have."""

from __future__ import annotations

SIZES = {"b1": (16, 24, 32, 48, 64, 80, 128, 144, 256), "bf16": (16, 32, 64, 128, 256)}
WAYS = {"b1": (0, 1), "bf16": (0, 1, 2)}
INSTRUCTION = {
    "b1": ("m64n{N}k256.s32.b1.b1.and.popc", "int", 256, "+r", "1"),
    "bf16": ("m64n{N}k16.f32.bf16.bf16", "float", 16, "+f", "1, 1, 1, 0"),
}


def one(kind: str, N: int) -> str:
    """A struct with ``rs`` and ``ss`` of one size."""
    name, number, depth, constraint, scales = INSTRUCTION[kind]
    instruction = f"wgmma.mma_async.sync.aligned.{name.format(N=N)}"
    count = N // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"{constraint}"(d[{i}])' for i in range(count))
    registers = ", ".join(f"%{count + i}" for i in range(4))
    ss_scales = "1, 1, 1, 0, 0" if kind == "bf16" else scales
    return f"""
struct {kind}_{N} {{
  using Sum = {number};
  static constexpr int N = {N}, depth = {depth};
  static constexpr const char* name = "{kind}";
  static __device__ __forceinline__ void rs(Sum (&d)[{count}], const uint32_t (&a)[4], uint64_t tile) {{
    asm volatile("{instruction} {{{sums}}}, {{{registers}}}, %{count + 4}, {scales};"
                 : {operands}
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tile));
  }}
  static __device__ __forceinline__ void ss(Sum (&d)[{count}], uint64_t left, uint64_t tile) {{
    asm volatile("{instruction} {{{sums}}}, %{count}, %{count + 1}, {ss_scales};"
                 : {operands}
                 : "l"(left), "l"(tile));
  }}
}};
"""


def text() -> str:
    """The whole header."""
    parts = ["#pragma once\n#include <cstdint>\n#include <cstdio>\n#include <string>\nnamespace {\n"]
    parts += [one(kind, N) for kind, sizes in SIZES.items() for N in sizes]
    parts.append("template <class W, int way>\nvoid print_wgmma(bool& first);\n")
    parts.append("bool print_all_wgmma(const std::string& kind) {\n  bool first = true;\n")
    for kind, sizes in SIZES.items():
        parts.append(f'  if (kind == "{kind}") {{\n    std::printf("{{");\n')
        parts += [f"    print_wgmma<{kind}_{N}, {way}>(first);\n" for N in sizes for way in WAYS[kind]]
        parts.append('    std::printf("}\\n");\n    return true;\n  }\n')
    parts.append("  return false;\n}\n}  // namespace\n")
    return "".join(parts)
