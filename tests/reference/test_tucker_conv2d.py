"""``tucker_conv2d``: the definition by its dense filter → ``reference`` → its explicit gradients → the roundings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from basisconv_kernels import testing
from basisconv_kernels.ops.tucker_conv2d import tucker_conv2d
from basisconv_kernels.reference import tucker_conv2d as reference
from basisconv_kernels.testing import naive_tucker_conv2d as naive
from basisconv_kernels.testing import tolerances, tucker_conv2d_bounds
from basisconv_kernels.testing.tucker_conv2d import exact_in_float32

HALF = (torch.bfloat16, torch.float16)
LOOPS_CAN_DO = 400_000  # multiply-accumulates of the dense convolution
ALL = (True,) * 6

cases = pytest.mark.parametrize("case", testing.TUCKER_CASES, ids=lambda case: case.name)


def geometry(case):
    p = case.problem
    return p.stride, p.padding, p.dilation


def run(case, inputs):
    return reference.forward(*inputs.tensors, *geometry(case), case.problem.activation, case.problem.precise)


def plain_kernel(*tensors, **settings):
    return tucker_conv2d(*tensors, **settings, backend="reference")


@pytest.mark.parametrize(
    "case", [c for c in testing.TUCKER_CASES if c.problem.dense_macs() < LOOPS_CAN_DO], ids=lambda case: case.name
)
def test_loops_agree_with_the_reference(case):
    case = case.at(dtype=torch.float64)
    inputs = testing.make_tucker_inputs(case)
    bound = tucker_conv2d_bounds.forward_bound(case.problem, *inputs.tensors)
    expected = naive.forward(case, *inputs.tensors)
    assert expected.shape == bound.expected.shape
    assert ((bound.expected - expected).abs() <= bound.allowed).all()


def test_loops_reach_the_cases_that_matter():
    left = {c.name for c in testing.TUCKER_CASES if c.problem.dense_macs() >= LOOPS_CAN_DO}
    assert left <= {"full_vectors", "past_a_block", "channels_last", "channels_last_stride"}


@cases
def test_the_chain_is_the_convolution_with_the_rebuilt_weight(case):
    case = case.at(dtype=torch.float64)
    p = case.problem
    inputs = testing.make_tucker_inputs(case)
    top, bottom, left, right = p.padding
    padded = F.pad(inputs.input, (left, right, top, bottom))
    weight = naive.dense_weight(inputs.u_in, inputs.core, inputs.u_out)
    out = F.conv2d(padded, weight, inputs.bias, p.stride, 0, p.dilation)
    out = out if inputs.residual is None else out + inputs.residual
    limits = {None: (None, None), "relu": (0, None), "relu6": (0, 6)}[p.activation]
    out = out if p.activation is None else out.clamp(*limits)
    torch.testing.assert_close(run(case, inputs), out, **tolerances.FORMULA)


@cases
def test_explicit_gradients_agree_with_autograd(case):
    case = case.at(dtype=torch.float64)
    inputs = testing.make_tucker_inputs(case)
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs.tensors]
    out = reference.forward(*leaves, *geometry(case), case.problem.activation, case.problem.precise)
    grad_output = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    bounds = tucker_conv2d_bounds.backward_bound(case.problem, grad_output, out.detach(), *inputs.tensors[:4])
    names = [name for name, leaf in zip(reference.Gradients._fields, leaves, strict=True) if leaf is not None]
    present = [leaf for leaf in leaves if leaf is not None]
    for name, gradient in zip(names, torch.autograd.grad(out, present, grad_output), strict=True):
        assert ((gradient - bounds[name].expected).abs() <= bounds[name].allowed).all(), name


@pytest.mark.parametrize("dtype", HALF, ids=str)
@cases
def test_rounding_contract(case, dtype):
    if (case.name, dtype) == ("past_a_block", torch.float16):
        assert not exact_in_float32(case.at(dtype=dtype))  # sums too long for 24 bits
    else:
        testing.check_tucker_rounding(case.at(dtype=dtype), plain_kernel)


SETTINGS = ((1, 1), (0, 0, 0, 0), (1, 1), None)


def test_the_first_map_is_rounded_once_unless_precise():
    """256 + 1 needs nine bits: bfloat16 keeps 256, so the 1 is gone after − 256, but not under ``precise``."""
    input = torch.tensor([256.0, 1.0]).view(1, 2, 1, 1).bfloat16()
    ones, one = torch.ones(2, 1).bfloat16(), torch.ones(1, 1).bfloat16()
    bias = torch.tensor([-256.0]).bfloat16()
    tensors = (input, ones, one.view(1, 1, 1, 1), one, bias, None)
    assert reference.forward(*tensors, *SETTINGS, False).item() == 0
    assert reference.forward(*tensors, *SETTINGS, True).item() == 1


def test_the_second_map_is_rounded_once_unless_precise():
    input = torch.tensor([256.0, 1.0]).view(1, 1, 1, 2).bfloat16()
    one, pair = torch.ones(1, 1).bfloat16(), torch.ones(1, 1, 1, 2).bfloat16()
    bias = torch.tensor([-256.0]).bfloat16()
    assert reference.forward(input, one, pair, one, bias, None, *SETTINGS, False).item() == 0
    assert reference.forward(input, one, pair, one, bias, None, *SETTINGS, True).item() == 1


def test_the_result_is_rounded_once():
    """256 + 1 + 1 fits into bfloat16; rounded after each addition it would stay 256."""
    one = torch.ones(1, 1, 1, 1).bfloat16()
    flat = one.view(1, 1)
    assert reference.forward(256 * one, flat, one, flat, one.view(1), one, *SETTINGS, False).item() == 258


@pytest.mark.parametrize("wanted", [(False,) * i + (True,) + (False,) * (5 - i) for i in range(6)], ids=str)
@pytest.mark.parametrize("name", ["whole_epilogue", "asymmetric_padding"])
def test_only_wanted_gradients_are_returned(name, wanted):
    case = testing.tucker_case(name)
    inputs = testing.make_tucker_inputs(case)
    out = run(case, inputs)
    arguments = (out, out, *inputs.tensors[:4], *geometry(case), case.problem.activation)
    everything = reference.backward(*arguments, ALL)
    for asked, one, alone in zip(wanted, everything, reference.backward(*arguments, wanted), strict=True):
        assert torch.equal(one, alone) if asked else alone is None


@cases
def test_memory_format_follows_the_input(case):
    expected = torch.channels_last if case.problem.channels_last else torch.contiguous_format
    assert run(case, testing.make_tucker_inputs(case)).is_contiguous(memory_format=expected)
