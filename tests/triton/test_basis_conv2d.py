"""The Triton kernels of ``basis_conv2d`` under Triton's interpreter, against the same checks as every backend."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from basisconv_kernels import testing
from basisconv_kernels.core.problem import Conv2dProblem
from basisconv_kernels.testing import Case

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from basisconv_kernels.triton_kernels import configs
from tests.triton import interpreted, rows

pytestmark = pytest.mark.xdist_group("triton_interpreter")  # one interpreting process, not one a worker

HALF, FULL = torch.float16, torch.float32
# The ordinary run: each path, each kind of geometry, layout and epilogue in one dtype at least; the long run has all.
SHORT = {
    HALF: (
        "odd_sizes", "past_a_block", "one_basis_filter", "one_channel_channels_last", "one_output", "empty_batch",
        "even_kernel", "stride", "stride_past_kernel", "stride_and_dilation", "asymmetric_padding",
        "padding_past_kernel", "one_pixel", "groups", "channels_last_stride", "offset", "transposed",
        "mixed_formats", "residual_relu", "whole_epilogue",
    ),
    FULL: ("pointwise", "groups_compact", "sliced_channels_last", "expanded", "bias", "precise"),
}  # fmt: skip
SHORT_GRADIENTS = {
    HALF: ("whole_epilogue", "stride_and_dilation", "groups"),
    FULL: ("residual_relu", "sliced_channels_last", "empty_batch"),
}


def cases(short):
    """All cases in both dtypes; those that are not among the short ones belong to the long run."""
    return [
        pytest.param(
            case.at(dtype=dtype), id=f"{case.name}-{name}", marks=[] if case.name in some else [pytest.mark.full]
        )
        for case in testing.CASES
        for (dtype, some), name in zip(short.items(), ("float16", "float32"), strict=True)
    ]


def a_case(sizes, **flags):
    """``sizes`` reads ``N C H W Q K R S``."""
    N, C, H, W, Q, K, R, S = map(int, sizes.split())
    flags = {"channels_last": True, "bias": True, "residual": True, **flags}
    return Case("made here", "", Conv2dProblem(N=N, C=C, H=H, W=W, Q=Q, K=K, R=R, S=S, **flags))


@pytest.mark.parametrize("case", cases(SHORT))
def test_result(interpreter, case):
    interpreter(interpreted.check, case)


@pytest.mark.parametrize("case", cases(SHORT_GRADIENTS))
def test_gradients(interpreter, case):
    interpreter(interpreted.check_gradients, case)


@pytest.mark.parametrize("name", ["whole_epilogue", pytest.param("full_vectors", marks=pytest.mark.full)])
def test_offsets_of_64_bits(interpreter, name):
    interpreter(interpreted.check_wide, testing.case(name).at(dtype=HALF))


def test_gradients_of_several_tiles_and_odd_sizes(interpreter):
    """The small call of the sanitizers, with an upstream gradient in NCHW beside a channels_last result."""
    case = a_case("2 24 9 11 16 40 3 3", padding=(1, 1, 1, 1), activation="relu", dtype=HALF)
    interpreter(interpreted.check_gradients, case)


# What the descriptor path has of its own: shifted boxes, planes of two parities, dilation, channels past a block.
DESCRIPTORS = {
    "tails": a_case("2 24 6 13 20 37 3 2", padding=(0, 2, 3, 1), dilation=(2, 1), activation="relu6"),
    "a 7×7 filter": a_case("1 8 9 7 5 10 7 7", padding=(3, 3, 3, 3)),
    "stride 2": a_case("3 16 8 10 5 70 3 3", padding=(1, 2, 2, 1), stride=(2, 2), activation="relu"),
    "stride 2, C not a power of two": a_case("1 48 6 8 17 9 3 3", padding=(1, 1, 1, 1), stride=(2, 2)),
    "stride 2, dilated, padding past the filter": a_case(
        "1 32 8 10 17 7 3 2", padding=(3, 2, 4, 0), dilation=(3, 2), stride=(2, 2)
    ),
    "nchw in, nchw out": a_case("2 16 5 7 6 9 3 3", padding=(1, 1, 1, 1), channels_last=False),
}


@pytest.mark.parametrize("name", DESCRIPTORS)
def test_descriptors(interpreter, name):
    case = DESCRIPTORS[name].at(dtype=HALF)
    p = case.problem
    assert configs.against_descriptors(configs.HALF, p.C, p.Q, (p.H, p.W), p.stride, 1, (9, 0)) is None
    interpreter(interpreted.check, case)


# The wide ones, 16-bit: each differs in its tap loop, its blocks or its arithmetic. All the others in the long run.
SHORT_ROWS = {
    "descriptors half 128×128×64×64 4 warps 3 stages",
    "descriptors2 half 128×128×64×64 4 warps 3 stages",
    "descriptors half 16×256×64×64 4 warps 5 stages",
    "descriptors tf32 64×64×32×32 4 warps 4 stages",
    "pointers float32 32×64×16×32 4 warps 2 stages",
}


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=str(row), marks=[] if str(row) in SHORT_ROWS else [pytest.mark.full]) for row in rows.ROWS],
)
def test_every_row_of_the_tile_table(interpreter, row):
    interpreter(interpreted.check_row, row, HALF if row.arithmetic == configs.HALF else FULL)


def test_the_short_rows_are_rows():
    assert {str(row) for row in rows.ROWS} >= SHORT_ROWS


@pytest.mark.parametrize("name", ["tails", "stride 2"])
def test_calls_of_one_kind_share_a_plan_that_keeps_no_tensor(interpreter, name):
    assert interpreter(interpreted.kept_by_plans, DESCRIPTORS[name].at(dtype=HALF)) == (1, 0)
    assert interpreter(interpreted.kept_by_plans, testing.case("whole_epilogue").at(dtype=FULL)) == (1, 0)


def test_the_sweep_of_tiles_times_what_is_right(interpreter):
    layer = interpreted.Float16(64, 64, 4, 1, 1)
    found = interpreter(interpreted.sweep_of_tiles, layer, False)
    assert found["chosen"] in found["us"]
    assert len(found["us"]) >= 6
    assert found["refused"] == {}
    assert interpreter(interpreted.sweep_compiled, layer) >= len(found["us"])
    with pytest.raises(AssertionError, match=r"wrong: .*µs of all: "):
        interpreter(interpreted.sweep_of_tiles, layer, True)


@pytest.mark.parametrize(
    "sizes", ["1 3 5 6 300 40 1 1", "1 2 5 4 24 150 3 3"], ids=["many basis filters", "many outputs"]
)
def test_basis_filters_in_parts(interpreter, sizes):
    """More basis filters than one program holds, and groups of them with more outputs than a chunk."""
    groups = 2 if sizes.endswith("3 3") else 1
    interpreter(interpreted.check, a_case(sizes, groups=groups, dtype=HALF))


@pytest.mark.parametrize(
    "name", ["whole_epilogue", *(pytest.param(n, marks=pytest.mark.full) for n in ("stride", "groups"))]
)
def test_nan_and_infinity_spread_as_in_plain_pytorch(interpreter, name):
    for what, found, expected in interpreter(interpreted.nan_maps, testing.case(name).at(dtype=FULL)):
        assert torch.equal(found, expected), what


@pytest.mark.parametrize("name", ["groups_compact", "one_output_channels_last"])
def test_opcheck(interpreter, name):
    assert set(interpreter(interpreted.opcheck, testing.case(name).at(dtype=FULL)).values()) == {"SUCCESS"}


def test_one_graph_serves_all_sizes_and_trains(interpreter):
    assert interpreter(interpreted.compiled, testing.case("bias").at(dtype=FULL)) == 1


def test_gradients_are_the_same_twice_and_a_frozen_basis_has_none(interpreter):
    assert interpreter(interpreted.same_gradients_twice, testing.case("whole_epilogue").at(dtype=HALF))


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_the_self_check_tells_right_from_wrong(interpreter, wrong):
    problem = Conv2dProblem(C=16, Q=5, K=9, padding=(1, 1, 1, 1), dtype=HALF, channels_last=True)
    verdict = interpreter(interpreted.self_check, problem, wrong)
    assert ("first mismatch" in verdict) if wrong else verdict is None


def test_what_it_cannot_run_is_refused_with_all_reasons(interpreter):
    message = interpreter(interpreted.refused, testing.case("odd_sizes").at(dtype=torch.float64))
    assert message.startswith("basis_conv2d: backend 'triton' cannot run [5→7→13 3×3 float64 cpu")
    assert "triton: has no float64 kernel" in message
    assert "reference: can run" in message
