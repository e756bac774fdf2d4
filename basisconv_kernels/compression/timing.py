"""Milliseconds of layers, side by side: interleaved, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

WARM_UPS = 3
LEAST_ROUNDS = 5
SECONDS = 0.1  # of measuring a module


def measure_ms(modules: Sequence[nn.Module], input: Tensor, seconds: float = SECONDS) -> list[float]:
    """Median milliseconds a call of each module, in eval mode without gradients.

    The modules take turns, call by call, until ``seconds`` were spent on each or ``LEAST_ROUNDS`` rounds are done,
    whichever comes later; on a CUDA device each call is waited for.

    Args:
        modules: called as ``module(input)``; their training flags come back afterwards.
        input (Tensor[N, C, H, W]): what all of them take.
        seconds: time to spend on each.
    """
    flags = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        with torch.inference_mode():
            for module in modules:
                for _ in range(WARM_UPS):
                    _timed(module, input)
            taken: list[list[float]] = [[] for _ in modules]
            end = time.perf_counter() + seconds * len(modules)
            while len(taken[0]) < LEAST_ROUNDS or time.perf_counter() < end:
                for module, times in zip(modules, taken, strict=True):
                    times.append(_timed(module, input))
    finally:
        for part, flag in flags:
            part.training = flag
    return [1e3 * statistics.median(times) for times in taken]


def _timed(module: nn.Module, input: Tensor) -> float:
    start = time.perf_counter()
    module(input)
    if input.is_cuda:
        torch.cuda.synchronize(input.device)
    return time.perf_counter() - start


def random_like(example: Tensor, device: torch.device) -> Tensor:
    """Normal random numbers of the shape, dtype and memory format of ``example``, which may lie on the meta device."""
    empty = torch.empty_like(example, device=device)
    return empty.copy_(torch.randn(example.shape, generator=torch.Generator().manual_seed(0)))
