"""The CUDA kernel of filters of −1, 0 and +1 on a GPU, through ``ternary_conv2d`` and ``stacked_binary_conv2d``."""

from __future__ import annotations

import functools

import pytest
import torch

from basisconv_kernels import StackedBinaryConv2d, stacked_binary_conv2d, testing
from basisconv_kernels.core import selfcheck
from basisconv_kernels.ops import stacked_binary_conv2d as stacked_op
from basisconv_kernels.ops import ternary_conv2d as op
from basisconv_kernels.ops import ternary_conv2d_selfcheck as checks
from basisconv_kernels.ops.stacked_binary_conv2d_native import stacked_binary_conv2d_pack
from basisconv_kernels.ops.ternary_conv2d import ternary_conv2d
from basisconv_kernels.ops.ternary_conv2d_cuda import supports
from basisconv_kernels.ops.ternary_conv2d_native import ternary_conv2d_pack
from basisconv_kernels.reference.stacked_binary_conv2d_problem import StackedBinaryConv2dProblem
from basisconv_kernels.reference.ternary_conv2d_problem import TernaryConv2dProblem
from basisconv_kernels.testing import ternary_conv2d as ternary
from basisconv_kernels.testing.ternary_conv2d import TERNARY_CASES, TernaryCase

gpu = pytest.mark.gpu
BF16, F16 = torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
SIZES = {"N": 3, "C": 64, "H": 28, "W": 27, "K": 96, "padding": (1, 1, 1, 1), "dtype": BF16, "device": "cuda",
         "channels_last": True}  # fmt: skip
LAYERS = [  # C, K, side, N: every form of the plan, resident filters and a ring, parts, tails
    (64, 64, 56, 32), (128, 128, 28, 32), (256, 256, 14, 32), (512, 512, 7, 32), (64, 64, 56, 1), (512, 512, 7, 1),
    (72, 67, 33, 5), (8, 300, 9, 2), (1024, 40, 10, 3),
]  # fmt: skip


def a_case(**sizes):
    return TernaryCase("gpu", "", TernaryConv2dProblem(**{**SIZES, "bias": True, "activation": "relu", **sizes}))


kernel = functools.partial(ternary_conv2d, backend="cuda")


def taken(case):
    return not supports(case.at(device="cuda", dtype=BF16).problem)


@gpu
@DTYPES
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_whole_layers(layer, dtype):
    C, K, side, N = layer
    ternary.check(a_case(C=C, K=K, H=side, W=side, N=N, dtype=dtype), kernel)


@gpu
@pytest.mark.parametrize(
    "change",
    [
        {"R": 1, "S": 1, "padding": (0, 0, 0, 0)},
        {"R": 5, "S": 5, "padding": (2, 2, 2, 2)},
        {"R": 2, "S": 3, "padding": (0, 3, 2, 1)},
        {"stride": (2, 1), "dilation": (1, 2)},
        {"scales": "none", "activation": "relu6"},
        {"K": 67, "bias": False},
        {"N": 0},
    ],
    ids=str,
)
def test_geometries_and_epilogues(change):
    ternary.check(a_case(**change), kernel)


@gpu
@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "NCHW, which is copied"])
@pytest.mark.parametrize("case", [case for case in TERNARY_CASES if taken(case)], ids=lambda case: case.name)
def test_the_cases_of_the_op(case, last):
    ternary.check(case.at(device="cuda", dtype=BF16, channels_last=last), kernel)


def test_there_are_such_cases_and_layers_that_fill_no_slab():
    """On any machine."""
    assert not supports(a_case().at(C=72).problem)
    assert [why for why in supports(a_case(C=12).problem) if "8 divides" in why]
    assert [why for why in supports(a_case(scales="two").problem) if "two scales" in why]


@gpu
def test_gradients():
    ternary.check_gradients(a_case(N=2, H=9, W=10), kernel)


@gpu
def test_packed_planes_give_the_bits_of_the_planes_themselves():
    given = ternary.make_inputs(a_case())
    x, planes, scale, _, bias = given.tensors
    packed = ternary_conv2d_pack(planes, 64)
    call = functools.partial(kernel, x, planes, scale, bias, **given.case.arguments())
    assert torch.equal(call(), call(packed=packed))
    with pytest.raises(ValueError, match="pack the planes again"):
        call(packed=packed.cpu())
    with pytest.raises(RuntimeError, match="these filters pack to"):
        call(packed=packed[:-64])


@gpu
def test_a_captured_graph_follows_its_inputs_and_calls_follow_each_other():
    given = ternary.make_inputs(a_case())
    x, planes, scale, _, bias = given.tensors
    packed = ternary_conv2d_pack(planes, 64)
    call = functools.partial(kernel, x, planes, scale, bias, packed=packed, **given.case.arguments())
    with torch.inference_mode():
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = [call() for _ in range(4)]
        for _ in range(50):
            x.normal_()
            graph.replay()
            expected = call()
            assert all(torch.equal(out, expected) for out in outs)


@gpu
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("scale", [True, False])
def test_stacked_filters_of_real_activations(splits, scale):
    sizes = {**SIZES, "n": 24, "splits": splits, "scale": scale, "bias": True, "activation": "relu6"}
    case = testing.StackedCase("gpu", "", StackedBinaryConv2dProblem(**sizes))
    testing.check_stacked(case, functools.partial(stacked_binary_conv2d, backend="cuda"))


@gpu
def test_a_stacked_layer_keeps_its_bits_and_runs_on_them():
    torch.manual_seed(0)
    layer = StackedBinaryConv2d(64, 96, 3, bank=24, splits=2, padding=1).to("cuda", BF16).eval().freeze()
    x = torch.randn(2, 64, 14, 14, device="cuda", dtype=BF16).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        found = layer(x)
        expected = layer.float()(x.float())
    assert (found.float() - expected).norm() <= 2.0**-6 * expected.norm()


@gpu
@pytest.mark.usefixtures("cache")
def test_automatic_choice_takes_it_after_its_check():
    problem = a_case().problem
    assert selfcheck.against(checks.cuda(problem)) is None
    given = ternary.make_inputs(a_case())
    x, planes, scale, _, bias = given.tensors
    arguments = given.case.arguments()
    chosen = op._plan((x, planes, scale, None, bias), (*arguments.values(), None)).backend
    assert chosen == "cuda"
    assert torch.equal(ternary_conv2d(x, planes, scale, bias, **arguments), kernel(x, planes, scale, bias, **arguments))
    assert [c.name for c in stacked_op.CANDIDATES if "cuda" in c.name] == ["cuda"]


@gpu
def test_packing_of_a_bank_is_that_of_its_full_filters():
    bank = torch.randint(0, 2, (12, 32, 3, 3), device="cuda") * 2 - 1
    index = torch.randint(0, 12, (40, 2), device="cuda")
    full = torch.cat([bank[index[:, 0]], bank[index[:, 1]]], 1)
    packed = stacked_binary_conv2d_pack(bank.to(BF16), index)
    assert torch.equal(packed, ternary_conv2d_pack(op.ternary_planes(full), 64))
