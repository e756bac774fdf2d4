"""What can be said about the choice on a GPU without one: the model, the tiles, the variants to be checked."""

from __future__ import annotations

import pytest
import torch

from basisconv_kernels import diagnostics
from basisconv_kernels.core import registry, selfcheck, tuning
from basisconv_kernels.core.problem import Conv2dProblem
from basisconv_kernels.ops import basis_conv2d as op
from basisconv_kernels.ops import basis_conv2d_model as model
from basisconv_kernels.ops import basis_conv2d_selfcheck
from basisconv_kernels.triton_kernels import configs

HALF, TF32, FLOAT32 = configs.HALF, configs.TF32, configs.FLOAT32

pytestmark = pytest.mark.usefixtures("cache")  # no table, not even of the package: the model speaks alone


def problem(C, Q, K, **flags):
    flags = {"dtype": torch.bfloat16, "device": "cuda", "padding": (1, 1, 1, 1), "channels_last": True, **flags}
    return Conv2dProblem(C=C, Q=Q, K=K, **flags)


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(64, 16, 64), (64, 32, 64), (128, 32, 128), (128, 64, 128)])
def test_fusing_pays_where_the_maps_between_cost_much(sizes):
    assert model.slower_than_plain(problem(*sizes)) == {}


def test_what_hoppers_kernel_does_not_take_is_predicted_slow_there():
    assert "cuda" not in model.slower_than_plain(problem(128, 64, 128))
    assert "cuda" in model.slower_than_plain(problem(128, 64, 128, channels_last=False))
    assert model.cuda(problem(256, 129, 256)) > 2 * model.cuda(problem(256, 128, 256))


@pytest.mark.parametrize(
    ("sizes", "flags"),
    [
        ((512, 256, 512), {}),  # all of Q leaves no room for pixels: the input is fetched too often
        ((64, 300, 64), {}),  # in parts
        ((64, 16, 64), {"dtype": torch.float32, "precise": True}),  # no matrix instructions
    ],
)
def test_what_is_predicted_slower_is_passed_over_and_said(sizes, flags):
    slower = model.slower_than_plain(problem(*sizes, **flags))
    assert slower["triton"].startswith("predicted slower than two library kernels, ")


def test_the_model_says_nothing_off_the_gpu_and_where_something_was_measured(monkeypatch):
    slow = problem(512, 256, 512)
    assert model.slower_than_plain(problem(512, 256, 512, device="cpu")) == {}
    assert model.predicted_slower(problem(512, 256, 512, dtype=torch.float64)) == {}
    assert set(model.slower_than_plain(slow)) == {"cuda", "triton"}
    monkeypatch.setattr(tuning, "entries_for", lambda *_: [{"ms": {"cuda": {}}}])
    monkeypatch.setattr(tuning, "slower", lambda *_: {})
    assert set(model.slower_than_plain(slow)) == {"triton"}, "of Triton nothing was measured"


def test_more_work_is_never_predicted_to_take_less():
    before = both = (0.0, 0.0)
    for Q in (8, 16, 17, 32, 64, 100, 128, 256, 300, 700):
        both = model.triton(problem(64, Q, 64), HALF), model.cuda(problem(64, Q, 64))
        assert both >= before
        assert both[1] >= before[1]
        before = both


# --- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [configs.POINTERS, configs.DESCRIPTORS], ids=["pointers", "descriptors"])
def test_rows_are_sound(table):
    for arithmetic, rows in table.items():
        for BQ in {row.BQ for row in rows}:
            pixels = [row.BM for row in rows if BQ == row.BQ]
            assert pixels == sorted(set(pixels), reverse=True), (arithmetic, BQ)
        for row in rows:
            assert all(side & (side - 1) == 0 and side >= configs.SMALLEST for side in row[:4])
            assert row.warps <= configs.MOST_WARPS


@pytest.mark.parametrize("arithmetic", [HALF, TF32, FLOAT32])
@pytest.mark.parametrize("Q", [1, 16, 17, 64, 100, 256, 257, 1000])
def test_every_q_has_a_tile(arithmetic, Q):
    for pixels in (1, 10**6):
        tile, split = configs.pointer_tile(arithmetic, Q, 40, 70, pixels, configs.HOPPER)
        assert split == (tile.BQ < Q)
        assert tile.BK <= 128
        if configs.against_descriptors(arithmetic, 40, Q, (8, 8), (1, 1), 1, (9, 0)) is None:
            assert configs.descriptor_tile(arithmetic, Q, 40, 70, pixels, 1, configs.HOPPER).BQ >= Q


def test_a_tile_fits_its_problem_and_its_device():
    small = configs.HOPPER._replace(shared=48 * 1024)
    wide = configs.Tile(64, 64, 64, 64, 4, 4)
    assert configs.fitted(wide, 256, 256, HALF, configs.HOPPER) == wide
    assert configs.fitted(wide, 256, 256, HALF, small).stages == 3
    assert configs.fitted(wide, 20, 3, HALF, configs.HOPPER) == wide._replace(BK=32, BL=16)


@pytest.mark.parametrize("C", [16, 48, 64, 80, 128])
def test_at_stride_two_no_block_of_channels_reaches_into_the_other_plane(C):
    assert C % configs.descriptor_tile(HALF, 16, C, 64, 10**6, 2, configs.HOPPER).BK == 0


