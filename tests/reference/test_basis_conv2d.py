"""The lowest rungs of the oracle ladder: loops → ``reference`` → its explicit gradients → the rounding contract."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from basisconv_kernels import testing
from basisconv_kernels.ops.basis_conv2d import basis_conv2d
from basisconv_kernels.reference import basis_conv2d as reference
from basisconv_kernels.testing import Case, naive, tolerances

HALF = (torch.bfloat16, torch.float16)
LOOPS_CAN_DO = 1_000_000  # multiply-accumulates
ALL = (True, True, True, True, True)

cases = pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.name)


def geometry(case: Case) -> tuple:
    p = case.problem
    return p.stride, p.padding, p.dilation, p.groups


def run(case: Case, inputs: testing.Inputs) -> Tensor:
    p = case.problem
    return reference.forward(*inputs.tensors, *geometry(case), p.activation, p.precise)


@pytest.mark.parametrize(
    "case", [c for c in testing.CASES if c.problem.macs() < LOOPS_CAN_DO], ids=lambda case: case.name
)
def test_loops_agree_with_the_reference(case):
    case = case.at(dtype=torch.float64)
    inputs = testing.make_inputs(case)
    bound = tolerances.forward_bound(case.problem, *inputs.tensors)
    expected = naive.forward(case, *inputs.tensors)
    assert expected.shape == bound.expected.shape
    assert ((bound.expected - expected).abs() <= bound.allowed).all()


def test_loops_reach_the_cases_that_matter():
    assert {c.name for c in testing.CASES if c.problem.macs() >= LOOPS_CAN_DO} <= {"full_vectors"}


@cases
def test_explicit_gradients_agree_with_autograd(case):
    case = case.at(dtype=torch.float64)
    inputs = testing.make_inputs(case)
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs.tensors]
    out = reference.forward(*leaves, *geometry(case), case.problem.activation, case.problem.precise)
    grad_output = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    bounds = tolerances.backward_bound(case.problem, grad_output, out.detach(), *inputs.tensors[:3])
    present = [leaf for leaf in leaves if leaf is not None]
    names = [name for name, leaf in zip(reference.Gradients._fields, leaves, strict=True) if leaf is not None]
    for name, gradient in zip(names, torch.autograd.grad(out, present, grad_output), strict=True):
        assert ((gradient - bounds[name].expected).abs() <= bounds[name].allowed).all(), name


@cases
def test_dense_gradient_route(case):
    """Without the basis maps: both weight gradients through that of the dense convolution."""
    case = case.at(dtype=torch.float64, activation=None)
    p = case.problem
    inputs = testing.make_inputs(case)
    grad_output = torch.randn(p.N, p.K, *p.output_size, generator=torch.Generator().manual_seed(1)).double()
    top, bottom, left, right = p.padding
    padded = F.pad(inputs.input, (left, right, top, bottom))
    # Grouped filters as rows over all channels, compact coefficients as rows over all filters, zero elsewhere.
    per, maps, outputs = p.C // p.groups, p.Q // p.groups, p.K // p.groups
    filters = torch.zeros(p.Q, p.C, p.R, p.S, dtype=torch.float64)
    for q in range(p.Q):
        first = q // maps * per
        filters[q, first : first + per] = inputs.basis_weight[q]
    mixing = inputs.coefficients
    if p.compact:
        blocks = [inputs.coefficients[g * outputs : (g + 1) * outputs] for g in range(p.groups)]
        mixing = torch.block_diag(*blocks)
    dense = torch.ops.aten.convolution_backward(
        grad_output, padded, torch.zeros(p.K, p.C, p.R, p.S, dtype=torch.float64), None,
        p.stride, [0, 0], p.dilation, False, [0, 0], 1, [False, True, False],
    )[1].flatten(1)  # fmt: skip
    d_mixing, d_filters = dense @ filters.flatten(1).T, (mixing.T @ dense).view_as(filters)
    d_basis = torch.stack([d_filters[q, q // maps * per :][:per] for q in range(p.Q)])
    d_coefficients = d_mixing
    if p.compact:
        d_coefficients = torch.cat(
            [d_mixing[g * outputs : (g + 1) * outputs, g * maps : (g + 1) * maps] for g in range(p.groups)]
        )
    bounds = tolerances.backward_bound(p, grad_output, grad_output, *inputs.tensors[:3])
    for name, found in (("coefficients", d_coefficients), ("basis_weight", d_basis)):
        assert ((found - bounds[name].expected).abs() <= bounds[name].allowed).all(), name


@pytest.mark.parametrize(
    "name", ["odd_sizes", "groups", "groups_compact", "asymmetric_padding", "stride", "sliced_channels_last"]
)
def test_gradcheck(name):
    case = testing.case(name).at(dtype=torch.float64, N=1, bias=True, residual=True)
    leaves = [t.detach().requires_grad_() for t in testing.make_inputs(case).tensors]

    def op(input, basis_weight, coefficients, bias, residual):
        return basis_conv2d(
            input, basis_weight, coefficients, bias, residual=residual, backend="reference", **case.arguments()
        )

    assert torch.autograd.gradcheck(op, leaves, fast_mode=True, **tolerances.GRADCHECK)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@cases
def test_rounding_contract(case, dtype):
    case = case.at(dtype=dtype)
    testing.check_rounding(case, lambda *tensors, **settings: basis_conv2d(*tensors, **settings, backend="reference"))


def test_basis_maps_are_rounded_once_unless_precise():
    """256 + 1 needs nine bits: bfloat16 keeps 256, so the 1 is gone after − 256, but not under ``precise``."""
    input = torch.tensor([256.0, 1.0]).view(1, 2, 1, 1).bfloat16()
    basis, mixing, bias = (
        torch.ones(1, 2, 1, 1).bfloat16(),
        torch.ones(1, 1).bfloat16(),
        torch.tensor([-256.0]).bfloat16(),
    )
    settings = ((1, 1), (0, 0, 0, 0), (1, 1), 1, None)
    assert reference.forward(input, basis, mixing, bias, None, *settings, False).item() == 0
    assert reference.forward(input, basis, mixing, bias, None, *settings, True).item() == 1


def test_the_result_is_rounded_once():
    """256 + 1 + 1 fits into bfloat16; rounded after each addition it would stay 256."""
    one = torch.ones(1, 1, 1, 1).bfloat16()
    settings = ((1, 1), (0, 0, 0, 0), (1, 1), 1, None, False)
    out = reference.forward(256 * one, one, one.view(1, 1), one.view(1), one, *settings)
    assert out.item() == 258


def test_compact_coefficients_are_block_diagonal_ones():
    case = testing.case("groups_compact").at(dtype=torch.float64)
    p = case.problem
    inputs = testing.make_inputs(case)
    outputs = p.K // p.groups
    full = torch.block_diag(*inputs.coefficients.split(outputs))
    bound = tolerances.forward_bound(p, *inputs.tensors)
    widened = reference.forward(
        inputs.input, inputs.basis_weight, full, inputs.bias, None, *geometry(case), p.activation, p.precise
    )
    assert ((widened - bound.expected).abs() <= bound.allowed).all()


@pytest.mark.parametrize("wanted", [(False,) * i + (True,) + (False,) * (4 - i) for i in range(5)], ids=str)
def test_only_wanted_gradients_are_returned(wanted):
    case = testing.case("whole_epilogue")
    inputs = testing.make_inputs(case)
    out = run(case, inputs)
    arguments = (out, out, *inputs.tensors[:3], *geometry(case), case.problem.activation)
    everything = reference.backward(*arguments, ALL)
    for asked, one, alone in zip(wanted, everything, reference.backward(*arguments, wanted), strict=True):
        assert torch.equal(one, alone) if asked else alone is None


@cases
def test_memory_format_follows_the_input(case):
    expected = torch.channels_last if case.problem.channels_last else torch.contiguous_format
    result = run(case, testing.make_inputs(case))
    assert reference.memory_format(result) == expected
    assert result.is_contiguous(memory_format=expected)
