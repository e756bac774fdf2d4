"""``tucker_conv2d`` by the CUDA kernels, executed on the CPU: the glue of the op on the emulated basis kernel."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from basisconv_kernels import testing
from basisconv_kernels.core import registry
from basisconv_kernels.core.problem import TuckerConv2dProblem
from basisconv_kernels.ops import tucker_conv2d as op
from basisconv_kernels.ops import tucker_conv2d_native as native
from basisconv_kernels.reference import tucker_conv2d as reference
from tests.cuda_on_cpu.emulated import A100, H200, Emulated

pytestmark = pytest.mark.xdist_group("cuda_on_cpu")

BF16, F16 = torch.bfloat16, torch.float16
CUDA = next(candidate for candidate in op.CANDIDATES if candidate.name == "cuda")
TAKEN = [case for case in testing.TUCKER_CASES if not case.problem.precise]
# The kernel passes every case of its own op in the ordinary run; here it is the glue that is looked at.
SHORT = {"odd_sizes", "empty_batch", "one_output_channels_last", "padding_past_kernel", "sliced_channels_last",
         "mixed_formats", "whole_epilogue"}  # fmt: skip
SHORT_ON_HOPPER = {"channels_last_stride", "residual_relu"}
# What the Hopper kernel takes: channels_last, rank_in a multiple of 8; a window that fits.
HOPPER = [
    case.at(rank_in=(case.problem.rank_in + 7) // 8 * 8, channels_last=True)
    for case in TAKEN
    if case.problem.N > 0 and case.view == "dense" and case.name != "stride_past_kernel"
]


def emulated(monkeypatch, module, variant, device):
    """The op's ``cuda`` backend with the kernel in three orders of the threads, and M as cuDNN rounds it."""
    kernel = Emulated(module, variant, device)

    def forward(input, basis_weight, coefficients, bias, residual, packed, settings, keep_maps=False):
        stride, padding, dilation, groups, activation, precise, backend = settings
        assert backend == "cuda"
        out = kernel(
            input, basis_weight, coefficients, bias, residual=residual, keep_maps=keep_maps, stride=stride,
            padding=padding, dilation=dilation, groups=groups, activation=activation, precise=precise,
        )  # fmt: skip
        return out, kernel.maps

    def reduce(input, u_in, layout, precise):
        return reference.reduce_channels(input, u_in).to(input.dtype)

    monkeypatch.setattr(native.basis, "forward", forward)
    monkeypatch.setattr(native, "first_stage", reduce)
    monkeypatch.setattr(op, "_choose", lambda *_: "cuda")
    monkeypatch.setattr(op, "_plans", {})
    return functools.partial(op.tucker_conv2d, backend="cuda")


def cases(which, short):
    return [
        pytest.param(c.at(dtype=BF16), id=c.name, marks=[] if c.name in short else [pytest.mark.full]) for c in which
    ]


@pytest.mark.parametrize("case", cases(TAKEN, SHORT))
def test_sm80(monkeypatch, module, case):
    testing.check_tucker(case, emulated(monkeypatch, module, "sm80", A100))


@pytest.mark.parametrize("case", cases(HOPPER, SHORT_ON_HOPPER))
def test_sm90a(monkeypatch, module, case):
    testing.check_tucker(case, emulated(monkeypatch, module, "sm90a", H200))


@pytest.mark.parametrize("dtype", [BF16, pytest.param(F16, marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen core"])
def test_gradients(monkeypatch, module, dtype, frozen):
    """Of all tensors, with the maps that the kernel keeps; a frozen core and u_out keep none."""
    case = testing.tucker_case("whole_epilogue").at(dtype=dtype)
    kernel = emulated(monkeypatch, module, "sm80", A100)
    if not frozen:
        return testing.check_tucker_gradients(case, kernel)
    case = case.at(activation=None)  # near a kink the two slopes may differ
    x, *weights, bias, residual = testing.make_tucker_inputs(case).tensors
    x = x.requires_grad_()
    settings = {**case.arguments(), "residual": residual}
    ours = kernel(x, *weights, bias, **settings)
    theirs = reference.forward(x, *weights, bias, residual, *op_settings(case))
    grad = torch.ones_like(ours)
    (one,), (two,) = torch.autograd.grad(ours, x, grad), torch.autograd.grad(theirs, x, grad)
    return testing.check_same_layer(one, two)


def op_settings(case):
    names = ("stride", "padding", "dilation", "activation", "precise")
    return [case.arguments()[name] for name in names]


# --- what it takes ----------------------------------------------------------------------------------------------------

PROBLEM = TuckerConv2dProblem(C=64, rank_in=32, Q=16, K=64, dtype=BF16, device="cuda", channels_last=True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu"}, "runs on CUDA devices, the tensors are on cpu"),
        ({"dtype": torch.float32}, "has no torch.float32 kernel"),
        ({"Q": 300}, "at most 256 basis filters a group, here are 300"),
        ({"precise": True}, "keeps the first map in the dtype of the input"),
    ],
)
def test_what_it_does_not_take(changes, reason):
    assert not CUDA.supports(PROBLEM)
    assert any(reason in told for told in CUDA.supports(replace(PROBLEM, **changes)))


def test_its_variant_is_that_of_the_basis_kernel_on_the_first_map():
    variant = registry.check_of(CUDA, PROBLEM).variant
    assert variant == "tucker_conv2d cuda bfloat16 channels_last 3×3 stride 1,1 C≤32 aligned to 8 Q≤16 K≤64"
    assert registry.check_of(CUDA, replace(PROBLEM, C=128)).variant == variant
    assert registry.check_of(CUDA, replace(PROBLEM, rank_in=33)).variant != variant
