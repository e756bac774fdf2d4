"""The Triton kernels of ternary, stacked and binary convolutions and of packing on a GPU; see ``tests/triton``."""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch

from basisconv_kernels import binary_conv2d, bitpack, stacked_binary_conv2d, testing
from basisconv_kernels.core import selfcheck
from basisconv_kernels.ops import (
    binary_conv2d_selfcheck,
    bitpack_selfcheck,
    stacked_binary_conv2d_selfcheck,
    ternary_conv2d_selfcheck,
)
from basisconv_kernels.ops.ternary_conv2d import ternary_conv2d, ternary_planes
from basisconv_kernels.reference.binary_conv2d_problem import BinaryConv2dProblem
from basisconv_kernels.reference.stacked_binary_conv2d_problem import StackedBinaryConv2dProblem
from basisconv_kernels.reference.ternary_conv2d_problem import TernaryConv2dProblem
from basisconv_kernels.testing import ternary_conv2d as ternary

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from basisconv_kernels.triton_kernels import _signed_conv2d as signed
from basisconv_kernels.triton_kernels import bits_configs, configs

gpu = pytest.mark.gpu
BF16, HALF, FULL = torch.bfloat16, torch.float16, torch.float32
SIZES = {"N": 4, "C": 64, "H": 28, "W": 28, "K": 96, "padding": (1, 1, 1, 1), "device": "cuda", "dtype": BF16,
         "channels_last": True}  # fmt: skip
of_ternary = functools.partial(ternary_conv2d, backend="triton")
of_stacked = functools.partial(stacked_binary_conv2d, backend="triton")
of_binary = functools.partial(binary_conv2d, backend="triton")


def a_ternary(**sizes):
    problem = TernaryConv2dProblem(**{**SIZES, "bias": True, "activation": "relu", **sizes})
    return ternary.TernaryCase("gpu", "", problem)


def a_stacked(**sizes):
    sizes = {**SIZES, "n": 24, "splits": 2, "scale": True, "bias": True, "activation": "relu6", **sizes}
    return testing.StackedCase("gpu", "", StackedBinaryConv2dProblem(**sizes))


def a_binary(**sizes):
    return testing.BinaryCase("gpu", "", BinaryConv2dProblem(**{**SIZES, **sizes}))


ODD = {"N": 2, "C": 37, "H": 13, "W": 21, "K": 45, "R": 3, "S": 2, "stride": (2, 1), "dilation": (1, 2),
       "padding": (0, 3, 2, 1), "channels_last": False}  # fmt: skip
GROUPS = {"C": 60, "K": 36, "groups": 3, "N": 2}


@gpu
@pytest.mark.parametrize("dtype", [BF16, HALF, FULL], ids=str)
@pytest.mark.parametrize("sizes", [{}, ODD, {"scales": "two"}, {"scales": "two", **GROUPS}], ids=str)
def test_ternary(dtype, sizes):
    ternary.check(a_ternary(dtype=dtype, **sizes), of_ternary)


@gpu
@pytest.mark.parametrize("dtype", [BF16, FULL], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [{}, {"splits": 4, "C": 192}, {**ODD, "C": 38}, {**GROUPS, "splits": 5}, {"splits": 1, "n": 96}, {"mode": "signs"},
     {"mode": "signs", "planes": 1}, {"mode": "codes", "planes": 3}, {"mode": "codes", "planes": 2, **GROUPS}],
    ids=str,
)  # fmt: skip
def test_stacked(dtype, sizes):
    testing.check_stacked(a_stacked(dtype=dtype, **sizes), of_stacked)


@gpu
@pytest.mark.parametrize(
    "sizes",
    [{}, ODD, GROUPS, {"padding_value": -1}, {"dtype": FULL, "padding_value": 1}, {"planes": 1},
     {"planes": 1, **ODD}, {"planes": 1, **GROUPS}, {"planes": 1, "padding_value": 1, "C": 70},
     {"planes": 3, "unsigned": True}, {"planes": 2, "unsigned": True, **GROUPS, "dtype": HALF}, {"K": 13, "planes": 1}],
    ids=str,
)  # fmt: skip
def test_binary(sizes):
    testing.check_binary(a_binary(**sizes), of_binary)


