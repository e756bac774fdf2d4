"""The lowest rungs of ``stacked_binary_conv2d``: loops → reference, both routes, explicit gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from basisconv_kernels import testing
from basisconv_kernels.reference import stacked_binary_conv2d as reference
from basisconv_kernels.testing import naive_stacked_binary_conv2d as naive
from basisconv_kernels.testing import tolerances
from basisconv_kernels.testing.stacked_binary_conv2d import settings_of

cases = pytest.mark.parametrize("case", testing.STACKED_CASES, ids=lambda case: case.name)
LOOPS_CAN_DO = 60_000  # additions
ALL = (True, True, True, True, True)


def run(case, inputs, route):
    operand = inputs.input if isinstance(inputs.input, torch.Tensor) else inputs.input.words
    return reference.forward(operand, *inputs.tensors[1:], None, settings_of(case), route)


@pytest.mark.parametrize(
    "case", [c for c in testing.STACKED_CASES if c.problem.adds() < LOOPS_CAN_DO], ids=lambda case: case.name
)
def test_loops_agree_with_the_oracle_exactly_on_integers(case):
    """S1: selecting and stacking maps is the dense convolution with the stacked filters."""
    case = case.at(dtype=torch.float64)
    inputs = testing.make_stacked_inputs(case, values="grid")
    bound = tolerances.stacked_bound(case.problem, inputs.values, *inputs.tensors[1:])
    expected = naive.forward(case.problem, inputs.values, *inputs.tensors[1:])
    assert torch.equal(bound.expected, expected)


@cases
@pytest.mark.parametrize("route", reference.ROUTES)
def test_both_routes_forward(case, route):
    """S2: the split folded into the batch, and the stacked filters, are the loop over splits."""
    case = case.at(dtype=torch.float64)
    inputs = testing.make_stacked_inputs(case)
    bound = tolerances.stacked_bound(case.problem, inputs.values, *inputs.tensors[1:])
    assert ((run(case, inputs, route) - bound.expected).abs() <= bound.allowed).all()


def explicit(case, leaves, one_hot):
    """The definition with an explicit one-hot, for autograd: every split convolved, then selected and added."""
    p = case.problem
    x, bank, selection, scale, bias = leaves
    top, bottom, left, right = p.padding
    padded = F.pad(x, (left, right, top, bottom))
    out = 0.0
    outputs = p.K // p.groups
    for i in range(p.splits):
        maps = []
        for g in range(p.groups):
            first = (g * p.splits + i) * p.low
            u = F.conv2d(padded[:, first : first + p.low], bank, None, p.stride, 0, p.dilation)
            picked = selection[g * outputs : (g + 1) * outputs, i]
            maps.append(torch.einsum("kj,bjyx->bkyx", picked, u))
        out = out + torch.cat(maps, 1)
    out = out * scale[:, None, None] + bias[:, None, None]
    return F.relu(out) if p.activation == "relu" else F.relu6(out) if p.activation else out


@pytest.mark.parametrize("route", reference.ROUTES)
@pytest.mark.parametrize(
    "name",
    ["odd_sizes", "four_splits", "groups", "groups_expanded", "asymmetric_padding", "stride_and_dilation", "relu6",
     "one_split", "more_than_outputs", "padding_past_kernel"],
)  # fmt: skip
def test_both_routes_backward_agree_with_autograd(name, route):
    """S3: dX, dB, dP, dα, db of the two routes and of autograd through an explicit one-hot."""
    case = testing.stacked_case(name).at(dtype=torch.float64, scale=True, bias=True)
    inputs = testing.make_stacked_inputs(case)
    x, bank, index, scale, bias = (t.contiguous() for t in inputs.tensors)
    one_hot = F.one_hot(index, case.problem.n).double()
    leaves = [t.clone().requires_grad_() for t in (x, bank, one_hot, scale, bias)]
    out = explicit(case, leaves, one_hot)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad(out, leaves, grad)
    got = reference.backward(grad, out.detach(), x, bank, index, scale, settings_of(case), ALL, route)
    for field, one, other in zip(got._fields, got, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerances.FORMULA, msg=lambda m, f=field: f"{f}: {m}")


@pytest.mark.parametrize("route", reference.ROUTES)
@pytest.mark.parametrize("wanted", [tuple(i == j for j in range(5)) for i in range(5)], ids=str)
def test_only_wanted_gradients_are_returned(wanted, route):
    case = testing.stacked_case("relu")
    inputs = testing.make_stacked_inputs(case)
    out = run(case, inputs, None)
    x, bank, index, scale, _ = inputs.tensors
    arguments = (out, out, x, bank, index, scale, settings_of(case))
    everything = reference.backward(*arguments, ALL, route)
    alone = reference.backward(*arguments, wanted, route)
    for asked, one, other in zip(wanted, everything, alone, strict=True):
        assert torch.equal(one, other) if asked else other is None


@pytest.mark.parametrize("route", reference.ROUTES)
def test_gradients_are_the_same_bits_in_every_run(route):
    """S13: sums over outputs that share a filter have a fixed order."""
    case = testing.stacked_case("past_a_block")
    inputs = testing.make_stacked_inputs(case)
    out = run(case, inputs, None)
    x, bank, index, scale, _ = inputs.tensors
    first, second = (
        reference.backward(out, out, x, bank, index, scale, settings_of(case), ALL, route) for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_signs_count_zero_as_positive_and_nan_as_negative_and_padding_as_nothing():
    case = testing.stacked_case("signs").at(N=1, C=2, H=1, W=2, splits=2, n=1, K=1, R=1, S=1, padding=(0, 0, 0, 1))
    x = torch.tensor([[[[-0.0, float("nan")]], [[0.0, -2.0]]]])
    out = reference.forward(x, torch.ones(1, 1, 1, 1), torch.zeros(1, 2, dtype=torch.int64), None, None, None,
                            settings_of(case))  # fmt: skip
    assert out.flatten().tolist() == [2.0, -2.0, 0.0]
