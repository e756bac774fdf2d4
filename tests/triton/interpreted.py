"""What the interpreting process runs: functions for the fixture ``interpreter``; no test asserts here by itself."""

from __future__ import annotations

import functools
from typing import Any

import torch

from basisconv_kernels import basis_conv2d, testing
from basisconv_kernels.testing import Case

kernel = functools.partial(basis_conv2d, backend="triton")


def start() -> bool:
    """Settle the process; whether kernels are interpreted here."""
    torch.set_num_threads(1)
    from triton import knobs

    return bool(knobs.runtime.interpret)


def check(case: Case, seed: int = 0) -> None:
    """The whole contract of the forward pass."""
    testing.check(case, kernel, seed=seed)


def check_gradients(case: Case) -> None:
    """All gradients against the explicit formulas."""
    testing.check_gradients(case, kernel)


def nan_maps(case: Case) -> list[tuple[str, Any, Any]]:
    """Where the result is NaN, and where plain PyTorch's is, when one element of one tensor is."""
    inputs = testing.make_inputs(case)
    found = []
    for name, tensor in zip(("input", "basis_weight", "coefficients", "bias", "residual"), inputs.tensors, strict=True):
        if tensor is None:
            continue
        middle = tuple(size // 2 for size in tensor.shape)
        for value in (torch.nan, torch.inf):
            kept = tensor[middle].item()
            tensor[middle] = value
            got = kernel(*inputs.tensors[:4], residual=inputs.residual, **case.arguments())
            found.append((f"{value} in {name}", got.isnan(), testing.plain(case, inputs.tensors).isnan()))
            tensor[middle] = kept
    return found
