"""What a call of ``tucker_conv2d`` should take on a GPU where nothing was measured; see ``basis_conv2d_model``.

The first 1×1 is the same library call either way, so what decides is the rest: the basis kernel on M, against two
library kernels. The model also says when the whole chain should run in one pass, which computes M once a tap but spares
its way through memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from basisconv_kernels.core import tuning
from basisconv_kernels.core.problem import Conv2dProblem, TuckerConv2dProblem
from basisconv_kernels.ops import basis_conv2d_model as basis
from basisconv_kernels.ops.basis_conv2d_model import CACHE, MEMORY, OPERATIONS, REACHED

OP = "tucker_conv2d"
ONE_PASS, TWO_PASSES = "cuda_one_pass", "cuda"  # backends


def last_two_stages(problem: TuckerConv2dProblem) -> Conv2dProblem:
    """What the basis kernel is asked: core and u_out on M."""
    fields = {name: getattr(problem, name) for name in Conv2dProblem.__dataclass_fields__}
    return Conv2dProblem(**{**fields, "C": problem.rank_in})


def slower_than_plain(problem: TuckerConv2dProblem) -> dict[str, str]:
    """{backend: by how much, in words} of those slower than plain PyTorch: as measured, else on a GPU as predicted.

    The CUDA kernel of the whole chain is passed over unless it was measured to be faster than two passes, at sizes near
    the problem's if it states any.
    """
    known = {backend for entry in tuning.entries_for(OP, problem) for backend in entry["ms"]}
    predicted = basis.predicted_slower(last_two_stages(problem))
    if "triton" in predicted and one_pass_pays(problem):
        predicted.pop("triton")
    unknown = {name: words for name, words in predicted.items() if name not in known}
    found = {**unknown, **tuning.slower(OP, problem)}
    if problem.device == "cuda" and (
        why := against_one_pass(tuning.entries_for(OP, problem), pixels_of(problem.to_json()))
    ):
        found.setdefault(ONE_PASS, why)
    return found


def pixels_of(problem: Mapping[str, Any]) -> int:
    """N·H·W of a problem as a table holds it; 0 of one that leaves batch and map open, or states no such numbers."""
    sizes = [problem.get(name) for name in ("N", "H", "W")]
    return math.prod(size if type(size) is int else 0 for size in sizes)


def against_one_pass(entries: Sequence[Mapping[str, Any]], pixels: int = 0) -> str | None:
    """Why the CUDA kernels keep to two passes; None where measured times of the weights say that one is faster.

    In no entry may one pass be slower, by quartiles as everywhere, and in one it must be faster. With few pixels a
    second launch weighs more than the work that one pass repeats, so a call that knows its size asks those entries
    alone that were measured next to it: at no more pixels the largest, at no fewer the smallest.

    Args:
        entries: measured with these weights.
        pixels: N·H·W of the call; 0 where the choice must hold for every size, and all entries count.
    """
    pairs = [(e["ms"][ONE_PASS], e["ms"][TWO_PASSES], e) for e in entries if {ONE_PASS, TWO_PASSES} <= e["ms"].keys()]
    if pixels:
        sizes = {pixels_of(entry["problem"]) for _, _, entry in pairs}
        near = {max((n for n in sizes if n <= pixels), default=0), min((n for n in sizes if n >= pixels), default=0)}
        pairs = [pair for pair in pairs if pixels_of(pair[2]["problem"]) in near - {0}]
    for one, two, entry in pairs:
        if one["q1"] > two["q3"]:
            times = f"{one['median']:.3f} ms against {two['median']:.3f} ms"
            return f"measured slower than two passes, {times} ({tuning.circumstances(dict(entry))})"
    if not pairs:
        return "was not measured beside two passes with these weights"
    return None if any(one["q3"] < two["q1"] for one, two, _ in pairs) else "measured no faster than two passes"


def one_pass_pays(problem: TuckerConv2dProblem) -> bool:
    """Whether Triton should run the chain in one pass: a function of the weights and the geometry alone."""
    from basisconv_kernels.triton_kernels import configs

    return _pays(problem, configs.arithmetic_of(problem.dtype, problem.precise))


@functools.lru_cache(4096)
def _pays(p: TuckerConv2dProblem, arithmetic: str) -> bool:
    from basisconv_kernels.triton_kernels import configs

    if configs.against_one_pass(arithmetic, p.rank_in, p.Q, p.precise) is not None:
        return False
    return _one_pass(p, arithmetic) < _first_stage(p, arithmetic) + basis.triton(last_two_stages(p), arithmetic)


def _one_pass(p: TuckerConv2dProblem, arithmetic: str) -> float:
    """Nanoseconds an output pixel of the kernel in ``triton_kernels/tucker_conv2d.py``."""
    from basisconv_kernels.triton_kernels import configs

    size = basis._bytes(p)
    BM, BK, BL = configs.ONE_PASS[arithmetic]
    BK, BL = min(BK, configs.power_of_two(p.C)), min(BL, configs.power_of_two(p.K))
    C, K = -(-p.C // BK) * BK, -(-p.K // BL) * BL
    rank_in, rank_out = configs.power_of_two(p.rank_in), configs.power_of_two(p.Q)
    taps = p.R * p.S
    products = 2 * (taps * (C * rank_in + rank_in * rank_out) + rank_out * K)
    fetched = (taps * (C + (C * rank_in + rank_in * rank_out) / BM) + rank_out * K / BM) * size
    moved = (p.C * p.stride[0] * p.stride[1] + p.K) * size
    return max(max(products / OPERATIONS[arithmetic], fetched / CACHE) / REACHED[arithmetic], moved / MEMORY)


def _first_stage(p: TuckerConv2dProblem, arithmetic: str) -> float:
    """Nanoseconds an output pixel of the 1×1 on all pixels of the input, and of its launch nothing."""
    pixels = p.stride[0] * p.stride[1]
    moved = pixels * (p.C + p.rank_in) * basis._bytes(p)
    return max(2 * pixels * p.C * p.rank_in / OPERATIONS[arithmetic], moved / MEMORY)
