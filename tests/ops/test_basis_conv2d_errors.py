"""Every bad argument of ``basis_conv2d``: the type of the error and its whole text."""

from __future__ import annotations

import pytest
import torch

from basisconv_kernels import BackendUnavailable, basis_conv2d
from basisconv_kernels.core import registry
from basisconv_kernels.ops.basis_conv2d import CANDIDATES

# C = 6, Q = 9, K = 12, 3×2 taps; outputs 5×7.
GOOD = {
    "input": torch.zeros(2, 6, 7, 8),
    "basis_weight": torch.zeros(9, 6, 3, 2),
    "coefficients": torch.zeros(12, 9),
    "bias": torch.zeros(12),
    "residual": torch.zeros(2, 12, 5, 7),
}


def without(name):
    return {k: v for k, v in GOOD.items() if k != name}


BAD = {
    "input no tensor": ({"input": [1.0]}, TypeError, "input must be a Tensor [N, C, H, W], got list"),
    "input none": ({"input": None}, TypeError, "input must be a Tensor [N, C, H, W], got NoneType"),
    "input rank": ({"input": torch.zeros(6, 7, 8)}, ValueError, "input must be [N, C, H, W], got shape [6, 7, 8]"),
    "input sparse": (
        {"input": torch.zeros(2, 6, 7, 8).to_sparse()},
        TypeError,
        "input must be a dense tensor, got layout torch.sparse_coo; call .to_dense() first",
    ),
    "input integers": (
        {name: tensor.int() for name, tensor in GOOD.items()},
        TypeError,
        "input must be float32, bfloat16, float16 or float64, got torch.int32",
    ),
    "basis rank": (
        {"basis_weight": torch.zeros(9, 54)},
        ValueError,
        "basis_weight must be [Q, C/groups, R, S], got shape [9, 54]",
    ),
    "basis channels": (
        {"basis_weight": torch.zeros(9, 5, 3, 2)},
        ValueError,
        "basis_weight must be [Q, C/groups, R, S] with C/groups = 6/1 from input.shape[1], got [9, 5, 3, 2]",
    ),
    "no basis filter": (
        {"basis_weight": torch.zeros(0, 6, 3, 2), "coefficients": torch.zeros(12, 0)},
        ValueError,
        "basis_weight must be [Q, C/groups, R, S] with no empty side, got [0, 6, 3, 2]",
    ),
    "no taps": (
        {"basis_weight": torch.zeros(9, 6, 0, 2)},
        ValueError,
        "basis_weight must be [Q, C/groups, R, S] with no empty side, got [9, 6, 0, 2]",
    ),
    "coefficients rank": (
        {"coefficients": torch.zeros(12, 9, 1, 1)},
        ValueError,
        "coefficients must be [K, Q], got shape [12, 9, 1, 1]",
    ),
    "coefficients transposed": (
        {"coefficients": torch.zeros(9, 12)},
        ValueError,
        "coefficients must be [K, Q] with Q = basis_weight.shape[0] = 9, got [9, 12]",
    ),
    "no output": (
        {"coefficients": torch.zeros(0, 9)},
        ValueError,
        "coefficients must be [K, Q] with K at least 1, got [0, 9]",
    ),
    "bias rank": ({"bias": torch.zeros(12, 1)}, ValueError, "bias must be [K], got shape [12, 1]"),
    "bias size": (
        {"bias": torch.zeros(9)},
        ValueError,
        "bias must be [K] with K = coefficients.shape[0] = 12, got [9]",
    ),
    "residual rank": (
        {"residual": torch.zeros(12)},
        ValueError,
        "residual must be [N, K, OH, OW], got shape [12]",
    ),
    "residual broadcast": (
        {"residual": torch.zeros(1, 12, 5, 7)},
        ValueError,
        "residual must be [N, K, OH, OW] = [2, 12, 5, 7], got [1, 12, 5, 7]; it is added before the activation and not "
        "broadcast",
    ),
    "mixed dtypes": (
        {"coefficients": torch.zeros(12, 9, dtype=torch.float16)},
        TypeError,
        "coefficients must have the dtype of input, torch.float32, got torch.float16; convert one of them, or use "
        "torch.autocast",
    ),
    "mixed devices": (
        {"basis_weight": torch.zeros(9, 6, 3, 2, device="meta")},
        ValueError,
        "basis_weight must be on the device of input, cpu, got meta; move one of them",
    ),
    "groups zero": ({"groups": 0}, ValueError, "groups must be at least 1, got 0"),
    "groups float": ({"groups": 1.0}, TypeError, "groups must be an int, got 1.0"),
    "groups bool": ({"groups": True}, TypeError, "groups must be an int, got True"),
    "groups of channels": (
        {"groups": 4},
        ValueError,
        "basis_weight must be [Q, C/groups, R, S] with C/groups = 6/4 from input.shape[1], got [9, 6, 3, 2]",
    ),
    "groups of filters": (
        {"groups": 2, "basis_weight": torch.zeros(9, 3, 3, 2)},
        ValueError,
        "Q = basis_weight.shape[0] must be divisible by groups = 2, got 9",
    ),
    "grouped coefficients": (
        {"groups": 3, "basis_weight": torch.zeros(9, 2, 3, 2), "coefficients": torch.zeros(12, 4)},
        ValueError,
        "coefficients must be [K, Q] with Q = basis_weight.shape[0] = 9, or [K, Q/groups] = [12, 3] block-diagonal, "
        "got [12, 4]",
    ),
    "groups of outputs": (
        {
            "groups": 3,
            "basis_weight": torch.zeros(9, 2, 3, 2),
            "coefficients": torch.zeros(11, 3),
            "bias": None,
            "residual": None,
        },
        ValueError,
        "coefficients [K, Q/groups] need K divisible by groups = 3, got [11, 3]",
    ),
    "stride zero": ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    "stride negative": ({"stride": (1, -2)}, ValueError, "stride must be at least 1, got (1, -2)"),
    "stride float": (
        {"stride": 1.0},
        TypeError,
        "stride must be an int or two ints (vertical, horizontal), got 1.0",
    ),
    "stride bool": (
        {"stride": True},
        TypeError,
        "stride must be an int or two ints (vertical, horizontal), got True",
    ),
    "stride triple": (
        {"stride": (1, 1, 1)},
        TypeError,
        "stride must be an int or two ints (vertical, horizontal), got (1, 1, 1)",
    ),
    "dilation zero": ({"dilation": (0, 1)}, ValueError, "dilation must be at least 1, got (0, 1)"),
    "dilation text": (
        {"dilation": "11"},
        TypeError,
        "dilation must be an int or two ints (vertical, horizontal), got '11'",
    ),
    "padding negative": (
        {"padding": (0, -1)},
        ValueError,
        "padding must not be negative, got (0, -1); slice the input to crop it",
    ),
    "padding triple": (
        {"padding": (1, 1, 1)},
        TypeError,
        "padding must be an int, (vertical, horizontal), (top, bottom, left, right), 'same' or 'valid', got (1, 1, 1)",
    ),
    "padding float": (
        {"padding": 0.0},
        TypeError,
        "padding must be an int, (vertical, horizontal), (top, bottom, left, right), 'same' or 'valid', got 0.0",
    ),
    "padding bool": (
        {"padding": False},
        TypeError,
        "padding must be an int, (vertical, horizontal), (top, bottom, left, right), 'same' or 'valid', got False",
    ),
    "padding name": (
        {"padding": "full"},
        ValueError,
        "padding must be 'same', 'valid' or numbers, got 'full'",
    ),
    "same padding with stride": (
        {"padding": "same", "stride": (2, 1)},
        ValueError,
        "padding='same' needs stride 1, got stride (2, 1); give the padding as numbers instead",
    ),
    "no output pixel": (
        {"dilation": (4, 1)},
        ValueError,
        "the padded input 7×8 is smaller than the dilated kernel 9×2, so no output pixel exists; add padding or use a "
        "larger input",
    ),
    "activation": (
        {"activation": "gelu"},
        ValueError,
        "activation must be None, 'relu' or 'relu6', got 'gelu'",
    ),
}


