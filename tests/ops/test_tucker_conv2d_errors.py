"""Every bad argument of ``tucker_conv2d`` that ``basis_conv2d`` has not: the type of the error and its whole text."""

from __future__ import annotations

import pytest
import torch

from basisconv_kernels import BackendUnavailable, tucker_conv2d
from basisconv_kernels.ops.tucker_conv2d import CANDIDATES

# C = 6, rank_in = 4, rank_out = 9, K = 12, 3×2 taps; outputs 5×7.
GOOD = {
    "input": torch.zeros(2, 6, 7, 8),
    "u_in": torch.zeros(6, 4),
    "core": torch.zeros(9, 4, 3, 2),
    "u_out": torch.zeros(12, 9),
    "bias": torch.zeros(12),
    "residual": torch.zeros(2, 12, 5, 7),
}
U_IN = "u_in must be [C, rank_in] with C = input.shape[1] = 6 and rank_in = core.shape[1] = 4, got "
U_OUT = "u_out must be [K, rank_out] with K at least 1 and rank_out = core.shape[0] = 9, got "

BAD = {
    "input no tensor": ({"input": [1.0]}, TypeError, "input must be a Tensor [N, C, H, W], got list"),
    "input rank": ({"input": torch.zeros(6, 7, 8)}, ValueError, "input must be [N, C, H, W], got shape [6, 7, 8]"),
    "input integers": (
        {name: tensor.int() for name, tensor in GOOD.items()},
        TypeError,
        "input must be float32, bfloat16, float16 or float64, got torch.int32",
    ),
    "input without channels": (
        {"input": torch.zeros(2, 0, 7, 8), "u_in": torch.zeros(0, 4)},
        ValueError,
        "input must be [N, C, H, W] with C at least 1, got [2, 0, 7, 8]",
    ),
    "u_in none": ({"u_in": None}, TypeError, "u_in must be a Tensor [C, rank_in], got NoneType"),
    "u_in as a filter": (
        {"u_in": torch.zeros(4, 6, 1, 1)},
        ValueError,
        "u_in must be [C, rank_in], got shape [4, 6, 1, 1]",
    ),
    "u_in transposed": ({"u_in": torch.zeros(4, 6)}, ValueError, U_IN + "[4, 6]"),
    "u_in of another rank": ({"u_in": torch.zeros(6, 5)}, ValueError, U_IN + "[6, 5]"),
    "core rank": (
        {"core": torch.zeros(9, 24)},
        ValueError,
        "core must be [rank_out, rank_in, R, S], got shape [9, 24]",
    ),
    "core without taps": (
        {"core": torch.zeros(9, 4, 0, 2)},
        ValueError,
        "core must be [rank_out, rank_in, R, S] with no empty side, got [9, 4, 0, 2]",
    ),
    "u_out rank": (
        {"u_out": torch.zeros(12, 9, 1, 1)},
        ValueError,
        "u_out must be [K, rank_out], got shape [12, 9, 1, 1]",
    ),
    "u_out transposed": ({"u_out": torch.zeros(9, 12)}, ValueError, U_OUT + "[9, 12]"),
    "no output": ({"u_out": torch.zeros(0, 9)}, ValueError, U_OUT + "[0, 9]"),
    "bias size": ({"bias": torch.zeros(9)}, ValueError, "bias must be [K] with K = u_out.shape[0] = 12, got [9]"),
    "residual broadcast": (
        {"residual": torch.zeros(1, 12, 5, 7)},
        ValueError,
        "residual must be [N, K, OH, OW] = [2, 12, 5, 7], got [1, 12, 5, 7]; it is added before the activation and not "
        "broadcast",
    ),
    "mixed dtypes": (
        {"core": torch.zeros(9, 4, 3, 2, dtype=torch.float16)},
        TypeError,
        "core must have the dtype of input, torch.float32, got torch.float16; convert one of them, or use "
        "torch.autocast",
    ),
    "mixed devices": (
        {"u_out": torch.zeros(12, 9, device="meta")},
        ValueError,
        "u_out must be on the device of input, cpu, got meta; move one of them",
    ),
    "stride zero": ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    "stride bool": (
        {"stride": True},
        TypeError,
        "stride must be an int or two ints (vertical, horizontal), got True",
    ),
    "dilation text": (
        {"dilation": "11"},
        TypeError,
        "dilation must be an int or two ints (vertical, horizontal), got '11'",
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
    "activation": ({"activation": "gelu"}, ValueError, "activation must be None, 'relu' or 'relu6', got 'gelu'"),
}


@pytest.mark.parametrize(("change", "error", "text"), BAD.values(), ids=BAD)
def test_bad_argument(change, error, text):
    good = tucker_conv2d(**GOOD)  # a good call before must not make a bad one pass
    with pytest.raises(error) as raised:
        tucker_conv2d(**{**GOOD, **change})
    assert str(raised.value) == f"tucker_conv2d: {text}"
    assert type(raised.value) is error
    assert torch.equal(tucker_conv2d(**GOOD), good)


def test_unknown_backend_lists_every_candidate():
    with pytest.raises(BackendUnavailable) as raised:
        tucker_conv2d(**GOOD, backend="abacus")
    first, unknown, *others = str(raised.value).splitlines()
    assert first == "tucker_conv2d: backend 'abacus' cannot run [6→4→9→12 3×2 float32 cpu]"
    assert unknown == "  abacus: no backend has the name 'abacus'"
    assert [line.split(":")[0].strip() for line in others] == [candidate.name for candidate in CANDIDATES]


def test_dtypes_without_a_kernel_fall_back_by_themselves():
    double = {name: tensor.double() for name, tensor in GOOD.items()}
    assert tucker_conv2d(**double).dtype == torch.float64
    with pytest.raises(BackendUnavailable):
        tucker_conv2d(**double, backend="cpu")
