"""``reference.ternary_conv2d``: loops over single numbers, the planes, autograd, and the identities of ternary sums."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from basisconv_kernels.reference import ternary_conv2d as reference
from basisconv_kernels.testing import ternary_conv2d as ternary
from basisconv_kernels.testing import tolerances

SMALL = [case for case in ternary.TERNARY_CASES if case.problem.macs() < 60_000]


def arguments(case):
    return tuple(case.arguments().values())


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_loops_over_single_numbers(case):
    inputs = ternary.make_inputs(case.at(dtype=torch.float64), values="grid")
    found = reference.forward(*inputs.tensors, *arguments(case))
    assert torch.equal(found, ternary.naive(inputs))


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.sampled_from([1, 31, 32, 33, 64, 70]))
def test_unpacking_undoes_packing(seed, channels):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-1, 2, (3, channels, 2, 3), generator=generator)
    planes = reference.pack_planes(weight)
    assert planes.dtype == torch.int32
    assert planes.shape == (3, 2, 2, 3, -(-channels // 32))
    assert torch.equal(reference.unpack_weight(planes, channels, torch.int64), weight)
    assert reference.planes_problem(planes, channels) is None
    assert "both planes" in reference.planes_problem(planes | 1, channels)
    if channels % 32:
        beyond = planes.clone()
        beyond[0, 0, 0, 0, -1] |= -(2**31)
        assert "past" in reference.planes_problem(beyond, channels)


def test_a_bit_is_where_the_format_says():
    weight = torch.zeros(2, 40, 1, 2)
    weight[1, 37, 0, 1] = -1.0
    weight[0, 31, 0, 0] = 1.0
    planes = reference.pack_planes(weight)
    assert planes[1, 1, 0, 1, 1].item() == 1 << 5
    assert planes[0, 0, 0, 0, 0].item() == -(2**31)
    assert int((planes != 0).sum()) == 2


def test_other_values_than_the_three_are_refused():
    for value in (0.5, 2.0, float("nan")):
        with pytest.raises(ValueError, match="pack_planes"):
            reference.pack_planes(torch.full((1, 1, 1, 1), value))


@pytest.mark.parametrize("scales", ["none", "one", "two"])
@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
def test_gradients_are_those_of_autograd(scales, activation):
    """LW2 and BL1 in part: scale, negative scale with its minus sign, input and bias against a dense convolution."""
    case = ternary.TERNARY_CASES[0].at(dtype=torch.float64, scales=scales, activation=activation, N=1)
    inputs = ternary.make_inputs(case)
    leaves = [t if t is None or t.dtype == torch.int32 else t.detach().requires_grad_() for t in inputs.tensors]
    x, planes, scale, negative, bias = leaves
    out = ternary.plain(ternary.TernaryInputs(case, x, planes, scale, negative, bias))
    grad_output = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    wanted = (True, scale is not None, negative is not None, True)
    found = reference.backward(grad_output, out.detach(), *inputs.tensors[:4], *arguments(case), wanted)
    trained = [t for t in (x, scale, negative, bias) if t is not None]
    expected = torch.autograd.grad(out, trained, grad_output)
    got = [t for t in found if t is not None]
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerances.FORMULA)


def test_two_scales_need_two_accumulators():
    """BL1: no single scale gives what two give; equal ones give what one gives."""
    case = next(case for case in ternary.TERNARY_CASES if case.name == "two_scales").at(dtype=torch.float64)
    inputs = ternary.make_inputs(case)
    x, planes, scale, negative, bias = inputs.tensors
    two = reference.forward(x, planes, scale, negative, bias, *arguments(case))
    torch.testing.assert_close(two, ternary.plain(inputs), **tolerances.FORMULA)
    same = reference.forward(x, planes, scale, scale, bias, *arguments(case))
    one = reference.forward(x, planes, scale, None, bias, *arguments(case))
    torch.testing.assert_close(same, one, **tolerances.FORMULA)
    assert not torch.allclose(two, one)


@pytest.mark.parametrize("kind", ["signs", "codes"])
def test_sums_of_bits_are_the_sums_of_numbers(kind):
    """S10: signs as ``2(popc(a∧p) − popc(a∧m)) − Σ t``, codes as ``Σ 2^b (popc(a_b∧p) − popc(a_b∧m))``."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randint(-1, 2, (6, 37, 3, 3), generator=generator).double()
    plus, minus = (part.double() for part in reference.unpack_planes(reference.pack_planes(weight), 37, torch.float64))
    geometry = {"padding": (1, 2), "stride": (2, 1), "dilation": (1, 2)}
    if kind == "signs":
        bits = torch.randint(0, 2, (2, 37, 7, 9), generator=generator).double()
        expected = F.conv2d(2 * bits - 1, weight, **geometry)
        sums = F.conv2d(bits, plus, **geometry) - F.conv2d(bits, minus, **geometry)
        assert torch.equal(2 * sums - F.conv2d(torch.ones_like(bits), weight, **geometry), expected)
    else:
        codes = torch.randint(0, 8, (2, 37, 7, 9), generator=generator)
        found = sum(
            2**b * (F.conv2d(bit, plus, **geometry) - F.conv2d(bit, minus, **geometry))
            for b, bit in enumerate(((codes >> b) & 1).double() for b in range(3))
        )
        assert torch.equal(found, F.conv2d(codes.double(), weight, **geometry))
