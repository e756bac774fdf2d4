"""``binary_conv2d`` of the reference: against loops, and the identities that the kernels are built on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from basisconv_kernels import testing
from basisconv_kernels.core import estimators
from basisconv_kernels.core.packed import pack_planes
from basisconv_kernels.reference import binary_conv2d as reference
from basisconv_kernels.testing import naive_binary_conv2d as naive
from basisconv_kernels.testing.binary_conv2d import settings_of

# Loops are slow: maps of a few pixels, and channels enough to be odd.
SMALL = {"H": 4, "W": 5}
cases = pytest.mark.parametrize("case", testing.BINARY_CASES, ids=lambda case: case.name)


def shrunk(case):
    p = case.problem
    reach = [(k - 1) * d + 1 for k, d in zip((p.R, p.S), p.dilation, strict=True)]
    pad = (p.padding[0] + p.padding[1], p.padding[2] + p.padding[3])
    sizes = {"H": max(min(p.H, 4), reach[0] - pad[0]), "W": max(min(p.W, 5), reach[1] - pad[1])}
    channels = 5 * p.groups if 5 * p.groups < p.C else p.C
    return case.at(**sizes, C=channels, K=2 * p.groups, N=min(p.N, 2))


def operands(case, seed=0):
    """(values, signs, settings): the whole numbers of a case."""
    made = testing.make_binary_inputs(case, seed)
    settings = settings_of(case)
    words = getattr(made.input, "words", made.input)
    return reference.input_values(words, settings), reference.weight_signs(made.weight, settings), settings


@cases
def test_sums_are_those_of_loops(case):
    case = shrunk(case)
    if case.problem.groups > 3:
        case = case.at(C=3, K=6, groups=3)
    values, signs, settings = operands(case)
    assert torch.equal(reference.integer_sums(values, signs, settings), naive.sums(case.problem, values, signs))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("H", "W", "R", "S", "K"), [(3, 5, 2, 5, 1), (5, 6, 2, 5, 3), (2, 3, 1, 2, 26)])
def test_one_channel_and_one_output_a_row(H, W, R, S, K, layout):
    case = testing.binary_case("odd_sizes").at(
        N=2, C=1, H=H, W=W, K=K, R=R, S=S, stride=(1, 2), padding=(0, 0, 0, 0), dilation=(1, 1), groups=1
    )
    values, signs, settings = operands(case)
    expected = naive.sums(case.problem, values, signs)
    placed = [t.clone(memory_format=layout) for t in (values, signs)]
    assert torch.equal(reference.integer_sums(*placed, settings), expected)


def conv(values, filters, settings):
    padded, pad = reference.padded_values(values, settings.padding, 0)
    out = F.conv2d(padded.double(), filters.double(), None, settings.stride, pad, settings.dilation, settings.groups)
    return out.to(torch.int64)


def taps_inside(values, filters, settings):
    """Channels times taps inside the image, for each output: a convolution of ones."""
    return conv(torch.ones_like(values), torch.ones_like(filters), settings)


zero_padded = pytest.mark.parametrize(
    "case", [c for c in testing.BINARY_CASES if not c.problem.padding_value and c.problem.N], ids=lambda case: case.name
)


@zero_padded
def test_and_form_xor_form_and_border_table(case):
    """With zero bits outside: 4·popc(a ∧ w) − 2·popc(a) + T and T' − 2·popc(a ⊕ w) are the sums; T = −conv(1, w)."""
    if case.problem.unsigned:
        case = case.at(unsigned=False, planes=1)
    values, signs, settings = operands(case)
    a, w = (values + 1) / 2, (signs + 1) / 2  # bits; conv2d of bits is popc(a ∧ w), zero outside
    both, ones = conv(a, w, settings), torch.ones_like(a)
    a_bits, w_inside = conv(a, torch.ones_like(w), settings), conv(ones, w, settings)
    length = taps_inside(values, signs, settings)
    table = length - 2 * w_inside
    sums = reference.integer_sums(values, signs, settings).long()
    assert torch.equal(table, -conv(ones, signs, settings))
    assert torch.equal(4 * both - 2 * a_bits + table, sums)
    w_all = w.sum((1, 2, 3)).long()[:, None, None]
    xor = a_bits + w_all - 2 * both  # popc(a ⊕ w) over all taps, those outside included
    assert torch.equal(length + 2 * (w_all - w_inside) - 2 * xor, sums)
    assert not ((sums - length) % 2).any()


