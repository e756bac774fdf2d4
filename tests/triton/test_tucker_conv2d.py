"""``tucker_conv2d`` in Triton under Triton's interpreter: in one pass and in two, against the usual checks."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from basisconv_kernels import testing
from basisconv_kernels.core.problem import TuckerConv2dProblem
from basisconv_kernels.ops import tucker_conv2d_model as model

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from basisconv_kernels.triton_kernels import configs
from tests.triton import ahead_of_time, interpreted_tucker

interpreting = pytest.mark.xdist_group("triton_interpreter")  # one interpreting process, not one a worker
HALF, FULL = torch.float16, torch.float32
# The ordinary run has each kind of geometry, layout and epilogue in one way at least; the long run has all.
ONE_PASS = {
    HALF: ("odd_sizes", "past_a_block", "empty_batch", "pointwise", "even_kernel", "stride_past_kernel", "dilation",
           "padding_past_kernel", "one_pixel_channels_last", "offset", "sliced_channels_last", "whole_epilogue"),
    FULL: ("one_channel", "transposed", "expanded", "residual_relu"),
}  # fmt: skip
TWO_PASSES = {HALF: ("channels_last_stride", "mixed_formats"), FULL: ("precise", "map_below_kernel")}


def cases(short):
    return [
        pytest.param(
            case.at(dtype=dtype), id=f"{case.name}-{name}", marks=[] if case.name in some else [pytest.mark.full]
        )
        for case in testing.TUCKER_CASES
        for (dtype, some), name in zip(short.items(), ("float16", "float32"), strict=True)
    ]


@interpreting
@pytest.mark.parametrize("case", cases(ONE_PASS))
def test_one_pass(interpreter, case):
    interpreter(interpreted_tucker.check, case, True)


@interpreting
@pytest.mark.parametrize("case", cases(TWO_PASSES))
def test_two_passes(interpreter, case):
    interpreter(interpreted_tucker.check, case, False)


@interpreting
@pytest.mark.parametrize("one", [True, False], ids=["one pass", "two passes"])
@pytest.mark.parametrize("name", ["whole_epilogue", pytest.param("channels_last_stride", marks=pytest.mark.full)])
def test_gradients(interpreter, name, one):
    interpreter(interpreted_tucker.check, testing.tucker_case(name).at(dtype=HALF), one, True)


@interpreting
@pytest.mark.parametrize("C", [24, 200], ids=["fewer channels than a block", "several blocks of channels"])
def test_more_pixels_channels_and_outputs_than_a_tile(interpreter, C):
    problem = TuckerConv2dProblem(
        N=1, C=C, H=9, W=11, rank_in=33, Q=37, K=70, R=1, S=2, padding=(0, 0, 1, 0), dtype=HALF, channels_last=True,
        bias=True,
    )  # fmt: skip
    interpreter(interpreted_tucker.check, testing.TuckerCase("made here", "", problem), True)


@interpreting
def test_nan_and_infinity_spread_as_in_plain_pytorch(interpreter):
    """Not into the padding: M of a pixel outside is zero, whatever u_in holds."""
    for value, found, expected in interpreter(interpreted_tucker.nan_maps, testing.tucker_case("whole_epilogue")):
        assert torch.equal(found, expected), value


@interpreting
@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_the_self_check_tells_right_from_wrong(interpreter, wrong):
    problem = TuckerConv2dProblem(C=16, rank_in=4, Q=5, K=9, padding=(1, 1, 1, 1), dtype=HALF, channels_last=True)
    verdict = interpreter(interpreted_tucker.self_check, problem, wrong)
    assert ("first mismatch" in verdict) if wrong else verdict is None


@interpreting
@pytest.mark.parametrize("one", [True, pytest.param(False, marks=pytest.mark.full)], ids=["one pass", "two passes"])
def test_one_graph_serves_all_sizes_and_trains(interpreter, one):
    assert interpreter(interpreted_tucker.compiled, testing.tucker_case("rank_out_one").at(dtype=FULL), one) == 1


@interpreting
def test_opcheck(interpreter):
    assert set(interpreter(interpreted_tucker.opcheck, testing.tucker_case("whole_epilogue")).values()) == {"SUCCESS"}


# --- compiled ahead of time -------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(
    ("arithmetic", "capability"),
    [
        (configs.HALF, 90),
        (configs.HALF, 80),
        pytest.param(configs.HALF, 89, marks=pytest.mark.full),
        pytest.param(configs.TF32, 80, marks=pytest.mark.full),
        pytest.param(configs.TF32, 90, marks=pytest.mark.full),
        pytest.param(configs.FLOAT32, 90, marks=pytest.mark.full),
    ],
)
def test_one_pass_compiles_at_the_largest_ranks(cache, arithmetic, capability):
    made = ahead_of_time.tucker_one_pass(arithmetic, capability)
    assert made.stack == 0
    assert not {"LDL", "STL"} & set(made.instructions)
    assert made.shared <= ahead_of_time.SHARED[capability]
    assert made.registers * 128 <= ahead_of_time.REGISTERS
    if arithmetic == configs.FLOAT32:
        assert made.instructions["FFMA"] > 0
    else:
        assert {"HGMMA", "HMMA"} & set(made.instructions)
        assert "HGMMA" in made.instructions or (arithmetic, capability) != (configs.HALF, 90)


# --- the choice -------------------------------------------------------------------------------------------------------


def chain(C, rank_in, Q, K, R=3, stride=1, **flags):
    flags = {"dtype": torch.bfloat16, "device": "cuda", "channels_last": True, **flags}
    return TuckerConv2dProblem(C=C, rank_in=rank_in, Q=Q, K=K, R=R, S=R, stride=(stride, stride), **flags)


@pytest.mark.parametrize("problem", [chain(64, 16, 16, 64, R=1), chain(512, 16, 16, 512, stride=3)], ids=str)
def test_one_pass_where_no_pixel_is_mapped_twice(problem):
    assert model.one_pass_pays(problem)


@pytest.mark.parametrize(
    "problem",
    [chain(64, 16, 16, 64), chain(256, 64, 64, 256), chain(64, 65, 16, 64, R=1),
     chain(64, 16, 16, 64, R=1, precise=True)],
    ids=str,
)  # fmt: skip
def test_two_passes_where_taps_overlap_or_it_does_not_fit(problem):
    assert not model.one_pass_pays(problem)


def test_what_cannot_run_in_one_pass_says_why():
    assert configs.against_one_pass(configs.HALF, 64, 64, False) is None
    assert configs.against_one_pass(configs.HALF, 65, 1, False) == "a rank above 64"
    assert configs.against_one_pass(configs.FLOAT32, 33, 1, False) == "a rank above 32"
    assert configs.against_one_pass(configs.HALF, 16, 16, True) == "M and Z in float32"
