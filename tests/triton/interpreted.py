"""What the interpreting process runs: functions for the fixture ``interpreter``; no test asserts here by itself."""

from __future__ import annotations

import functools
import gc
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from basisconv_kernels import BackendUnavailable, basis_conv2d, testing
from basisconv_kernels.core import registry
from basisconv_kernels.core.problem import Conv2dProblem
from basisconv_kernels.ops import basis_conv2d_selfcheck
from basisconv_kernels.ops.basis_conv2d import CANDIDATES
from basisconv_kernels.testing import Case
from basisconv_kernels.triton_kernels import _common
from basisconv_kernels.triton_kernels import basis_conv2d as kernels
from bench.gpu import sweep
from bench.gpu.layers import Layer
from bench.gpu.timing import CpuMeter
from tests.triton import rows

kernel = functools.partial(basis_conv2d, backend="triton")


def start() -> bool:
    """Settle the process, and say whether kernels are interpreted here."""
    torch.set_num_threads(1)
    from triton import knobs

    return bool(knobs.runtime.interpret)


def check(case: Case, seed: int = 0) -> None:
    """The whole contract of the forward pass."""
    testing.check(case, kernel, seed=seed)


def check_gradients(case: Case) -> None:
    """All gradients against the explicit formulas."""
    testing.check_gradients(case, kernel)


def check_wide(case: Case) -> None:
    """Forward and gradients as for tensors of more than 2³¹ elements, with offsets of 64 bits."""
    limit, _common.FAR = _common.FAR, 0
    try:
        testing.check(case, kernel)
        testing.check_gradients(case, kernel)
    finally:
        _common.FAR = limit


def kept_by_plans(case: Case) -> tuple[int, int]:
    """How many plans two calls with tensors of their own make, and how many of those tensors outlive the calls."""
    kernels._plans.clear()
    left = []
    for seed in range(2):
        inputs = testing.make_inputs(case, seed)
        kernel(*inputs.tensors[:4], residual=inputs.residual, **case.arguments())
        left += [weakref.ref(tensor) for tensor in inputs.tensors if tensor is not None]
        del inputs
    gc.collect()
    return len(kernels._plans), sum(tensor() is not None for tensor in left)


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


def check_row(row: rows.Row, dtype: torch.dtype) -> None:
    """The forward pass on one row of the tile table."""
    rows.check(row, dtype, "cpu")


class Float16(Layer):
    """A layer in the dtype that the interpreter multiplies rightly."""

    @property
    def problem(self) -> Conv2dProblem:
        """As that of a layer."""
        return replace(super().problem, dtype=torch.float16)


def sweep_of_tiles(layer: Float16, wrong: bool) -> dict[str, Any]:
    """The step of ``gpu-probe`` on a small layer, or with a kernel whose result is off by a little."""
    own = kernels.forward
    if wrong:
        kernels.forward = lambda *arguments, **more: own(*arguments, **more) * 1.05
    try:
        return sweep.tiles(layer, "cpu", CpuMeter())
    finally:
        kernels.forward = own


def sweep_compiled(layer: Float16) -> int:
    """How many candidates the processes before that step run once."""
    return int(sweep.compiled([layer], "cpu", 1)["candidates"])


def self_check(problem: Conv2dProblem, wrong: bool) -> str | None:
    """What the check before automatic choice says of the kernel, or of one whose result is off by a little."""
    own = kernels.forward
    if wrong:
        kernels.forward = lambda *arguments: own(*arguments) * 1.01
    try:
        basis_conv2d_selfcheck.against_reference("triton", problem)
    except testing.Mismatch as error:
        return str(error)
    finally:
        kernels.forward = own
    return None


def opcheck(case: Case) -> dict[str, str]:
    """Fake, schema and dispatch of the torch op, by torch's own tests."""
    inputs = testing.make_inputs(case)
    settings = [list(value) if isinstance(value, tuple) else value for value in case.arguments().values()]
    return torch.library.opcheck(torch.ops.basisconv_triton.basis_conv2d.default, (*inputs.tensors, *settings))


def padded_by_one(*tensors: torch.Tensor) -> torch.Tensor:
    """A call whose arguments beside the tensors are constants of the program."""
    return basis_conv2d(*tensors, padding=1, activation="relu", backend="triton")


def compiled(case: Case) -> int:
    """One graph for two sizes, forward and backward, as eager computes them; how many graphs there were."""
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(padded_by_one, backend=counter, fullgraph=True, dynamic=True)
    for width in (9, 12):
        inputs = testing.make_inputs(case.at(W=width))
        leaves = [t.detach().requires_grad_() for t in inputs.tensors[:4]]
        out = step(*leaves)
        expected = padded_by_one(*leaves)
        assert torch.equal(out, expected)
        assert out.stride() == expected.stride()
        grad_output = torch.ones_like(out)
        pairs = zip(torch.autograd.grad(out, leaves, grad_output), torch.autograd.grad(expected, leaves, grad_output),
                    strict=True)  # fmt: skip
        assert all(torch.equal(a, b) for a, b in pairs)
    return counter.frame_count


def same_gradients_twice(case: Case) -> bool:
    """Whether two backward passes give the same bits, and frozen tensors change no other's gradient."""
    runs = []
    for frozen in (None, None, 1):
        inputs = testing.make_inputs(case)
        leaves = [t.detach().requires_grad_(i != frozen) for i, t in enumerate(inputs.tensors)]
        out = kernel(*leaves[:4], residual=leaves[4], **case.arguments())
        out.backward(torch.ones_like(out))
        runs.append([t.grad for t in leaves])
    assert runs[2][1] is None
    return all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True) if b is not None)


def refused(case: Case) -> str:
    """The error of a call that the backend cannot run."""
    inputs = testing.make_inputs(case)
    try:
        kernel(*inputs.tensors[:3], **case.arguments())
    except BackendUnavailable as error:
        return str(error)
    return "nothing was refused"


def chosen_by_itself(case: Case) -> str:
    """The backend of a call that names none."""
    p = case.problem
    return registry.select("basis_conv2d", CANDIDATES, p, None).name
