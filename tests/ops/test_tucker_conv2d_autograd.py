"""Gradients of ``tucker_conv2d``: all six, frozen parts, what is refused, autocast and functional transforms."""

from __future__ import annotations

import pytest
import torch

from basisconv_kernels import testing, tucker_conv2d
from basisconv_kernels.core import registry
from basisconv_kernels.ops.tucker_conv2d import CANDIDATES
from basisconv_kernels.testing import tolerances
from basisconv_kernels.testing.tucker_conv2d import NAMES

OP = "tucker_conv2d"
AVAILABLE = [candidate.name for candidate in CANDIDATES if registry.absent(candidate.name) is None]

dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
backends = pytest.mark.parametrize("backend", AVAILABLE)


def leaves(case, frozen=()):
    tensors = zip(NAMES, testing.make_tucker_inputs(case).tensors, strict=True)
    return [None if t is None else t.detach().requires_grad_(name not in frozen) for name, t in tensors]


def call(case, tensors, **more):
    return tucker_conv2d(*tensors[:5], residual=tensors[5], **case.arguments(), **more)


@dtypes
@pytest.mark.parametrize("case", testing.TUCKER_CASES, ids=lambda case: case.name)
def test_gradients(kernel, case, dtype):
    case = kernel.case(case, dtype)
    probe = [None if t is None else t.detach().requires_grad_() for t in testing.make_tucker_inputs(case).tensors]
    out = kernel.run(*probe[:5], residual=probe[5], **case.arguments())
    if not out.requires_grad and not hasattr(kernel.run, "func"):
        pytest.skip(f"{kernel.name} has no gradients")
    testing.check_tucker_gradients(case, kernel.run)
    with torch.no_grad():
        assert torch.equal(out, kernel.run(*probe[:5], residual=probe[5], **case.arguments()))


@backends
def test_gradients_are_the_same_twice(backend):
    case = testing.tucker_case("whole_epilogue")
    runs = []
    for _ in range(2):
        tensors = leaves(case)
        out = call(case, tensors, backend=backend)
        runs.append(torch.autograd.grad(out, tensors, torch.ones_like(out)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("frozen", [*[{name} for name in NAMES], set(NAMES) - {"u_in"}], ids=sorted)
@backends
def test_frozen_tensors_get_no_gradient_and_change_no_other(backend, frozen):
    case = testing.tucker_case("whole_epilogue")
    everything, some = leaves(case), leaves(case, frozen)
    call(case, everything, backend=backend).sum().backward()
    call(case, some, backend=backend).sum().backward()
    for name, with_all, with_some in zip(NAMES, everything, some, strict=True):
        if name in frozen:
            assert with_some.grad is None, name
        else:  # not bit by bit: matmul sums in another order for operands that need no gradient
            torch.testing.assert_close(with_some.grad, with_all.grad)


@backends
def test_nothing_is_recorded_when_nothing_needs_a_gradient(backend):
    case = testing.tucker_case("rank_out_one")
    assert call(case, leaves(case, frozen=NAMES), backend=backend).grad_fn is None
    with torch.no_grad():
        assert not call(case, leaves(case), backend=backend).requires_grad


@pytest.mark.parametrize("name", ["whole_epilogue", "asymmetric_padding", "stride", "sliced"])
def test_gradcheck(name):
    case = testing.tucker_case(name).at(dtype=torch.float64, N=1)

    def op(*tensors):
        return call(case, list(tensors))

    assert torch.autograd.gradcheck(op, leaves(case), fast_mode=True, **tolerances.GRADCHECK)


@backends
def test_double_backward_is_refused_by_name(backend):
    case = testing.tucker_case("residual_relu")
    tensors = leaves(case)
    (gradient,) = torch.autograd.grad(call(case, tensors, backend=backend).sum(), tensors[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^tucker_conv2d: double backward is not supported"):
        gradient.sum().backward()


@backends
def test_vmap_is_refused_by_name(backend):
    inputs = testing.make_tucker_inputs(testing.tucker_case("odd_sizes"))
    stacked = torch.stack([inputs.input, inputs.input])
    with pytest.raises(NotImplementedError, match=r"^tucker_conv2d: torch.vmap is not supported"):
        torch.vmap(lambda input: tucker_conv2d(input, *inputs.tensors[1:4], backend=backend))(stacked)


@backends
def test_functional_gradient(backend):
    case = testing.tucker_case("rank_out_one")
    tensors = leaves(case)
    call(case, tensors, backend=backend).sum().backward()
    detached = [None if t is None else t.detach() for t in tensors]
    gradient = torch.func.grad(lambda input: call(case, [input, *detached[1:]], backend=backend).sum())(detached[0])
    assert torch.equal(gradient, tensors[0].grad)


@backends
def test_autocast_gradients_come_back_in_the_dtype_of_the_parameters(backend):
    case = testing.tucker_case("whole_epilogue")
    outside, inside = leaves(case), leaves(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(case, inside, backend=backend)
    grad_output = torch.ones_like(out)
    out.backward(grad_output)
    call(case, [t.to(torch.bfloat16) for t in outside], backend=backend).backward(grad_output)
    for name, a, b in zip(NAMES, outside, inside, strict=True):
        assert b.grad.dtype == torch.float32, name
        assert torch.equal(a.grad, b.grad), name


@backends
def test_an_input_that_was_changed_in_place_is_noticed(backend):
    case = testing.tucker_case("rank_out_one")
    tensors = leaves(case, frozen=("input",))
    out = call(case, tensors, backend=backend)
    tensors[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_automatic_choice_trains_with_the_same_gradients():
    """Few pixels: three convolutions under PyTorch's autograd, which has second derivatives too."""
    case = testing.tucker_case("whole_epilogue")
    testing.check_tucker_gradients(case, tucker_conv2d)
    tensors = leaves(case)
    (gradient,) = torch.autograd.grad(call(case, tensors).square().sum(), tensors[:1], create_graph=True)
    assert torch.autograd.grad(gradient.sum(), tensors[1])[0].abs().sum() > 0