@pytest.mark.parametrize(
    ("BM", "map_size", "box"),
    [
        (128, (32, 56, 56), (2, 8, 8)),
        (128, (32, 28, 28), (8, 4, 4)),
        (128, (32, 14, 14), (32, 2, 2)),
        (64, (1, 8, 8), (1, 8, 8)),
        (64, (1, 1, 200), (1, 1, 64)),
    ],
)
def test_boxes_waste_nothing_where_powers_of_two_divide_the_map(BM, map_size, box):
    assert configs.box(BM, *map_size) == box


def test_a_box_always_has_its_pixels():
    for N, OH, OW in ((1, 1, 1), (3, 7, 7), (33, 13, 57)):
        BN, TH, TW = configs.box(64, N, OH, OW)
        assert BN * TH * TW == 64


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"capability": (8, 9)}, "no tensor memory unit"),
        ({"arithmetic": FLOAT32}, "exact float32"),
        ({"arithmetic": TF32, "capability": (10, 0)}, "TF32 through descriptors spills"),
        ({"groups": 2}, "the basis has groups"),
        ({"Q": 257}, "more than 256 basis filters"),
        ({"C": 20}, "C is no multiple of 8"),
        ({"stride": (1, 2)}, "a stride that is neither 1 nor 2"),
        ({"stride": (2, 2), "C": 24}, "stride 2 with C no multiple of 16"),
        ({"stride": (2, 2), "map_size": (7, 8)}, "stride 2 on an odd map"),
    ],
)
def test_what_has_no_descriptor_path_says_why(changed, reason):
    able = {
        "arithmetic": HALF,
        "C": 64,
        "Q": 16,
        "map_size": (8, 8),
        "stride": (1, 1),
        "groups": 1,
        "capability": (9, 0),
    }
    assert configs.against_descriptors(**able) is None
    assert configs.against_descriptors(**{**able, **changed}).startswith(reason)


def test_sums_are_split_into_parts_that_cover_all_tiles():
    for blocks, tiles in ((1, 1), (1, 1000), (7, 13), (5000, 40)):
        parts, each = configs.splits(blocks, tiles, configs.HOPPER)
        assert (parts - 1) * each < tiles <= parts * each


def test_gradients_stay_with_cudnn_where_there_is_one():
    assert not configs.own_gradients(1, True)
    assert configs.own_gradients(1, False)
    assert not configs.own_gradients(2, False)


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that is not there, on which nothing was checked; checks pass unless ``wrong`` says so."""
    wrong = []

    def run(*_):
        if wrong:
            raise AssertionError("got 4, expected 5")

    facts = {"device": {"name": "Abacus", "capability": "9.0"}, "driver": "1", "packages": {}}
    monkeypatch.setenv("BASISCONV_CACHE", str(tmp_path))
    monkeypatch.setattr(registry, "absent", lambda name: None)
    monkeypatch.setattr(selfcheck, "facts", lambda: facts)
    monkeypatch.setattr(selfcheck, "_here", {})
    monkeypatch.setattr(basis_conv2d_selfcheck, "against_reference", run)
    return wrong


def explained(p):
    return diagnostics.explain("basis_conv2d", Conv2dProblem(**{**vars(p), "N": 8, "H": 56, "W": 56}), None)


def chosen(p):
    return registry.select(op.OP, op.CANDIDATES, p, None, op.slower_than_plain(p)).name


NOBODY_LOOKED = {"cuda": selfcheck.NOT_YET, "triton": selfcheck.NOT_YET}


def test_the_first_is_chosen_after_its_check_and_explain_runs_none(gpu):
    p = problem(64, 16, 64)
    assert explained(p)["self_checks"] == NOBODY_LOOKED
    assert chosen(p) == explained(p)["chosen"] == "cuda"
    assert explained(p)["self_checks"] == {**NOBODY_LOOKED, "cuda": diagnostics.PASSED}


def test_what_cuda_does_not_take_goes_to_triton(gpu, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    p = problem(64, 16, 64, dtype=torch.float32)
    assert chosen(p) == explained(p)["chosen"] == "triton"
    assert explained(p)["self_checks"] == {"triton": diagnostics.PASSED}


def test_a_failed_check_leads_to_plain_pytorch_and_explain_says_why(gpu):
    gpu.append("wrong")
    p = problem(64, 16, 64)
    assert chosen(p) == explained(p)["chosen"] == "reference"
    for backend in ("cuda", "triton"):
        assert "failed its self-check" in explained(p)["candidates"][backend][0]


def test_what_should_be_slower_is_not_even_checked(gpu):
    gpu.append("wrong")
    p = problem(512, 256, 512)
    assert chosen(p) == explained(p)["chosen"] == "reference"
    assert explained(p)["self_checks"] == NOBODY_LOOKED
    assert set(explained(p)["slower"]) == {"cuda", "triton"}


@pytest.mark.parametrize(
    "other",
    [
        problem(64, 16, 64, dtype=torch.float16),
        problem(64, 16, 64, stride=(2, 2)),
        problem(64, 16, 64, R=5),
        problem(64, 17, 64),
        problem(20, 16, 64),
        problem(56, 16, 64),
        problem(64, 16, 64, precise=True),
        problem(64, 16, 64, groups=2),
        problem(64, 16, 64, groups=2, compact=True),
    ],
    ids=str,
)
def test_what_compiles_to_other_code_is_another_variant(other):
    assert basis_conv2d_selfcheck.triton(other).variant != basis_conv2d_selfcheck.triton(problem(64, 16, 64)).variant


def test_layout_batch_and_epilogue_are_no_variants():
    other = basis_conv2d_selfcheck.triton(problem(128, 15, 60, channels_last=False, activation="relu", N=3, H=9, W=8))
    assert other.variant == basis_conv2d_selfcheck.triton(problem(128, 16, 64)).variant