@pytest.mark.parametrize("name", ["codes_1", "codes_2", "codes_3", "codes_4", "codes_groups"])
def test_codes_are_planes_and_need_no_table(name):
    case = testing.binary_case(name)
    values, signs, settings = operands(case)
    w, total = (signs + 1) / 2, 0
    for plane in range(case.problem.planes):
        a = (values.int() >> plane & 1).float()
        total = total + 2**plane * (2 * conv(a, w, settings) - conv(a, torch.ones_like(w), settings))
    assert torch.equal(reference.integer_sums(values, signs, settings).long(), total)


@pytest.mark.parametrize("value", [-1, 1])
@pytest.mark.parametrize("name", ["odd_sizes", "padding_past_kernel", "map_below_kernel", "stride", "groups"])
def test_padding_with_ones_is_a_padded_map(name, value):
    case = testing.binary_case(name).at(padding_value=value)
    values, signs, settings = operands(case)
    top, bottom, left, right = case.problem.padding
    padded = F.pad(values, (left, right, top, bottom), value=value)
    expected = conv(padded, signs, settings._replace(padding=(0, 0, 0, 0)))
    assert torch.equal(reference.integer_sums(values, signs, settings).long(), expected)


def test_every_border_class_occurs_in_a_case():
    """Taps inside per output row and column, as sets: maps below the kernel have more classes than borders."""
    p = testing.binary_case("map_below_kernel").problem
    rows = [
        tuple(r for r in range(p.R) if 0 <= y * p.stride[0] + r * p.dilation[0] - p.padding[0] < p.H)
        for y in range(p.output_size[0])
    ]
    assert len(set(rows)) == len(rows) == 6
    assert all(len(row) in (1, 2) for row in rows)


def test_sums_beyond_float32_are_exact():
    """A filter of 2^18·15·… ones: float32 would round."""
    settings = settings_of(testing.binary_case("codes_4").at(C=40_000, padding=(0, 0, 0, 0)))
    values = torch.full((1, 40_000, 6, 6), 15.0)
    values[0, 0, 0, 0] = 14.0
    filters = torch.ones(1, 40_000, 6, 6)
    assert reference.integer_sums(values, filters, settings).item() == 15 * 40_000 * 36 - 1


@pytest.mark.parametrize("estimator", reference.ESTIMATORS)
def test_slopes(estimator):
    x = torch.tensor([-2.0, -1.0, -0.25, 0.0, 0.5, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    found = reference.slope(x.detach(), estimator)
    if estimator == "identity":
        assert found is None
    elif estimator == "clip":
        assert found.tolist() == [0, 1, 1, 1, 1, 1, 0]
    elif estimator == "approx_sign":
        assert found.tolist() == [0, 0, 1.5, 2, 1, 0, 0]
    else:
        beta = estimators.SWISH_BETA
        s = torch.sigmoid(beta * x)
        (2 * s * (1 + beta * x * (1 - s)) - 1).sum().backward()
        torch.testing.assert_close(found, x.grad, **testing.tolerances.FORMULA)
        far = reference.slope(torch.tensor([1e30, -1e30]), estimator)
        torch.testing.assert_close(far, torch.zeros(2), **testing.tolerances.FORMULA)


def test_packed_operands_are_read_as_real_ones():
    case = testing.binary_case("packed")
    _, signs, settings = operands(case)
    words = pack_planes((signs > 0)[:, None])
    assert torch.equal(reference.weight_signs(words, settings._replace(packed_weight=True)), signs)
