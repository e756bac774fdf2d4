"""The Triton kernels of bits under Triton's interpreter: ternary, stacked and binary convolutions, and packing."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from basisconv_kernels import testing
from basisconv_kernels.core.problem import Conv2dProblem
from basisconv_kernels.ops import (
    binary_conv2d,
    binary_conv2d_selfcheck,
    bitpack,
    stacked_binary_conv2d,
    stacked_binary_conv2d_selfcheck,
    ternary_conv2d,
    ternary_conv2d_selfcheck,
)
from basisconv_kernels.reference.binary_conv2d_problem import BinaryConv2dProblem
from basisconv_kernels.reference.stacked_binary_conv2d_problem import StackedBinaryConv2dProblem
from basisconv_kernels.reference.ternary_conv2d_problem import TernaryConv2dProblem
from basisconv_kernels.testing.ternary_conv2d import TERNARY_CASES

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from basisconv_kernels.triton_kernels import bits_configs, configs
from tests.triton import interpreted_bits

interpreting = pytest.mark.xdist_group("triton_interpreter")  # one interpreting process, not one a worker
HALF, FULL = torch.float16, torch.float32
TERNARY = {case.name: case for case in TERNARY_CASES}
# The ordinary run has each kind of geometry, layout, operand and epilogue in one dtype at least; the long run has all.
SHORT = {
    "ternary_conv2d": {
        HALF: ("odd_sizes", "past_a_word", "channels_last", "two_scales", "empty", "empty_batch", "linear",
               "even_kernel", "stride_and_dilation", "padding_past_kernel", "map_below_kernel", "groups", "offset",
               "transposed", "wide_map"),
        FULL: ("no_scale", "two_scales", "whole_word", "stride_past_kernel", "depthwise", "sliced", "expanded"),
    },
    "stacked_binary_conv2d": {
        HALF: ("odd_sizes", "past_a_block", "four_splits", "one_channel_a_split", "one_filter", "empty_batch",
               "stride_and_dilation", "padding_past_kernel", "groups", "channels_last_words", "offset", "relu",
               "binary_weights", "signs", "packed_signs", "codes"),
        FULL: ("more_than_outputs", "groups_expanded", "channels_last", "transposed", "relu6"),
    },
    "binary_conv2d": {
        HALF: ("odd_sizes", "empty_batch", "padding_plus_one", "packed_groups", "packed_plus_one", "codes_groups"),
        FULL: ("channels_last",),
    },
    "bitpack": {
        HALF: ("odd_sizes", "full_words", "empty_batch", "sliced_channels_last"),
        FULL: ("one_channel", "transposed", "expanded"),
    },
}  # fmt: skip
CASES = {
    "ternary_conv2d": TERNARY_CASES,
    "stacked_binary_conv2d": testing.STACKED_CASES,
    "binary_conv2d": testing.BINARY_CASES,
    "bitpack": tuple(case for case in testing.BINARY_CASES if not case.problem.planes),
}


def cases():
    """All cases of all ops in both dtypes; those that are not among the short ones belong to the long run."""
    return [
        pytest.param(op, case.at(dtype=dtype), id=f"{op}-{case.name}-{str(dtype).removeprefix('torch.')}",
                     marks=[] if case.name in SHORT[op][dtype] else [pytest.mark.full])
        for op, found in CASES.items()
        for case in found
        for dtype in (HALF, FULL)
    ]  # fmt: skip


@interpreting
@pytest.mark.parametrize(("op", "case"), cases())
def test_result(interpreter, op, case):
    interpreter(interpreted_bits.check, op, case)


def test_the_short_cases_exist():
    for op, by_dtype in SHORT.items():
        assert {case.name for case in CASES[op]} >= {name for names in by_dtype.values() for name in names}


@interpreting
@pytest.mark.parametrize("name", ["two_scales", pytest.param("groups", marks=pytest.mark.full)])
def test_gradients(interpreter, name):
    interpreter(interpreted_bits.check_ternary_gradients, TERNARY[name].at(dtype=FULL))


@interpreting
@pytest.mark.parametrize(
    ("op", "drawn"),
    [
        ("ternary_conv2d", "cases"),
        ("stacked_binary_conv2d", "problems"),
        pytest.param("binary_conv2d", "drawn", marks=pytest.mark.full),  # each in all of its outputs, half a minute
    ],
)
def test_any_geometry(interpreter, op, drawn, geometries):
    interpreter(interpreted_bits.any_geometry, op, drawn, 15 if geometries > 150 else 4)


@interpreting
@pytest.mark.parametrize(
    ("op", "case"),
    [("ternary_conv2d", TERNARY["groups"]), ("stacked_binary_conv2d", testing.stacked_case("four_splits")),
     ("binary_conv2d", testing.binary_case("packed_groups")), ("bitpack", testing.binary_case("odd_sizes"))],
    ids=["ternary", "stacked", "binary", "bitpack"],
)  # fmt: skip
def test_offsets_of_64_bits(interpreter, op, case):
    interpreter(interpreted_bits.check_wide, op, case.at(dtype=HALF))


ROWS = sorted({row for rows in bits_configs.HOPPER_PRODUCTS.values() for row in rows}
              | {row for rows in bits_configs.PRODUCTS.values() for row in rows})  # fmt: skip


@interpreting
@pytest.mark.parametrize("tile", [
    pytest.param(row, id="×".join(map(str, row)), marks=[] if row.BM == row.BL == 128 else [pytest.mark.full])
    for row in ROWS
])  # fmt: skip
def test_every_row_of_the_table_of_tiles(interpreter, tile):
    """More filters, channels and pixels than a tile has."""
    problem = TernaryConv2dProblem(
        N=1, C=tile.BK + 3, H=3, W=tile.BM // 2, K=tile.BL + 5, R=1, S=3, padding=(0, 0, 1, 1), dtype=HALF, bias=True,
        channels_last=True,
    )  # fmt: skip
    case = interpreted_bits.ternary.TernaryCase("made here", "", problem)
    interpreter(interpreted_bits.check_tile, "ternary_conv2d", case, tile)


@interpreting
@pytest.mark.parametrize("planes", [1, 3], ids=["signs", "codes"])
def test_packed_input_of_ternary_filters_gives_exact_sums(interpreter, planes):
    found, expected = interpreter(interpreted_bits.packed_input_of_ternary, planes)
    assert torch.equal(found.double(), expected)


@interpreting
def test_sums_too_large_for_products_in_float32_are_counted(interpreter):
    found, expected = interpreter(interpreted_bits.large_binary_sums)
    assert torch.equal(found, expected)


SMALL = {"K": 9, "R": 1, "S": 2, "dtype": HALF, "channels_last": True}
CHECKED = {
    "ternary_conv2d": (TernaryConv2dProblem(C=16, **SMALL),),
    "stacked_binary_conv2d": (StackedBinaryConv2dProblem(C=16, n=4, splits=2, **SMALL),),
    "binary_conv2d": (BinaryConv2dProblem(C=16, **SMALL),),
    "bitpack": (HALF, "cpu"),
}


@interpreting
@pytest.mark.parametrize("op", CHECKED)
@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_the_self_check_tells_right_from_wrong(interpreter, op, wrong, request):
    if op == "bitpack" and not wrong and not request.config.getoption("--full"):
        pytest.skip("a minute and a half under the interpreter: in the long run")
    verdict = interpreter(interpreted_bits.self_check, op, CHECKED[op], wrong)
    assert bool(verdict) == wrong, verdict


@interpreting
def test_one_graph_serves_all_sizes_and_trains(interpreter):
    assert interpreter(interpreted_bits.compiled) == 1


@interpreting
def test_opcheck(interpreter):
    found = interpreter(interpreted_bits.opcheck)
    assert len(found) == 4
    assert all(set(verdicts.values()) == {"SUCCESS"} for verdicts in found.values()), found


@interpreting
def test_flops_are_those_of_the_convolution(interpreter):
    *ours, plain = interpreter(interpreted_bits.counted_flops)
    assert ours == [plain] * 3


@interpreting
def test_what_cannot_run_says_why(interpreter):
    assert "has no float64 kernel" in interpreter(interpreted_bits.refusal, torch.float64)
    assert "bfloat16 wrongly" in interpreter(interpreted_bits.refusal, torch.bfloat16)


# --- the choice, without a GPU ----------------------------------------------------------------------------------------

ON_A_GPU = {"device": "cuda", "dtype": torch.bfloat16, "channels_last": True, "padding": (1, 1, 1, 1)}
PROBLEMS = {
    ternary_conv2d: TernaryConv2dProblem(C=64, K=64, **ON_A_GPU),
    stacked_binary_conv2d: StackedBinaryConv2dProblem(C=64, K=64, n=16, splits=2, **ON_A_GPU),
    binary_conv2d: BinaryConv2dProblem(C=64, K=64, planes=1, **ON_A_GPU),
    bitpack: bitpack.BitpackProblem(torch.bfloat16, "cuda"),
}


@pytest.mark.parametrize("module", PROBLEMS, ids=lambda module: module.OP)
def test_it_stands_before_plain_pytorch_and_is_checked_first(module):
    *_, ours, plain = module.CANDIDATES
    assert (ours.name, plain.name) == ("triton", "reference")
    assert not ours.supports(PROBLEMS[module])
    check = interpreted_bits.OPS[module.OP][2].triton(PROBLEMS[module])
    assert check.variant.startswith(f"{module.OP} triton")
    assert ours.supports(Conv2dProblem(C=8, Q=4, K=8, device="cpu")) == ["runs on CUDA devices, the tensors are on cpu"]


def test_what_runs_other_code_is_another_variant():
    of = stacked_binary_conv2d_selfcheck.triton
    problem = PROBLEMS[stacked_binary_conv2d]
    changed = [
        StackedBinaryConv2dProblem(**{**vars(problem), **changes})
        for changes in ({}, {"splits": 4}, {"C": 60}, {"K": 80}, {"stride": (2, 1)}, {"groups": 2}, {"mode": "signs"},
                        {"channels_last": False}, {"dtype": torch.float16}, {"mode": "signs", "planes": 1},
                        {"mode": "codes", "planes": 2})
    ]  # fmt: skip
    assert len({of(one).variant for one in changed}) == len(changed)
    two = TernaryConv2dProblem(C=64, K=64, scales="two", **ON_A_GPU)
    assert ternary_conv2d_selfcheck.triton(two).variant.startswith("ternary_conv2d triton bfloat16 two scales ")
    assert (
        "2-bit codes"
        in binary_conv2d_selfcheck.triton(BinaryConv2dProblem(C=64, K=64, planes=2, unsigned=True, **ON_A_GPU)).variant
    )


def test_tf32_is_a_variant_of_its_own(monkeypatch):
    problem = TernaryConv2dProblem(C=64, K=64, **{**ON_A_GPU, "dtype": FULL})
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert "TF32" not in ternary_conv2d_selfcheck.triton(problem).variant
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert "TF32" in ternary_conv2d_selfcheck.triton(problem).variant


def test_sums_beyond_float32_are_refused_by_name():
    large = StackedBinaryConv2dProblem(C=2**21, K=8, n=4, splits=2, mode="signs", **ON_A_GPU)
    told = stacked_binary_conv2d.triton.supports(large)
    assert told == ["adds up whole numbers below 16777216, these sums reach 18874368"]


def test_tiles_follow_problem_and_device():
    hopper, ampere = configs.HOPPER, configs.HOPPER._replace(capability=(8, 0))
    tile = bits_configs.product_tile
    assert tile(configs.HALF, 256, 256, 32 * 56 * 56, hopper)[:3] == (128, 128, 64)
    assert tile(configs.HALF, 256, 256, 32 * 14 * 14, hopper)[:3] == (64, 64, 64)
    assert tile(configs.HALF, 512, 512, 32 * 7 * 7, hopper)[:3] == (32, 64, 64)
    assert tile(configs.HALF, 64, 64, 32 * 56 * 56, hopper)[:3] == (128, 64, 64)
    assert tile(configs.HALF, 256, 256, 32 * 56 * 56, ampere)[:3] == (64, 128, 64)
    assert tile(configs.HALF, 3, 64, 32 * 56 * 56, hopper).BK == 32
    assert tile(bits_configs.BITS, 256, 256, 32 * 56 * 56, hopper)[:2] == (32, 64)
    assert bits_configs.count_tile(64, 32 * 56 * 56, hopper).BL == 64
    assert bits_configs.count_tile(16, 32 * 56 * 56, hopper).BL == 32
    most = [bits_configs.most_sums(*of) for of in ((16, 32, False, True), (16, 8, False, True), (8, 32, True, True))]
    assert most == [128 * 128, 64 * 64, 32 * 64]
    assert tile(configs.HALF, 64, 64, 32 * 56 * 56, hopper, most[1])[:2] == (64, 64)
    assert tile(configs.HALF, 64, 64, 32 * 56 * 56, hopper, most[2])[:3] == (32, 64, 32)
    assert [bits_configs.unit(48, parts) for parts in (1, 2)] == [32, 16]
