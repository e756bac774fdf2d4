"""Times of the backends of the ops with filters of bits: the entries of a tuned table, measured on demand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from basisconv_kernels.compression.problems import SCALES, BitProblem, op_of
from basisconv_kernels.core import registry, timing
from basisconv_kernels.ops import binary_conv2d, stacked_binary_conv2d, ternary_conv2d
from basisconv_kernels.ops.binary_conv2d_native import binary_conv2d_pack
from basisconv_kernels.ops.bitpack import bitpack
from basisconv_kernels.ops.stacked_binary_conv2d_native import stacked_binary_conv2d_pack
from basisconv_kernels.ops.ternary_conv2d_native import ternary_conv2d_pack

DENSITY = 0.1  # of the ternary weights that are measured; the kernel's time grows with it, plain PyTorch's does not

_CANDIDATES = {
    "binary_conv2d": binary_conv2d.CANDIDATES,
    "stacked_binary_conv2d": stacked_binary_conv2d.CANDIDATES,
    "ternary_conv2d": ternary_conv2d.CANDIDATES,
}


def measure(problem: BitProblem, seconds: float) -> dict[str, Any]:
    """Time every backend that can run a problem, in turn, forward only, on random numbers and with packed weights.

    Args:
        problem: with its sizes, on the CPU.
        seconds: for all of them together.

    Returns:
        dict: an entry of a tuned table, as docs/dispatch.md describes it.
    """
    op = op_of(problem)
    able = [name for name, against in registry.reasons(_CANDIDATES[op], problem).items() if not against]
    call = _CALLS[op](problem)
    with torch.inference_mode():
        taken = timing.interleave({name: functools.partial(call, backend=name) for name in able}, seconds)
    spreads = {name: series.scaled(1e3).spread() for name, series in taken.items()}
    return {
        "op": op,
        "problem": problem.to_json(),
        "threads": torch.get_num_threads(),
        "ms": {name: spread.to_dict() for name, spread in spreads.items()},
        "fastest": min(spreads, key=lambda name: spreads[name].median),
        "disturbed": round(timing.disturbed(taken.values()), 4),
    }


def _input(p: Any, generator: torch.Generator) -> Tensor:
    layout = torch.channels_last if p.channels_last else torch.contiguous_format
    empty = torch.empty(p.N, p.C, p.H, p.W, dtype=p.dtype, memory_format=layout)
    return empty.copy_(torch.randn(p.N, p.C, p.H, p.W, generator=generator))


def _settings(p: Any) -> dict[str, Any]:
    names = ("stride", "padding", "dilation", "groups", "activation")
    return {name: getattr(p, name) for name in names}


def _binary(p: Any) -> Callable[..., object]:
    generator = torch.Generator().manual_seed(0)
    x = _input(p, generator)
    weight = torch.randn(p.K, p.C // p.groups, p.R, p.S, generator=generator)
    settings = {**_settings(p), "padding_value": p.padding_value, "output": p.output}
    operand = bitpack(x) if p.planes else x
    packed = binary_conv2d_pack(weight, groups=p.groups)
    return functools.partial(binary_conv2d.binary_conv2d, operand, weight, packed=packed, **settings)


def _stacked(p: Any) -> Callable[..., object]:
    generator = torch.Generator().manual_seed(0)
    bank = torch.where(torch.rand(p.n, p.low, p.R, p.S, generator=generator) < 0.5, -1.0, 1.0)
    index = torch.randint(p.n, (p.K, p.splits), generator=generator)
    signs = p.mode == "signs"
    packed = stacked_binary_conv2d_pack(bank, index, groups=p.groups, binarize_input=signs)
    return functools.partial(
        stacked_binary_conv2d.stacked_binary_conv2d, _input(p, generator), bank, index, packed=packed,
        binarize_input=signs, **_settings(p),
    )  # fmt: skip


def _ternary(p: Any) -> Callable[..., object]:
    generator = torch.Generator().manual_seed(0)
    size = (p.K, p.C // p.groups, p.R, p.S)
    weight = torch.randn(size, generator=generator) * (torch.rand(size, generator=generator) < DENSITY)
    planes = ternary_conv2d.ternary_planes(weight.sign())
    scale, negative = (torch.rand(p.K, generator=generator) + 0.5 for _ in range(2))
    count = SCALES.index(p.scales)
    return functools.partial(
        ternary_conv2d.ternary_conv2d, _input(p, generator), planes, scale if count else None,
        torch.randn(p.K, generator=generator) if p.bias else None, negative_scale=negative if count > 1 else None,
        packed=ternary_conv2d_pack(planes, p.C, groups=p.groups), **_settings(p),
    )  # fmt: skip


_CALLS: dict[str, Callable[[Any], Callable[..., object]]] = {
    "binary_conv2d": _binary,
    "stacked_binary_conv2d": _stacked,
    "ternary_conv2d": _ternary,
}
