"""As ``interpreted``, for ``tucker_conv2d``: what the interpreting process runs for the fixture ``interpreter``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from basisconv_kernels import testing, tucker_conv2d
from basisconv_kernels.ops import tucker_conv2d_model as model
from basisconv_kernels.ops import tucker_conv2d_selfcheck
from basisconv_kernels.testing import TuckerCase
from basisconv_kernels.triton_kernels import configs
from basisconv_kernels.triton_kernels import tucker_conv2d as kernels
from tests.triton.interpreted import CompileCounterWithBackend

kernel = functools.partial(tucker_conv2d, backend="triton")


@contextlib.contextmanager
def passes(one: bool | None) -> Iterator[None]:
    """Run the chain in one pass, where that is possible, or in two; None lets the model choose."""
    own = model.one_pass_pays

    def asked(problem: Any) -> bool:
        arithmetic = configs.arithmetic_of(problem.dtype, problem.precise)
        return one and configs.against_one_pass(arithmetic, problem.rank_in, problem.Q, problem.precise) is None

    if one is not None:
        model.one_pass_pays = asked
    try:
        yield
    finally:
        model.one_pass_pays = own


def check(case: TuckerCase, one: bool | None, gradients: bool = False) -> None:
    """The whole contract of the forward pass, and of the backward if asked."""
    with passes(one):
        testing.check_tucker(case, kernel)
        if gradients:
            testing.check_tucker_gradients(case, kernel)


def nan_maps(case: TuckerCase) -> list[tuple[str, Any, Any]]:
    """Where the result of one pass is NaN, and where plain PyTorch's is, when one element of one tensor is."""
    inputs = testing.make_tucker_inputs(case)
    found = []
    for tensor in inputs.tensors:
        if tensor is None:
            continue
        middle = tuple(size // 2 for size in tensor.shape)
        for value in (torch.nan, torch.inf):
            kept = tensor[middle].item()
            tensor[middle] = value
            with passes(True):
                got = kernel(*inputs.tensors[:5], residual=inputs.residual, **case.arguments())
            found.append((str(value), got.isnan(), testing.plain_tucker(case, inputs.tensors).isnan()))
            tensor[middle] = kept
    return found


def self_check(problem: Any, wrong: bool) -> str | None:
    """What the check before automatic choice says of the one-pass kernel, or of one whose result is off by a little."""
    own = kernels.forward
    if wrong:
        kernels.forward = lambda *arguments: own(*arguments) * 1.01
    try:
        with passes(True):
            tucker_conv2d_selfcheck.against_reference("triton", problem)
    except testing.Mismatch as error:
        return str(error)
    finally:
        kernels.forward = own
    return None


def compiled(case: TuckerCase, one: bool) -> int:
    """One graph for two sizes, forward and backward, as eager computes them; how many graphs there were."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return tucker_conv2d(*tensors, padding=1, activation="relu", backend="triton")

    step = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    with passes(one):
        for width in (11, 13):  # no other size of the case: equal ones are taken for one
            leaves = [t.detach().requires_grad_() for t in testing.make_tucker_inputs(case.at(W=width)).tensors[:5]]
            out, expected = step(*leaves), call(*leaves)
            assert torch.equal(out, expected)
            assert out.stride() == expected.stride()
            ours, theirs = (torch.autograd.grad(o, leaves, torch.ones_like(o)) for o in (out, expected))
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    return counter.frame_count


def opcheck(case: TuckerCase) -> dict[str, str]:
    """Fake, schema and dispatch of the torch op, by torch's own tests."""
    tensors = testing.make_tucker_inputs(case).tensors
    values = [list(value) if isinstance(value, tuple) else value for value in case.arguments().values()]
    return torch.library.opcheck(torch.ops.basisconv_triton.tucker_conv2d.default, (*tensors, *values))