@pytest.mark.parametrize(("change", "error", "text"), BAD.values(), ids=BAD)
def test_bad_argument(change, error, text):
    good = basis_conv2d(**GOOD)  # a good call before must not make a bad one pass
    arguments = {**GOOD, **change}
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor) and not v.is_meta}
    with pytest.raises(error) as raised:
        basis_conv2d(**arguments)
    assert str(raised.value) == f"basis_conv2d: {text}"
    assert type(raised.value) is error
    for name, tensor in before.items():
        assert torch.equal(arguments[name].to_dense(), tensor.to_dense()), name
    assert torch.equal(basis_conv2d(**GOOD), good)


def test_unknown_backend_lists_every_candidate():
    with pytest.raises(BackendUnavailable) as raised:
        basis_conv2d(**GOOD, backend="abacus")
    first, unknown, *others = str(raised.value).splitlines()
    assert first == "basis_conv2d: backend 'abacus' cannot run [6→9→12 3×2 float32 cpu]"
    assert unknown == "  abacus: no backend has the name 'abacus'"
    assert [line.split(":")[0].strip() for line in others] == [candidate.name for candidate in CANDIDATES]


def test_backend_of_another_op_or_device_says_why():
    with pytest.raises(BackendUnavailable) as raised:
        basis_conv2d(**GOOD, backend="cuda")
    reason = registry.absent("cuda") or "not a backend of this op"
    if "cuda" not in [candidate.name for candidate in CANDIDATES]:
        assert f"  cuda: {reason}" in str(raised.value).splitlines()


@pytest.mark.parametrize("candidate", [c for c in CANDIDATES if c.name == "cpu"], ids=lambda c: c.name)
def test_a_backend_without_the_dtype_says_so(candidate):
    reason = registry.absent("cpu") or "has no torch.float64 kernel"
    with pytest.raises(BackendUnavailable) as raised:
        basis_conv2d(**{name: tensor.double() for name, tensor in GOOD.items()}, backend="cpu")
    assert f"  cpu: {reason}" in str(raised.value).splitlines()


def test_dtypes_without_a_kernel_fall_back_by_themselves():
    assert basis_conv2d(**{name: tensor.double() for name, tensor in GOOD.items()}).dtype == torch.float64
