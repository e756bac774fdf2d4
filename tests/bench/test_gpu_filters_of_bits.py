"""Rows of ternary and stacked layers of the GPU commands, rehearsed on the CPU."""

from __future__ import annotations

import json

import pytest

from bench.gpu import filters_of_bits as rows
from bench.gpu import report
from bench.gpu.timing import CpuMeter
from tests.bench.test_gpu_runs import ABOUT


@pytest.mark.parametrize("engine", rows.ENGINES)
@pytest.mark.parametrize("kind", rows.KINDS)
def test_a_row_is_checked_and_timed(kind, engine):
    data = rows.measure(rows.BitsLayer(kind, 32, 40, 6, 2), engine, "cpu", CpuMeter())
    assert data["eager"]["median"] > 0
    assert report.subject(json.loads(json.dumps(data))) == f"{kind}_32to40_at6_n2"
    assert f"{kind}_512to512_at7_n32 {engine}" in [step.key for step in rows.steps(ABOUT, "cuda", None)]


@pytest.mark.parametrize("engine", rows.ENGINES)
@pytest.mark.parametrize("kind", rows.KINDS)
def test_a_wrong_layer_gets_no_time(monkeypatch, kind, engine):
    right = rows.Prepared.function
    monkeypatch.setattr(rows.Prepared, "function", lambda self, engine: lambda x: right(self, engine)(x) * 1.05)
    with pytest.raises(AssertionError, match="relative error"):
        rows.measure(rows.BitsLayer(kind, 32, 40, 6, 2), engine, "cpu", CpuMeter())
