"""Normal forms of user arguments; the errors are compared in tests/ops, through the op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from basisconv_kernels.core import checks

ONE = (1, 1)


@pytest.mark.parametrize("value", [3, (3, 3), [3, 3], torch.Size([3, 3])], ids=repr)
def test_pair(value):
    found = checks.pair("op", "stride", value, at_least=1)
    assert found == (3, 3)
    assert type(found) is tuple


@pytest.mark.parametrize("value", [None, 1.5, True, "33", (1,), (1, 2, 3), (1, 2.0), {1, 2}, (True, 1)], ids=repr)
def test_no_pair(value):
    with pytest.raises(TypeError, match="op: stride must be an int or two ints"):
        checks.pair("op", "stride", value, at_least=0)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, (0, 0, 0, 0)),
        (2, (2, 2, 2, 2)),
        ((1, 2), (1, 1, 2, 2)),
        ([1, 2, 3, 4], (1, 2, 3, 4)),
        ("valid", (0, 0, 0, 0)),
        ("same", (1, 1, 1, 2)),  # dilated kernel 3×4: one excess column, on the right
    ],
)
def test_padding(value, expected):
    assert checks.padding4("op", value, (3, 4), ONE, ONE) == expected


@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.integers(0, 4)] * 4),
)
def test_output_size_is_that_of_conv2d(size, kernel, stride, dilation, padding):
    top, bottom, left, right = padding
    padded = F.pad(torch.zeros(1, 1, *size), (left, right, top, bottom))
    try:
        expected = F.conv2d(padded, torch.zeros(1, 1, *kernel), None, stride, 0, dilation).shape[2:]
    except RuntimeError:
        with pytest.raises(ValueError, match="no output pixel exists"):
            checks.output_size("op", size, kernel, stride, padding, dilation)
    else:
        assert checks.output_size("op", size, kernel, stride, padding, dilation) == tuple(expected)


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_same_padding_is_that_of_conv2d(size, kernel, dilation):
    input, weight = torch.randn(1, 1, *size).double(), torch.randn(1, 1, *kernel).double()
    top, bottom, left, right = checks.padding4("op", "same", kernel, ONE, dilation)
    found = F.conv2d(F.pad(input, (left, right, top, bottom)), weight, dilation=dilation)
    torch.testing.assert_close(found, F.conv2d(input, weight, padding="same", dilation=dilation))


@pytest.mark.parametrize("value", [None, "relu", "relu6"])
def test_activation(value):
    checks.activation("op", value)


def test_same_kind_skips_what_is_not_there():
    checks.same_kind("op", "input", torch.zeros(1), {"bias": None, "weight": torch.zeros(2)})
