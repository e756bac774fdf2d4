"""Times of the backends of ``basis_conv2d``: the entries of a tuned table, measured on demand or on first use."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from basisconv_kernels.core import log, registry, selfcheck, timing, timing_cuda, tuning
from basisconv_kernels.core.problem import Conv2dProblem
from basisconv_kernels.ops import basis_conv2d_training as training
from basisconv_kernels.ops.basis_conv2d import CANDIDATES, OP, Settings, basis_conv2d, problem_of
from basisconv_kernels.ops.basis_conv2d_native import basis_conv2d_pack
from basisconv_kernels.reference.basis_conv2d import memory_format

FIRST_USE_SECONDS = 0.1
ORDINARY = (Tensor, torch.nn.Parameter)


def able(problem: Conv2dProblem) -> list[str]:
    """The backends that can run a problem here."""
    return [name for name, against in registry.reasons(CANDIDATES, problem).items() if not against]


class Drawn:
    """Random tensors of a problem on its device; weights once, inputs as many as are asked for."""

    def __init__(self, problem: Conv2dProblem):
        self.p = p = problem
        self.generator = torch.Generator().manual_seed(0)
        self.layout = torch.channels_last if p.channels_last else torch.contiguous_format
        self.basis = self._normal(p.Q, p.C // p.groups, p.R, p.S) / p.taps**0.5
        self.mixing = self._normal(p.K, p.mixed)
        self.bias = self._normal(p.K) if p.bias else None
        residual = self._normal(p.N, p.K, *p.output_size, layout=self.layout) if p.residual else None
        shape: dict[str, Any] = {"stride": p.stride, "dilation": p.dilation, "groups": p.groups, "precise": p.precise}
        self.settings: dict[str, Any] = {
            **shape, "padding": p.padding, "activation": p.activation, "residual": residual,
        }  # fmt: skip
        self.packed = basis_conv2d_pack(self.basis, self.mixing, **shape)

    def _normal(self, *shape: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
        empty = torch.empty(shape, dtype=self.p.dtype, device=self.p.device, memory_format=layout)
        return empty.copy_(torch.randn(*shape, generator=self.generator))

    def input(self) -> Tensor:
        """A new one."""
        return self._normal(self.p.N, self.p.C, self.p.H, self.p.W, layout=self.layout)

    def forward(self, backend: str, input: Tensor) -> Callable[[], object]:
        """A call with packed weights."""
        weights = (self.basis, self.mixing, self.bias)
        return lambda: basis_conv2d(input, *weights, **self.settings, packed=self.packed, backend=backend)

    def training(self, backend: str, input: Tensor) -> Callable[[], object]:
        """A call and its backward to input, both weights and bias; ``reference`` under PyTorch's own autograd."""
        given = (input, self.basis, self.mixing, *([] if self.bias is None else [self.bias]))
        leaves = [tensor.detach().requires_grad_() for tensor in given]
        arguments = (*leaves, *([None] if self.bias is None else []))
        p = self.p
        settings = Settings(p.stride, p.padding, p.dilation, p.groups, p.activation, p.precise, backend)
        plainly = training.two_convolutions(settings, input, self.basis, self.mixing)

        def step() -> object:
            if backend == tuning.PLAIN:
                out = plainly(*arguments, self.settings["residual"])
            else:
                out = basis_conv2d(*arguments, **self.settings, backend=backend)
            return torch.autograd.grad(out, leaves, torch.ones_like(out))

        return step


def measure(problem: Conv2dProblem, seconds: float) -> dict[str, Any]:
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


def measure_on_gpu(
    problem: Conv2dProblem, seconds: float, steps: tuple[str, ...] = (tuning.FORWARD, tuning.TRAINING)
) -> list[dict[str, Any]]:
    """The same on the current CUDA device: forward and training steps, each in a graph and in eager calls.

    Args:
        problem: with its sizes, on CUDA.
        seconds: for all of it together.
        steps: what is timed.

    Returns:
        list[dict]: entries of a tuned table.
    """
    out = problem.N * problem.K * math.prod(problem.output_size)
    moved = (problem.N * problem.C * problem.H * problem.W + out) * problem.dtype.itemsize
    found = []
    with torch.inference_mode(False):  # a first use may be inside of it, and training takes ordinary tensors
        drawn = Drawn(problem)
        inputs = [drawn.input() for _ in range(timing_cuda.copies(moved))]
        for step in steps:
            call = drawn.forward if step == tuning.FORWARD else drawn.training
            calls = {name: [call(name, input) for input in inputs] for name in able(problem)}
            found += timing_cuda.entries(OP, problem, step, calls, seconds / len(steps))
    return found


def on_first_use(tensors: tuple[Any, ...], settings: Settings, asked: str | None) -> bool:
    """Measure the weights of a call if it chooses by itself and no table knows them; whether that was done.

    Args:
        tensors: (input, basis_weight, coefficients, bias, residual) of a call in eager mode.
        settings: of the call, in normal form.
        asked: the backend that the call names, or None.
    """
    input, basis_weight, coefficients, bias, residual = tensors
    device = input.device.type
    if asked or registry.wish() or not _is_eager(tensors) or device not in ("cpu", "cuda") or not input.numel():
        return False
    N, _, H, W = input.shape
    Q, taps_in, R, S = basis_weight.shape
    K, mixed = coefficients.shape
    seen = problem_of(device, input.dtype, memory_format(input), (taps_in, Q, K, R, S, mixed), settings)
    problem = replace(seen, N=N, H=H, W=W, bias=bias is not None, residual=residual is not None)
    if len(able(problem)) < 2 or tuning.entries_for(OP, problem) or selfcheck.capturing():
        return False
    try:
        entries = (
            [measure(problem, FIRST_USE_SECONDS)] if device == "cpu" else measure_on_gpu(problem, FIRST_USE_SECONDS)
        )
    except torch.OutOfMemoryError as error:  # the call itself may still fit
        log.once(f"{OP} [{problem}] not timed on first use: {str(error).splitlines()[0]}", logging.WARNING)
        return False
    for entry in entries:
        times = ", ".join(f"{name} {spread['median']:.3f} ms" for name, spread in entry["ms"].items())
        log.once(f"{OP} [{problem}] timed on first use, {tuning.circumstances(entry)}: {times}")
    tuning.remember(entries, device)
    return True


def _is_eager(tensors: tuple[Any, ...]) -> bool:
    """Whether nobody watches or traces the calls: what is timed must not be counted, recorded or transformed."""
    watched = torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()
    return not watched and all(type(t) in ORDINARY and not t.is_meta for t in tensors if t is not None)