@gpu
@pytest.mark.parametrize("dtype", [BF16, HALF, FULL, torch.int32], ids=str)
def test_packing(dtype):
    bitpack_selfcheck.against_reference("triton", dtype, "cuda")


TILES = sorted({(kind, row) for kind, rows in bits_configs.HOPPER_PRODUCTS.items() for row in rows
                if kind in (configs.HALF, configs.TF32)})  # fmt: skip


@gpu
@pytest.mark.parametrize(("kind", "tile"), TILES, ids=str)
@pytest.mark.parametrize("op", ["ternary", "stacked"])
def test_every_row_of_the_table_of_tiles(monkeypatch, op, kind, tile):
    monkeypatch.setattr(signed.bits_configs, "product_tile", lambda *_: tile)
    monkeypatch.setattr(signed, "_plans", {})
    tf32 = kind == configs.TF32
    sizes = {"dtype": FULL if tf32 else BF16, "K": 160, "C": 192}
    if op == "ternary":
        ternary.check(a_ternary(**sizes, scales="two"), of_ternary, tf32=tf32)
    else:
        testing.check_stacked(a_stacked(**sizes), of_stacked, tf32=tf32)


@gpu
def test_gradients_are_those_of_the_formulas():
    ternary.check_gradients(a_ternary(dtype=FULL, scales="two", N=2), of_ternary)


def calls():
    """One call of each op on a given input, and new inputs for it by number."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape, dtype=BF16):
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    planes = ternary_planes((2 * normal(96, 64, 3, 3)).round().clamp(-1, 1))
    bank, index = bitpack(normal(24, 32, 3, 3)), torch.randint(24, (96, 2), device="cuda")
    weight, scale = bitpack(normal(96, 64, 3, 3)), normal(96)
    maps = [normal(8, 64, 28, 28).contiguous(memory_format=torch.channels_last) for _ in range(6)]
    return maps, {
        "ternary": lambda x: of_ternary(x, planes, scale, padding=1),
        "stacked": lambda x: of_stacked(x, bank, index, scale, padding=1),
        "binary": lambda x: of_binary(x, weight, scale, padding=1),
        "packed": lambda x: of_binary(bitpack(x, backend="triton"), weight, padding=1, output="int32"),
    }


@gpu
@pytest.mark.parametrize("op", ["ternary", "stacked", "binary", "packed"])
def test_runs_graphs_and_streams_give_the_same_bits(op):
    maps, functions = calls()
    call = functions[op]
    alone = [call(x) for x in maps]
    assert all(torch.equal(call(maps[0]), alone[0]) for _ in range(20))
    x = maps[0].clone(memory_format=torch.channels_last)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = call(x)
    for i in (*range(len(maps)), 0):
        x.copy_(maps[i])
        graph.replay()
        assert torch.equal(out, alone[i]), i
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    together = []
    for turn in range(24):
        with torch.cuda.stream(streams[turn % 2]):
            together.append(call(maps[turn % len(maps)]))
    torch.cuda.synchronize()
    assert all(torch.equal(result, alone[turn % len(maps)]) for turn, result in enumerate(together))


@gpu
@pytest.mark.full
def test_offsets_beyond_32_bits():
    """The last image of a batch of more than 2³¹ elements, alone and in its batch."""
    input = torch.empty(1100, 8, 512, 512, dtype=BF16, device="cuda", memory_format=torch.channels_last).normal_()
    assert input.numel() > 2**31
    last = input[-1:].clone(memory_format=torch.channels_last)
    planes = ternary_planes(torch.randint(-1, 2, (8, 8, 3, 3), device="cuda"))
    with torch.no_grad():
        assert torch.equal(of_ternary(input, planes, padding=1)[-1:], of_ternary(last, planes, padding=1))


@gpu
@pytest.mark.parametrize("tf32", [False, True], ids=["full float32", "TF32"])
def test_automatic_choice_passes_its_self_checks(tf32):
    with torch.backends.cudnn.flags(allow_tf32=tf32):
        for check in (
            ternary_conv2d_selfcheck.triton(a_ternary(dtype=FULL if tf32 else BF16).problem),
            stacked_binary_conv2d_selfcheck.triton(a_stacked(dtype=FULL if tf32 else BF16).problem),
            binary_conv2d_selfcheck.triton(a_binary(planes=1).problem),
        ):
            assert selfcheck.against(check) is None, check.variant
