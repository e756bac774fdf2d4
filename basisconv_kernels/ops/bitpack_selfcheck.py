"""What must pass on a GPU before ``bitpack`` chooses a backend there by itself; see ``core.selfcheck``."""

from __future__ import annotations

import functools
from typing import Any

import torch

from basisconv_kernels.core.packed import Threshold
from basisconv_kernels.core.problem import dtype_name
from basisconv_kernels.core.selfcheck import Check
from basisconv_kernels.reference import bitpack as reference

# Pieces of 16 bytes and none, one word and several, bits behind the last channel.
CHANNELS = (3, 37, 72, 256)


def cuda(problem: Any) -> Check:
    """The kernels of a dtype: one for each way in which maps may lie."""
    return Check(
        f"bitpack cuda {dtype_name(problem.dtype)}",
        functools.partial(against_reference, "cuda", problem.dtype, problem.device),
    )


def triton(problem: Any) -> Check:
    """The kernels of a dtype: their forms are all in one check."""
    return Check(
        f"bitpack triton {dtype_name(problem.dtype)}",
        functools.partial(against_reference, "triton", problem.dtype, problem.device),
    )


def against_reference(backend: str, dtype: torch.dtype, device: str) -> None:
    """Run signs, thresholds and codes on maps in both memory formats.

    Raises:
        AssertionError, RuntimeError, ...: a word is wrong, or the kernel does not run.
    """
    from basisconv_kernels.ops.bitpack import bitpack

    generator = torch.Generator().manual_seed(0)
    for C in CHANNELS:
        maps = (4 * torch.randn(2, C, 9, 21, generator=generator)).to(dtype)
        bound = torch.randn(C, generator=generator).to(torch.float32 if dtype.is_floating_point else torch.int32)
        thresholds = Threshold(bound, torch.randint(2, (C,), generator=generator).bool())
        for layout in (torch.contiguous_format, torch.channels_last):
            laid_out = maps.to(device).contiguous(memory_format=layout)
            for given, bits, unsigned in ((None, 1, False), (thresholds, 1, False), (None, 1, True), (None, 3, True)):
                there = given and Threshold(given.value.to(device), given.flip.to(device))
                got = bitpack(laid_out, threshold=there, bits=bits, unsigned=unsigned, backend=backend)
                expected = reference.forward(maps, given, bits, got.encoding)
                if not torch.equal(got.words.cpu(), expected):
                    raise AssertionError(f"bitpack {dtype} of {C} channels, {bits} bits, {layout}: wrong words")
