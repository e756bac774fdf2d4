"""Times of the backends of ``tucker_conv2d``: the entries of a tuned table, measured on demand or on first use."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from basisconv_kernels.core import log, registry, timing, timing_cuda, tuning
from basisconv_kernels.core.layout import memory_format
from basisconv_kernels.core.problem import TuckerConv2dProblem
from basisconv_kernels.ops.tucker_conv2d import CANDIDATES, OP, Settings, problem_of, tucker_conv2d
from basisconv_kernels.ops.tucker_conv2d_native import tucker_conv2d_pack

FIRST_USE_SECONDS = 0.1
ORDINARY = (Tensor, torch.nn.Parameter)


def able(problem: TuckerConv2dProblem) -> list[str]:
    """The backends that can run a problem here."""
    return [name for name, against in registry.reasons(CANDIDATES, problem).items() if not against]


class Drawn:
    """Random tensors of a problem on its device; weights once, inputs as many as are asked for."""

    def __init__(self, problem: TuckerConv2dProblem):
        self.p = p = problem
        self.generator = torch.Generator().manual_seed(0)
        self.layout = torch.channels_last if p.channels_last else torch.contiguous_format
        u_in, u_out = self._normal(p.C, p.rank_in) / p.C**0.5, self._normal(p.K, p.Q)
        core = self._normal(p.Q, p.rank_in, p.R, p.S) / p.taps**0.5
        self.weights = (u_in, core, u_out, self._normal(p.K) if p.bias else None)
        residual = self._normal(p.N, p.K, *p.output_size, layout=self.layout) if p.residual else None
        shape: dict[str, Any] = {"stride": p.stride, "dilation": p.dilation, "precise": p.precise}
        packed = tucker_conv2d_pack(core, u_out, **shape)
        self.settings: dict[str, Any] = {
            **shape, "padding": p.padding, "activation": p.activation, "residual": residual, "packed": packed,
        }  # fmt: skip

    def _normal(self, *shape: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
        empty = torch.empty(shape, dtype=self.p.dtype, device=self.p.device, memory_format=layout)
        return empty.copy_(torch.randn(*shape, generator=self.generator))

    def input(self) -> Tensor:
        """A new one."""
        return self._normal(self.p.N, self.p.C, self.p.H, self.p.W, layout=self.layout)

    def forward(self, backend: str, input: Tensor) -> Callable[[], object]:
        """A call with packed weights."""
        return lambda: tucker_conv2d(input, *self.weights, **self.settings, backend=backend)


def measure(problem: TuckerConv2dProblem, seconds: float) -> dict[str, Any]:
    """Time every backend that can run a problem, in turn, forward only, on random numbers and with packed weights.

    Args:
        problem: with its sizes, on the CPU.
        seconds: for all of them together.

    Returns:
        dict: an entry of a tuned table, as docs/dispatch.md describes it.
    """
    drawn = Drawn(problem)
    input = drawn.input()
    with torch.inference_mode():
        taken = timing.interleave({name: drawn.forward(name, input) for name in able(problem)}, seconds)
    spreads = {name: series.scaled(1e3).spread() for name, series in taken.items()}
    return {
        "op": OP,
        "problem": problem.to_json(),
        "threads": torch.get_num_threads(),
        "ms": {name: spread.to_dict() for name, spread in spreads.items()},
        "fastest": min(spreads, key=lambda name: spreads[name].median),
        "disturbed": round(timing.disturbed(taken.values()), 4),
    }


def measure_on_gpu(problem: TuckerConv2dProblem, seconds: float) -> list[dict[str, Any]]:
    """The same on the current CUDA device, in a graph and in eager calls; entries of a tuned table."""
    out = problem.N * problem.K * math.prod(problem.output_size)
    moved = (problem.N * problem.C * problem.H * problem.W + out) * problem.dtype.itemsize
    drawn = Drawn(problem)
    inputs = [drawn.input() for _ in range(timing_cuda.copies(moved))]
    calls = {name: [drawn.forward(name, input) for input in inputs] for name in able(problem)}
    return timing_cuda.entries(OP, problem, tuning.FORWARD, calls, seconds)


def on_first_use(tensors: tuple[Any, ...], settings: Settings, asked: str | None) -> bool:
    """Measure the weights of a call if it chooses by itself and no table knows them; whether that was done.

    Args:
        tensors: (input, u_in, core, u_out, bias, residual) of a call in eager mode.
        settings: of the call, in normal form.
        asked: the backend that the call names, or None.
    """
    input, _, core, u_out, bias, residual = tensors
    watched = torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()
    ordinary = all(type(t) in ORDINARY and not t.is_meta for t in tensors if t is not None)
    if asked or registry.wish() or watched or not ordinary or input.device.type != "cpu" or not input.numel():
        return False
    N, C, H, W = input.shape
    rank_out, rank_in, R, S = core.shape
    seen = problem_of("cpu", input.dtype, memory_format(input), (C, rank_in, rank_out, u_out.shape[0], R, S), settings)
    problem = replace(seen, N=N, H=H, W=W, bias=bias is not None, residual=residual is not None)
    if len(able(problem)) < 2 or tuning.entries_for(OP, problem):
        return False
    entry = measure(problem, FIRST_USE_SECONDS)
    times = ", ".join(f"{name} {spread['median']:.3f} ms" for name, spread in entry["ms"].items())
    log.once(f"{OP} [{problem}] timed on first use: {times}")
    tuning.remember([entry])
    return True
