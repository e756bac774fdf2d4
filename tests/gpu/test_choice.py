"""What automatic choice on a GPU stands on: plain PyTorch by the library's kernels, training steps, measured tables."""

from __future__ import annotations

import functools

import pytest
import torch

from basisconv_kernels import basis_conv2d, testing, tucker_conv2d
from basisconv_kernels.core import tuning
from basisconv_kernels.core.problem import Conv2dProblem, TuckerConv2dProblem
from basisconv_kernels.ops import basis_conv2d as op
from basisconv_kernels.ops import basis_conv2d_tuning, tucker_conv2d_tuning

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cache")]
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
SIZES = {"N": 8, "C": 64, "H": 14, "W": 14, "Q": 128, "K": 256}  # a product that a library may split


@HALF
@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("name", ["odd_sizes", "whole_epilogue", "stride_and_dilation", "precise"])
def test_plain_pytorch_keeps_the_contract(name, last, dtype):
    case = testing.case(name).at(dtype=dtype, device="cuda", channels_last=last)
    testing.check(case, functools.partial(basis_conv2d, backend="reference"))


@HALF
@pytest.mark.parametrize(
    "epilogue", [{}, {"bias": True}, {"residual": True}, {"bias": True, "residual": True}], ids=str
)
def test_plain_pytorch_rounds_once_where_sums_are_long(epilogue, dtype):
    problem = Conv2dProblem(**SIZES, **epilogue, dtype=dtype, device="cuda", channels_last=True, padding=(1, 1, 1, 1))
    testing.check(testing.Case("gpu", "", problem), functools.partial(basis_conv2d, backend="reference"))


@HALF
def test_the_chain_too(dtype):
    case = testing.tucker_case("whole_epilogue").at(dtype=dtype, device="cuda", channels_last=True)
    testing.check_tucker(case, functools.partial(tucker_conv2d, backend="reference"))


def test_a_step_without_a_wish_is_two_convolutions_with_their_gradients():
    torch.manual_seed(0)
    shapes = ((4, 64, 14, 14), (32, 64, 3, 3), (96, 32), (96,))
    leaves = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.1 for shape in shapes]
    leaves[0] = leaves[0].contiguous(memory_format=torch.channels_last)
    results = {}
    for backend in (None, "reference"):
        given = [leaf.detach().requires_grad_() for leaf in leaves]
        out = basis_conv2d(*given, padding=1, activation="relu", backend=backend)
        gradients = torch.autograd.grad(out, given, torch.ones_like(out))
        results[backend] = [tensor.float() for tensor in (out, *gradients)]
    assert any(plan.training is not None and plan.training.eager for plan in op._plans.values())
    for ours, other in zip(*results.values(), strict=True):
        assert (ours - other).norm() <= 2.0**-5 * other.norm()


def test_both_steps_are_measured_and_the_choice_reads_them(monkeypatch):
    sizes = {"N": 4, "C": 64, "H": 14, "W": 14, "Q": 32, "K": 64, "padding": (1, 1, 1, 1), "bias": True}
    flags = {"dtype": torch.bfloat16, "device": "cuda", "channels_last": True}
    entries = basis_conv2d_tuning.measure_on_gpu(Conv2dProblem(**sizes, **flags), 0.05)
    assert {(entry["step"], entry["way"]) for entry in entries} == {
        (step, way) for step in (tuning.FORWARD, tuning.TRAINING) for way in tuning.WAYS
    }
    assert all(spread["least"] > 0 for entry in entries for spread in entry["ms"].values())
    tuning.remember(entries, "cuda")
    assert len(tuning.entries_for("basis_conv2d", Conv2dProblem(**sizes, **flags))) == 2
    chain = tucker_conv2d_tuning.measure_on_gpu(TuckerConv2dProblem(**sizes, **flags, rank_in=16), 0.05)
    assert [entry["way"] for entry in chain] == list(tuning.WAYS)
