"""Targets on synthetic rows: who counts as the rival, what is missing, which bar is met."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from basisconv_kernels.core.problem import Conv2dProblem
from bench.harness.case import Case, Part, Suite, Target
from bench.harness.rows import Row
from bench.harness.verdict import outcomes

Make = Callable[..., Row]
RIVALS = ("onnxruntime", "openvino")


def suite(*targets: Target, cases: tuple[str, ...] = ("a", "b")) -> Suite:
    problem = Conv2dProblem(C=1, Q=1, K=1)
    return Suite("C1", "", tuple(Case(name, "layer", problem) for name in cases), (), targets)


def test_each_takes_the_fastest_rival_and_the_ratio_by_round(make_row: Make) -> None:
    rows = [
        make_row(case="a", samples=(1.0, 10.0, 1.0)),
        make_row("onnxruntime", "two_step", (1.5, 15.0, 1.5), case="a"),
        make_row("openvino", "two_step", (3.0, 30.0, 3.0), case="a", layout="nchw"),
        make_row("openvino", "dense", (0.1, 0.1, 0.1), case="a"),
        make_row("onednn_avx2", "two_step", (0.1, 0.1, 0.1), case="a"),
    ]
    (found,) = outcomes(rows, suite(Target("t", "each", 1.4, 1.6, "", RIVALS)))
    assert (found.case, found.value, found.verdict) == ("a", 1.5, "met")
    assert found.note == "onnxruntime channels_last"
    assert found.spread is not None
    assert (found.spread.q1, found.spread.q3) == (1.5, 1.5)


@pytest.mark.parametrize(("rival", "verdict"), [(1.0, "short"), (1.35, "met"), (1.7, "stretch")])
def test_bars(make_row: Make, rival: float, verdict: str) -> None:
    rows = [make_row(case="a", samples=(1.0,)), make_row("openvino", "two_step", (rival,), case="a")]
    (found,) = outcomes(rows, suite(Target("t", "each", 1.35, 1.6, "", RIVALS)))
    assert found.verdict == verdict
    assert found.note == "openvino channels_last; without onnxruntime"


def test_mean_over_cases_says_how_many_and_refuses_gaps(make_row: Make) -> None:
    target = Target("t", "geomean", 1.35, None, "", RIVALS)
    whole = [
        make_row(case="a", samples=(1.0,)),
        make_row("openvino", "two_step", (1.0,), case="a"),
        make_row(case="b", samples=(1.0,)),
        make_row("openvino", "two_step", (4.0,), case="b"),
    ]
    (found,) = outcomes(whole, suite(target))
    assert found.value == pytest.approx(2.0)
    assert (found.case, found.verdict) == ("", "met")
    assert found.note == "2 of 2 cases; without onnxruntime"
    failed = [row for row in whole if row.case == "a"]
    failed.append(make_row(case="b", samples=(), status="failed"))
    (gap,) = outcomes(failed, suite(target))
    assert (gap.value, gap.verdict) == (None, "no data")
    assert "no ratio for b" in gap.note


def test_a_candidate_is_judged_beside_ours(make_row: Make) -> None:
    rows = [
        make_row(case="a", samples=(1.0,)),
        make_row("candidate:mine:kernel", case="a", samples=(4.0,)),
        make_row("openvino", "two_step", (2.0,), case="a"),
    ]
    found = outcomes(rows, suite(Target("t", "each", 1.0, None, "", RIVALS)))
    assert [(o.engine, o.value, o.verdict) for o in found] == [
        ("ours", 2.0, "met"),
        ("candidate:mine:kernel", 0.5, "short"),
    ]


def test_share_of_the_predicted_speed_up(make_row: Make) -> None:
    parts = (Part("conv", 3, True), Part("fc", 1, False))
    cases = (
        Case("conv", "layer"),
        Case("fc", "linear"),
        Case("net", "network", tags=frozenset({"network"}), parts=parts),
    )
    target = Target("share", "share_of_predicted", 0.9, 1.0, "network", RIVALS, "dense")
    network = Suite("C1", "", cases, (), (target,))
    listed = [[part.case, part.count, part.converted] for part in parts]
    rows = [
        make_row("openvino", "dense", (4.0,), case="conv"),
        make_row("onnxruntime", "dense", (9.0,), case="conv"),
        make_row(case="conv", samples=(1.0,)),
        make_row("openvino", "dense", (3.0,), case="fc"),
        make_row("openvino", "dense", (20.0,), case="net"),
        make_row("onnxruntime", "dense", (25.0,), case="net"),
        make_row("ours_compiled", case="net", samples=(8.0,), parts=listed),
        make_row(case="net", samples=(10.0,), parts=listed),
    ]
    (found,) = outcomes(rows, network)
    # predicted (3·4 + 3) / (3·1 + 3) = 2.5; measured with the faster of ours 20/8 = 2.5
    assert found.value == pytest.approx(1.0)
    assert found.verdict == "stretch"
    assert found.note == "2.50× measured, 2.50× predicted, against openvino (ours_compiled)"
    (gap,) = outcomes([row for row in rows if row.case != "fc"], network)
    assert (gap.verdict, gap.note) == ("no data", "layer fc has no time")


@pytest.mark.parametrize(
    ("extra", "verdict"), [(2**20, "stretch"), (2**21, "met"), (5 * 2**20, "short"), (200 * 2**20, "short")]
)
def test_memory(make_row: Make, extra: int, verdict: str) -> None:
    memory = {"extra_bytes": extra, "output_bytes": 1, "maps_bytes": 4 * 2**20, "im2col_bytes": 50 * 2**20}
    rows = [make_row(case="a", samples=(), memory=memory)]
    (found,) = outcomes(rows, suite(Target("m", "memory", None)))
    assert (found.verdict, found.value) == (verdict, extra)
