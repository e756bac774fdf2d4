"""The benchmark of ``ternary_conv2d``: the gate comes first, and a row says what was measured."""

from __future__ import annotations

import torch

from basisconv_kernels.reference.ternary_conv2d_problem import TernaryConv2dProblem
from basisconv_kernels.testing import check_same_layer
from basisconv_kernels.testing import ternary_conv2d as ternary
from bench import ternary_conv2d as bench


def tiny(scales="one"):
    problem = TernaryConv2dProblem(
        N=1, C=8, K=8, H=6, W=6, padding=(1, 1, 1, 1), scales=scales, channels_last=True, bias=True
    )
    return ternary.TernaryCase("tiny", "quick", problem, density=0.25)


def test_a_row_has_the_gate_all_times_and_the_best_rival():
    row = bench.measure(tiny("two"), 0.01, compiled=False)
    assert 0 <= row["gate"] <= 1
    assert set(row["ms"]) == {"ours", "dense_channels_last", "dense_nchw"}
    assert row["ms"][row["rival"]]["median"] == min(row["ms"][n]["median"] for n in row["ms"] if n != "ours")
    assert "times as fast" in bench.line(row)


def test_a_wrong_kernel_gets_no_time(monkeypatch):
    monkeypatch.setattr(bench, "ternary_conv2d", lambda x, p, s, b, **_: torch.zeros_like(x))
    row = bench.measure(tiny(), 0.01, compiled=False)
    assert "ms" not in row
    assert "FAILED" in bench.line(row)


def test_cases_compute_what_they_are_named_for():
    calls = bench.calls_of(bench.case_of("n1_512_at7", 0.1), compiled=False)
    with torch.no_grad():
        results = {name: call() for name, call in calls.items()}
    for result in results.values():
        check_same_layer(result, results["dense_nchw"])
